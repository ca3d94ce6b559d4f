"""Several whole samples in a row."""
