"""Family gemma2."""
