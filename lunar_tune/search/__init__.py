"""The search: the only home of Ray, Optuna and MLflow."""
