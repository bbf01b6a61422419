"""MLflow: runs of searches and trials, and its UI."""
