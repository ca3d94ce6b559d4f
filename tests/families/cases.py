"""What the tests of all families share: one row per family."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tests.families.family_facts import EXPERT_FIELDS, NUM_TINY_EXPERTS, PADDLENLP_TURN, FamilyFacts
from tests.families.framings import (
    BARE,
    CHATGLM,
    CHATGLM1,
    CHATGLM4,
    FALCON,
    GEMMA,
    GPT2,
    GRANITE,
    INTERNLM,
    INTERNLM2,
    OPT,
    QWEN2,
    SENTENCEPIECE,
    SMOLLM3,
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
    FamilyCase("chatglm", framing=CHATGLM1),
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
    FamilyCase("falcon", framing=FALCON),
    FamilyCase("granite", _GROUPED, num_kv_heads=2, fused_layers=True, framing=GRANITE),
    FamilyCase("smollm3", _GROUPED, num_kv_heads=2, fused_layers=True, framing=SMOLLM3),
    FamilyCase("mistral", {"num_key_value_heads": 2}, num_kv_heads=2, fused_layers=True),
    FamilyCase("gemma", {"num_key_value_heads": 1}, num_kv_heads=1, fused_layers=True, framing=GEMMA),
    FamilyCase("gemma2", _GROUPED, num_kv_heads=2, fused_layers=True, framing=GEMMA),
    FamilyCase("gemma3", _GROUPED, num_kv_heads=2, fused_layers=True, framing=GEMMA),
)
IDS = [f"{case.name}-kv{case.num_kv_heads}" for case in CASES]


_GATED = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_FUSED = frozenset({"query_key_value", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"})

_JOINED_INPUT = frozenset({"query_key_value_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})

_CHATGLM = FamilyFacts(
    _FUSED,
    ids_from="sentencepiece",
    groups_heads=True,
    small=_GROUPED,
    most_tensor_parts=2,
    computed_tensors={"transformer.rotary_pos_emb.inv_freq": (2,)},
    rotary_tables=1,
    rotary_function=PADDLENLP_TURN,
)

_NEW_GEMMA = FamilyFacts(
    _GATED,
    known_to_paddlenlp=False,
    blank_in_front=False,
    groups_heads=True,
    small=_GROUPED,
    tied_embedding="embed_tokens",
    fast_tokenizer_agrees=False,
    curve_learning_rate=3e-3,
    norm_offset=1.0,
)

_BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
_EXPERTS = FamilyFacts(
    _GATED,
    known_to_paddlenlp=False,
    groups_heads=True,
    small=_GROUPED,
    curve_learning_rate=1e-3,  # larger steps meet tokens between two experts, where rounding chooses
    feed_forwards=NUM_TINY_EXPERTS,
)

_NEW_LLAMA = FamilyFacts(
    _GATED,
    known_to_paddlenlp=False,
    groups_heads=True,
    small=_GROUPED,
    tied_embedding="embed_tokens",
    tied_config={"tie_word_embeddings": True},
    curve_learning_rate=2e-3,
)

FACTS = {
    "llama": FamilyFacts(
        _GATED,
        groups_heads=True,
        named_as_llama="Llama",
        rotary_function=PADDLENLP_TURN,
    ),
    "chatglm": FamilyFacts(
        frozenset({"query_key_value_proj", "o_proj", "up_proj", "down_proj"}),
        known_to_paddlenlp=False,
        ids_from="sentencepiece",
        tied_embedding="embed_tokens",
        computed_tensors={"transformer.layers.0.attention.rotary_emb.inv_freq": (4,)},
        rotary_function="finetune.families.chatglm.layers.turn",
        norm_centres=True,
        sees_ahead=True,
        sharpness=3.0,
    ),
    "chatglm2": _CHATGLM,
    "chatglm3": _CHATGLM,
    "chatglm4": replace(_CHATGLM, ids_from="tiktoken"),
    "qwen": FamilyFacts(
        frozenset({"attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"}),
        ids_from="tiktoken",
        small={"vocab_size": 520},
        rotary_function=PADDLENLP_TURN,
    ),
    "qwen2": FamilyFacts(
        _GATED,
        groups_heads=True,
        small=_GROUPED,
        tied_embedding="embed_tokens",
        tied_config={"tie_word_embeddings": True},
        curve_learning_rate=1e-3,
        named_as_llama="Qwen2",
        rotary_function=PADDLENLP_TURN,
    ),
    "ernie4_5": FamilyFacts(
        _GATED,
        groups_heads=True,
        small=_GROUPED,
        tied_embedding="embed_tokens",
        curve_learning_rate=2e-3,
        named_as_llama="Ernie4_5",
        llama_fields=("head_dim",),
    ),
    "glm4": FamilyFacts(
        frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}),
        known_to_paddlenlp=False,
        groups_heads=True,
        small=_GROUPED,
        curve_learning_rate=5e-3,
    ),
    "phi3": FamilyFacts(
        frozenset({"query_key_value_proj", "o_proj", "gate_up_proj", "down_proj"}),
        known_to_paddlenlp=False,
        groups_heads=True,
        small=_GROUPED,
        curve_learning_rate=2e-3,
    ),
    "qwen3": FamilyFacts(
        _GATED,
        groups_heads=True,
        small=_GROUPED,
        tied_embedding="embed_tokens",
        tied_config={"tie_word_embeddings": True},
        curve_learning_rate=2e-3,
        named_as_llama="Qwen3",
        llama_fields=("head_dim",),
    ),
    "qwen2_moe": replace(
        _EXPERTS,
        curve_learning_rate=2e-3,
        feed_forwards=NUM_TINY_EXPERTS + 1,
        named_as_llama="Qwen2Moe",
        llama_fields=("qkv_bias", "shared_expert_intermediate_size", *EXPERT_FIELDS),
    ),
    # Two families with the loss that balances experts, in all layouts; one without.
    "qwen3_moe": replace(
        _EXPERTS,
        smooth_config=_BALANCED,
        named_as_llama="Qwen3Moe",
        llama_fields=("head_dim", *EXPERT_FIELDS),
    ),
    "mixtral": replace(_EXPERTS, smooth_config=_BALANCED),
    "internlm": FamilyFacts(
        _GATED,
        curve_learning_rate=2e-3,
    ),
    "internlm2": FamilyFacts(
        _JOINED_INPUT,
        known_to_paddlenlp=False,
        groups_heads=True,
        small=_GROUPED,
        curve_learning_rate=2e-3,
        blank_in_front=False,
    ),
    "baichuan": FamilyFacts(
        _JOINED_INPUT,
        known_to_paddlenlp=False,
        curve_learning_rate=2e-3,
    ),
    "baichuan2": FamilyFacts(
        _JOINED_INPUT,
        known_to_paddlenlp=False,
        curve_learning_rate=2e-3,
        rotary_tables=0,
        adds_distances=True,
        blank_in_front=False,
    ),
    "xverse": FamilyFacts(
        _GATED,
        curve_learning_rate=2e-3,
        named_as_llama="Llama",
    ),
    "bloom": FamilyFacts(
        _FUSED,
        splits_rows=False,
        tied_embedding="word_embeddings",
        curve_learning_rate=1e-2,
        rotary_tables=0,
        adds_distances=True,
        norm_centres=True,
    ),
    "opt": FamilyFacts(
        frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "linear1", "linear2"}),
        splits_rows=False,
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
        norm_centres=True,
    ),
    "granite": replace(
        _NEW_LLAMA,
        curve_learning_rate=5e-3,
        named_as_llama="Granite",
        llama_fields=(
            "embedding_multiplier",
            "attention_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ),
    ),
    "smollm3": replace(_NEW_LLAMA, named_as_llama="SmolLM3", llama_fields=("no_rope_layers", "pad_token_id")),
    "mistral": FamilyFacts(
        _GATED,
        groups_heads=True,
        small=_GROUPED,
        tied_embedding="embed_tokens",
        tied_config={"tie_word_embeddings": True},
        curve_learning_rate=1e-3,
        named_as_llama="Mistral",
        llama_fields=("sliding_window",),
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
        named_as_llama="Gemma",
        llama_fields=("head_dim", "hidden_act"),
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
