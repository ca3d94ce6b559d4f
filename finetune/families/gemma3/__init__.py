"""Family gemma3."""
