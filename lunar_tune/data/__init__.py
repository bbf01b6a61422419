"""Data without torch: records, readers, splits, and generators of invented data."""
