"""Family qwen3."""
