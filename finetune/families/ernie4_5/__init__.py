"""Family ernie4_5."""
