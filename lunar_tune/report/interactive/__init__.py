"""Pictures of a search that answer to the mouse, drawn with plotly; listed in `gallery`."""
