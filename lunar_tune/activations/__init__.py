"""What a model computes on the prompts, captured once: residual streams and their uses."""
