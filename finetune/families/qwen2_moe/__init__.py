"""Family qwen2_moe."""
