"""What tests have to know of a family beside its record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NUM_TINY_EXPERTS = 4
"""Experts of each layer of a tiny model that has some."""

EXPERT_FIELDS = (
    "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts",
    "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef",
)  # fmt: skip
"""Fields of a config with experts, of transformers and ours."""
PADDLENLP_TURN = "apply_rotary_pos_emb"
"""What turns heads in the modules of PaddleNLP."""


@dataclass(frozen=True)
class FamilyFacts:
    """What tests have to know of a family beside its record.

    Attributes:
        lora_layers: Last parts of the linear layers that LoRA adapts.
        groups_heads: Whether several query heads can have one key and value head.
        small: Options of a small model, the grouped heads among them where no other family shows the plain ones.
        splits_rows: Whether its layers can split rows over tensor-parallel ranks.
        most_tensor_parts: Most tensor-parallel parts of the models in tests/distributed; None without a limit.
        tied_embedding: The embedding whose matrix is the head's too, by its last part; None without one.
        tied_config: What config.json has to say for that.
        smooth_config: What config.json says so that no last bit of a sum decides between two gradients.
        computed_tensors: Published weights that every implementation works out anew, with their shapes.
        fast_tokenizer_agrees: Whether transformers' fast tokenizer gives the ids of the slow one.
        curve_learning_rate: Of the LoRA training that is compared with transformers; None for none.
        rotary_tables: Tensors in which its layers get cos and sin of the positions; 0 without rotary positions.
        rotary_function: What turns heads: a function of PaddleNLP's module of the family, or a dotted path.
        known_to_paddlenlp: Whether PaddleNLP has layers of these names and can divide them.
        ids_from: The library that says which ids are right.
        blank_in_front: Whether the published vocabulary puts a blank in front of texts, where the tiny one does.
        adds_distances: Whether the scores get distances (ALiBi), so that every mask is a dense one.
        sees_ahead: Whether tokens of a prompt see what follows them, so that every mask is a dense one.
        sharpness: What matrices are multiplied with, beyond other families', so that a small model says several things.
        caps_scores: Whether its scores are capped, which no fused kernel does: attention runs without one.
        norm_offset: What its norms add to their weights.
        norm_centres: Whether its norms take the mean off.
        named_as_llama: Prefix of the names of transformers' classes ("Qwen2" in Qwen2ForCausalLM) where its config and
            its weights are named as its Llama's; "" where they are not, or it has none.
        llama_fields: Further fields of the config that both name alike.
        feed_forwards: Feed-forward networks in each layer; where there are several, a router chooses among them.
    """

    lora_layers: frozenset[str]
    groups_heads: bool = False
    small: dict[str, int] = field(default_factory=dict)
    splits_rows: bool = True
    most_tensor_parts: int | None = None
    tied_embedding: str | None = None
    tied_config: dict[str, Any] = field(default_factory=dict)
    smooth_config: dict[str, Any] = field(default_factory=dict)
    computed_tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fast_tokenizer_agrees: bool = True
    curve_learning_rate: float | None = None
    rotary_tables: int = 2
    rotary_function: str = "finetune.families.head_attention.turn"
    known_to_paddlenlp: bool = True
    ids_from: str = "transformers"
    blank_in_front: bool = True
    adds_distances: bool = False
    sees_ahead: bool = False
    sharpness: float = 1.0
    caps_scores: bool = False
    norm_offset: float = 0.0
    norm_centres: bool = False
    named_as_llama: str = ""
    llama_fields: tuple[str, ...] = ()
    feed_forwards: int = 1

    @property
    def chooses_experts(self) -> bool:
        """Whether tokens pass some of their layers' feed-forward networks only."""
        return self.feed_forwards > 1
