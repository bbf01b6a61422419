"""Pictures of a search, drawn with matplotlib: one module a picture, listed in `gallery`."""
