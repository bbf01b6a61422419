"""Rows of trials as tables, pictures, a page and text."""
