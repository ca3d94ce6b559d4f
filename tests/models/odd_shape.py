"""A model whose sizes all differ, so that none can stand for another."""

from finetune.families.tiny_recipe import TinyShape

SHAPE = TinyShape(
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=90,
    max_length=40,
)
