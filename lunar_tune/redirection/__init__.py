"""LUNAR's three steps on one matrix: the unlearning vector, the fit, the edit."""
