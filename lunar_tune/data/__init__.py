"""Data without torch: records, readers, splits, and generators of invented data.

Covers: everything between a file on disk and tuples of records or prompts.
Does not cover: chat templates and tokens (`lunar_tune.models`), scores (`lunar_tune.metrics`).
"""

__all__: list[str] = []
