"""Judging a model: greedy answers, ROUGE recall, scores of the forget, retain and factual sets."""
