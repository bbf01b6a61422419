"""One gradient loop for everything that trains a causal language model."""
