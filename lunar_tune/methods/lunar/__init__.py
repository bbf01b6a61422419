"""LUNAR (arXiv 2502.07218): the unlearning vector, the fit of one down-projection, the edit."""
