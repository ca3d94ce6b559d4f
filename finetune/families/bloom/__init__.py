"""Family bloom."""
