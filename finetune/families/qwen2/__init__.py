"""Family qwen2."""
