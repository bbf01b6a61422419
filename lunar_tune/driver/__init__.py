"""A search's own process: its plan, its loop, who runs its tasks, what it shows and writes."""
