"""Settings that were found by earlier searches."""
