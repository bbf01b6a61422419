"""Who runs a search's tasks."""
