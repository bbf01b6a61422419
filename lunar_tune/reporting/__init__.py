"""Tables, pictures and a report from the rows of a search."""
