"""One trial as a plain function: parameters to an unlearned model to scores."""
