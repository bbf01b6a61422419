"""Scores of a model: ROUGE recall, likelihoods, refusals, and the goal of a search."""
