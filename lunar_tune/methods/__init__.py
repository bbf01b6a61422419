"""Unlearning methods behind one contract."""

from lunar_tune.methods import contract  # first: it imports the methods and registers them

__all__ = ["contract"]
