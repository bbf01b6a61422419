"""Unlearning methods behind one contract."""
