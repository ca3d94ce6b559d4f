"""Tiny models with random weights and a tokenizer of their own."""
