"""Family gemma."""
