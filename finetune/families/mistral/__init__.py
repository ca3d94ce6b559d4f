"""Family mistral."""
