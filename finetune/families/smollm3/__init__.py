"""Family smollm3."""
