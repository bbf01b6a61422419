"""A search: its plan, its loop, who runs its tasks, what it shows and writes."""
