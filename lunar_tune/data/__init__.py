"""Data without torch: records, readers, splits, and generators of invented data."""

__all__: list[str] = []
