"""What the tests of all families share: one row per family."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tests.families.framings import (
    BARE,
    CHATGLM,
    CHATGLM4,
    FALCON,
    GEMMA,
    GPT2,
    INTERNLM,
    INTERNLM2,
    OPT,
    QWEN2,
    SENTENCEPIECE,
    Framing,
)


@dataclass(frozen=True)
class FamilyCase:
    """A family, options of its tiny checkpoint, and what must come out."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    num_kv_heads: int = 4
    framing: Framing = SENTENCEPIECE
    fused_layers: bool = False
    bfloat16_on_cpu: bool = True

    @property
    def prefix(self) -> tuple[str, ...]:
        """Tokens that open a prompt."""
        return tuple(text for _, text in self.framing.frame)

    @property
    def end_of_answer(self) -> str:
        return self.framing.end[1]


_GROUPED = {"num_key_value_heads": 2}

CASES = (
    FamilyCase("llama", fused_layers=True),
    FamilyCase("llama", {"num_key_value_heads": 2}, num_kv_heads=2, fused_layers=True),
    FamilyCase("chatglm2", _GROUPED, num_kv_heads=2, bfloat16_on_cpu=False, framing=CHATGLM),
    FamilyCase(
        "chatglm3",
        _GROUPED,
        num_kv_heads=2,
        bfloat16_on_cpu=False,
        framing=replace(CHATGLM, chat_ends=("<|user|>", "<|observation|>")),
    ),
    FamilyCase("chatglm4", _GROUPED, num_kv_heads=2, bfloat16_on_cpu=False, framing=CHATGLM4),
    FamilyCase(
        "qwen",
        {"vocab_size": 520},
        framing=Framing(
            frame=[],
            source=[(64, "a"), (286, " red"), (287, " dress")],
            target=[(295, "fit"), (82, "s"), (276, " w"), (294, "ell"), (220, " "), (264, "上衣")],
            end=(312, "<|endoftext|>"),
            pad_token_id=312,
            chat_ends=("<|im_end|>",),
        ),
    ),
    FamilyCase("qwen2", _GROUPED, num_kv_heads=2, fused_layers=True, framing=QWEN2),
    FamilyCase("ernie4_5", _GROUPED, num_kv_heads=2, fused_layers=True, framing=BARE),
    FamilyCase(
        "glm4",
        _GROUPED,
        num_kv_heads=2,
        framing=replace(
            QWEN2,
            frame=[(322, "[gMASK]"), (324, "<sop>")],
            end=(320, "<|endoftext|>"),
            pad_token_id=320,
            chat_ends=("<|user|>", "<|observation|>"),
        ),
    ),
    FamilyCase("phi3", _GROUPED, num_kv_heads=2),
    FamilyCase("internlm", framing=INTERNLM),
    FamilyCase("internlm2", _GROUPED, num_kv_heads=2, framing=INTERNLM2),
    FamilyCase("baichuan", framing=replace(INTERNLM, frame=[], pad_token_id=0, chat_ends=())),
    FamilyCase("baichuan2", framing=replace(INTERNLM2, frame=[], pad_token_id=0, chat_ends=())),
    FamilyCase(
        "xverse",
        fused_layers=True,
        framing=Framing(
            frame=[],
            source=[(68, "a"), (290, " red"), (291, " dress")],
            target=[(299, "fit"), (86, "s"), (280, " w"), (298, "ell"), (224, " "), (268, "上衣")],
            end=(3, "<|endoftext|>"),
            pad_token_id=1,
        ),
    ),
    FamilyCase("qwen2_moe", _GROUPED, num_kv_heads=2, framing=QWEN2),
    FamilyCase("qwen3_moe", _GROUPED, num_kv_heads=2, framing=QWEN2),
    FamilyCase("mixtral", _GROUPED, num_kv_heads=2),
    FamilyCase("qwen3", _GROUPED, num_kv_heads=2, fused_layers=True, framing=QWEN2),
    FamilyCase(
        "bloom",
        framing=Framing(
            frame=[],
            source=[(68, "a"), (290, " red"), (291, " dress")],
            target=[(304, "fit"), (86, "s"), (280, " w"), (303, "ell"), (224, " "), (268, "上衣")],
            end=(2, "</s>"),
            pad_token_id=3,
        ),
    ),
    FamilyCase("opt", framing=OPT),
    FamilyCase("gpt2", framing=GPT2),
    FamilyCase("falcon", {"num_key_value_heads": 1}, num_kv_heads=1, framing=FALCON),
    FamilyCase("falcon", _GROUPED, num_kv_heads=2, framing=FALCON),
    FamilyCase("mistral", {"num_key_value_heads": 2}, num_kv_heads=2, fused_layers=True),
    FamilyCase("gemma", {"num_key_value_heads": 1}, num_kv_heads=1, framing=GEMMA),
    FamilyCase("gemma2", _GROUPED, num_kv_heads=2, fused_layers=True, framing=GEMMA),
    FamilyCase("gemma3", _GROUPED, num_kv_heads=2, fused_layers=True, framing=GEMMA),
)
IDS = [f"{case.name}-kv{case.num_kv_heads}" for case in CASES]


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
        caps_scores: Whether its scores are capped, which no fused kernel does: attention runs without one.
        norm_offset: What its norms add to their weights.
        norm_centres: Whether its norms take the mean off.
        feed_forwards: Feed-forward networks in each layer; where there are several, a router chooses among them.
    """

    lora_layers: frozenset[str]
    groups_heads: bool = False
    small: dict[str, int] = field(default_factory=dict)
    splits_rows: bool = False
    most_tensor_parts: int | None = None
    tied_embedding: str | None = None
    tied_config: dict[str, Any] = field(default_factory=dict)
    smooth_config: dict[str, Any] = field(default_factory=dict)
    computed_tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fast_tokenizer_agrees: bool = True
    curve_learning_rate: float | None = None
    rotary_tables: int = 2
    rotary_function: str = "apply_rotary_pos_emb"
    known_to_paddlenlp: bool = True
    ids_from: str = "transformers"
    blank_in_front: bool = True
    adds_distances: bool = False
    caps_scores: bool = False
    norm_offset: float = 0.0
    norm_centres: bool = False
    feed_forwards: int = 1

    @property
    def chooses_experts(self) -> bool:
        """Whether tokens pass some of their layers' feed-forward networks only."""
        return self.feed_forwards > 1


_GATED = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_FUSED = frozenset({"query_key_value", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"})

_JOINED_INPUT = frozenset({"query_key_value_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})

_CHATGLM = FamilyFacts(
    _FUSED,
    ids_from="sentencepiece",
    groups_heads=True,
    small=_GROUPED,
    splits_rows=True,
    most_tensor_parts=2,
    computed_tensors={"transformer.rotary_pos_emb.inv_freq": (2,)},
    rotary_tables=1,
)

_NEW_GEMMA = FamilyFacts(
    _GATED,
    known_to_paddlenlp=False,
    blank_in_front=False,
    groups_heads=True,
    small=_GROUPED,
    splits_rows=True,
    tied_embedding="embed_tokens",
    fast_tokenizer_agrees=False,
    curve_learning_rate=3e-3,
    rotary_function="finetune.families.head_attention.turn",
    norm_offset=1.0,
)

# Larger steps meet tokens between two experts, where rounding decides which one they pass.
NUM_TINY_EXPERTS = 4
"""Experts of each layer of a tiny model that has some."""

_BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
_EXPERTS = FamilyFacts(
    _GATED,
    known_to_paddlenlp=False,
    groups_heads=True,
    small=_GROUPED,
    splits_rows=True,
    curve_learning_rate=1e-3,
    rotary_function="finetune.families.head_attention.turn",
    feed_forwards=NUM_TINY_EXPERTS,
)

FACTS = {
    "llama": FamilyFacts(_GATED, groups_heads=True, splits_rows=True),
    "chatglm2": _CHATGLM,
    "chatglm3": _CHATGLM,
    "chatglm4": replace(_CHATGLM, ids_from="tiktoken"),
    "qwen": FamilyFacts(
        frozenset({"attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"}),
        ids_from="tiktoken",
        small={"vocab_size": 520},
        splits_rows=True,
    ),
    "qwen2": FamilyFacts(
        _GATED,
        groups_heads=True,
        small=_GROUPED,
        splits_rows=True,
        tied_embedding="embed_tokens",
        tied_config={"tie_word_embeddings": True},
        curve_learning_rate=1e-3,
    ),
    "ernie4_5": FamilyFacts(
        _GATED,
        groups_heads=True,
        small=_GROUPED,
        splits_rows=True,
        tied_embedding="embed_tokens",
        curve_learning_rate=2e-3,
        rotary_function="finetune.families.head_attention.turn",
    ),
    "glm4": FamilyFacts(
        frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}),
        known_to_paddlenlp=False,
        groups_heads=True,
        small=_GROUPED,
        splits_rows=True,
        curve_learning_rate=5e-3,
        rotary_function="finetune.families.head_attention.turn",
    ),
    "phi3": FamilyFacts(
        frozenset({"query_key_value_proj", "o_proj", "gate_up_proj", "down_proj"}),
        known_to_paddlenlp=False,
        groups_heads=True,
        small=_GROUPED,
        splits_rows=True,
        curve_learning_rate=2e-3,
        rotary_function="finetune.families.head_attention.turn",
    ),
    "qwen3": FamilyFacts(
        _GATED,
        rotary_function="finetune.families.head_attention.turn",
        groups_heads=True,
        small=_GROUPED,
        splits_rows=True,
        tied_embedding="embed_tokens",
        tied_config={"tie_word_embeddings": True},
        curve_learning_rate=2e-3,
    ),
    "qwen2_moe": replace(_EXPERTS, curve_learning_rate=2e-3, feed_forwards=NUM_TINY_EXPERTS + 1),
    # Two families with the loss that balances experts, in all layouts; one without.
    "qwen3_moe": replace(_EXPERTS, smooth_config=_BALANCED),
    "mixtral": replace(_EXPERTS, smooth_config=_BALANCED),
    "internlm": FamilyFacts(
        _GATED,
        splits_rows=True,
        curve_learning_rate=2e-3,
        rotary_function="finetune.families.head_attention.turn",
    ),
    "internlm2": FamilyFacts(
        _JOINED_INPUT,
        known_to_paddlenlp=False,
        groups_heads=True,
        small=_GROUPED,
        splits_rows=True,
        curve_learning_rate=2e-3,
        rotary_function="finetune.families.head_attention.turn",
        blank_in_front=False,
    ),
    "baichuan": FamilyFacts(
        _JOINED_INPUT,
        known_to_paddlenlp=False,
        splits_rows=True,
        curve_learning_rate=2e-3,
        rotary_function="finetune.families.head_attention.turn",
    ),
    "baichuan2": FamilyFacts(
        _JOINED_INPUT,
        known_to_paddlenlp=False,
        splits_rows=True,
        curve_learning_rate=2e-3,
        rotary_tables=0,
        adds_distances=True,
        blank_in_front=False,
    ),
    "xverse": FamilyFacts(
        _GATED,
        splits_rows=True,
        curve_learning_rate=2e-3,
        rotary_function="finetune.families.head_attention.turn",
    ),
    "bloom": FamilyFacts(
        _FUSED,
        tied_embedding="word_embeddings",
        curve_learning_rate=1e-2,
        rotary_tables=0,
        adds_distances=True,
        norm_centres=True,
    ),
    "opt": FamilyFacts(
        frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "linear1", "linear2"}),
        tied_embedding="word_embeddings",
        # At the kink of OPT's ReLU the order of a sum decides between two gradients: about one step in two
        # hundred would differ by 1e-4, in that step's norm alone.
        smooth_config={"activation_function": "gelu_new"},
        curve_learning_rate=1e-3,
        rotary_tables=0,
        norm_centres=True,
    ),
    "gpt2": FamilyFacts(
        frozenset({"query_key_value_proj", "o_proj", "up_proj", "down_proj"}),
        known_to_paddlenlp=False,
        small={"seed": 1},  # one that does not say the same of everything
        tied_embedding="embed_tokens",
        curve_learning_rate=1e-3,
        rotary_tables=0,
        norm_centres=True,
    ),
    "falcon": FamilyFacts(
        frozenset({"query_key_value_proj", "o_proj", "up_proj", "down_proj"}),
        known_to_paddlenlp=False,
        groups_heads=True,
        small=_GROUPED,
        tied_embedding="embed_tokens",
        curve_learning_rate=1e-3,
        rotary_function="finetune.families.head_attention.turn",
        norm_centres=True,
    ),
    "mistral": FamilyFacts(
        _GATED,
        groups_heads=True,
        small=_GROUPED,
        splits_rows=True,
        tied_embedding="embed_tokens",
        tied_config={"tie_word_embeddings": True},
        curve_learning_rate=1e-3,
        rotary_function="finetune.families.head_attention.turn",
    ),
    "gemma": FamilyFacts(
        _GATED,
        blank_in_front=False,
        groups_heads=True,
        small=_GROUPED,
        tied_embedding="embed_tokens",
        # It supposes that the model puts no blank before a text; tiny ones do.
        fast_tokenizer_agrees=False,
        curve_learning_rate=1e-2,
        norm_offset=1.0,
    ),
    "gemma2": replace(_NEW_GEMMA, caps_scores=True),
    "gemma3": replace(_NEW_GEMMA, curve_learning_rate=1e-3),
}


def small_options(name: str) -> dict[str, int]:
    """Options of a small model in which heads share keys and values wherever the family can."""
    facts = FACTS[name]
    return facts.small | (_GROUPED if facts.groups_heads else {})


TIED = {name: facts.tied_embedding for name, facts in FACTS.items() if facts.tied_embedding}
"""Embeddings that are the head's matrix too, by family."""
