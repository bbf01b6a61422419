"""What a model computes on prompts, each once: residual streams, prefill, greedy decoding."""
