"""The published LUNAR code's configuration file."""
