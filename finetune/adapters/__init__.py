"""What is trained instead of, or on top of, all weights: LoRA, prefixes, embedding noise."""
