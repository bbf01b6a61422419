"""An unlearned model as files that load without this package, and the proof that they do."""
