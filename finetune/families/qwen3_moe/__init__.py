"""Family qwen3_moe."""
