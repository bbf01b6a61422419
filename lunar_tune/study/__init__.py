"""The truth about scores: trials, journal, answers and configuration of one search, on disk."""
