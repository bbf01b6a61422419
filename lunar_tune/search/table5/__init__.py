"""One search for each method, model and data set, and their table."""
