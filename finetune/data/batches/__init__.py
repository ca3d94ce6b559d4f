"""The global order of samples, and the arrays of each step."""
