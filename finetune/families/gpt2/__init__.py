"""Family gpt2."""
