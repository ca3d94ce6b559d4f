"""Family qwen."""
