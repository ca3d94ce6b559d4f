"""Family llama."""
