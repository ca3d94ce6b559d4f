"""Layers of PaddleNLP that join several, as the options `fuse_attention_qkv` and `fuse_attention_ffn` ask for."""

JOINED_LAYERS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_fused_proj": ("gate_proj", "up_proj"),
}
"""Name of the joined layer -> names of the parts in their order."""
