"""Ray Tune as backend: workers, searcher, resources, access."""
