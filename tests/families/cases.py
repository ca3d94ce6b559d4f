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

FACTS = {
    "llama": FamilyFacts(
        _GATED,
        groups_heads=True,
        named_as_llama="Llama",
        rotary_function=PADDLENLP_TURN,
        models="Llama 1–3.3, DeepSeek-R1-Distill-Llama, Yi, Skywork, Ziya, OpenBuddy",
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
        models="ChatGLM-6B",
    ),
    "chatglm2": replace(_CHATGLM, models="ChatGLM2-6B, -32k"),
    "chatglm3": replace(_CHATGLM, models="ChatGLM3-6B, -32k, -128k"),
    "chatglm4": replace(_CHATGLM, ids_from="tiktoken", models="GLM-4-9B (`chatglm`), CodeGeeX4"),
    "qwen": FamilyFacts(
        frozenset({"attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"}),
        ids_from="tiktoken",
        small={"vocab_size": 520},
        models="Qwen 1.8B, 7B, 14B, 72B",
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
        models="Qwen1.5, Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen",
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
        models="ERNIE 4.5 0.3B",
    ),
    "glm4": FamilyFacts(
        frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}),
        known_to_paddlenlp=False,
        groups_heads=True,
        small=_GROUPED,
        curve_learning_rate=5e-3,
        models="GLM-4-9B-hf, GLM-4-0414 9B, 32B",
    ),
    "phi3": FamilyFacts(
        frozenset({"query_key_value_proj", "o_proj", "gate_up_proj", "down_proj"}),
        known_to_paddlenlp=False,
        groups_heads=True,
        small=_GROUPED,
        curve_learning_rate=2e-3,
        models="Phi-3 mini, medium, Phi-3.5 mini, Phi-4",
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
        models="Qwen3 0.6B–32B",
    ),
    "qwen2_moe": replace(
        _EXPERTS,
        curve_learning_rate=2e-3,
        feed_forwards=NUM_TINY_EXPERTS + 1,
        named_as_llama="Qwen2Moe",
        llama_fields=("qkv_bias", "shared_expert_intermediate_size", *EXPERT_FIELDS),
        models="Qwen1.5-MoE, Qwen2-57B-A14B",
    ),
    # Two families with the loss that balances experts, in all layouts; one without.
    "qwen3_moe": replace(
        _EXPERTS,
        smooth_config=_BALANCED,
        named_as_llama="Qwen3Moe",
        llama_fields=("head_dim", *EXPERT_FIELDS),
        models="Qwen3-30B-A3B, -235B-A22B",
    ),
    "mixtral": replace(_EXPERTS, smooth_config=_BALANCED, models="Mixtral 8x7B, 8x22B"),
    "internlm": FamilyFacts(
        _GATED,
        curve_learning_rate=2e-3,
        models="InternLM 7B, 20B",
    ),
    "internlm2": FamilyFacts(
        _JOINED_INPUT,
        known_to_paddlenlp=False,
        groups_heads=True,
        small=_GROUPED,
        curve_learning_rate=2e-3,
        blank_in_front=False,
        models="InternLM 2, 2.5",
    ),
    "baichuan": FamilyFacts(
        _JOINED_INPUT,
        known_to_paddlenlp=False,
        curve_learning_rate=2e-3,
        models="Baichuan 7B, 13B",
    ),
    "baichuan2": FamilyFacts(
        _JOINED_INPUT,
        known_to_paddlenlp=False,
        curve_learning_rate=2e-3,
        rotary_tables=0,
        adds_distances=True,
        blank_in_front=False,
        models="Baichuan 2 7B, 13B",
    ),
    "xverse": FamilyFacts(
        _GATED,
        curve_learning_rate=2e-3,
        named_as_llama="Llama",
        models="XVERSE 7B, 13B, 65B",
    ),
    "bloom": FamilyFacts(
        _FUSED,
        splits_rows=False,
        tied_embedding="word_embeddings",
        curve_learning_rate=1e-2,
        rotary_tables=0,
        adds_distances=True,
        norm_centres=True,
        models="BLOOM, BLOOMZ, SeqGPT",
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
        models="OPT 125M–66B",
    ),
    "gpt2": FamilyFacts(
        frozenset({"query_key_value_proj", "o_proj", "up_proj", "down_proj"}),
        known_to_paddlenlp=False,
        small={"seed": 1},  # one that does not say the same of everything
        tied_embedding="embed_tokens",
        curve_learning_rate=1e-3,
        rotary_tables=0,
        norm_centres=True,
        models="GPT-2, PolyLM",
    ),
    "falcon": FamilyFacts(
        frozenset({"query_key_value_proj", "o_proj", "up_proj", "down_proj"}),
        known_to_paddlenlp=False,
        groups_heads=True,
        small=_GROUPED,
        tied_embedding="embed_tokens",
        curve_learning_rate=1e-3,
        norm_centres=True,
        models="Falcon 7B, 11B, 40B, 180B",
    ),
    "mistral": FamilyFacts(
        _GATED,
        groups_heads=True,
        small=_GROUPED,
        tied_embedding="embed_tokens",
        tied_config={"tie_word_embeddings": True},
        curve_learning_rate=1e-3,
        named_as_llama="Mistral",
        llama_fields=("sliding_window",),
        models="Mistral 7B, Nemo, Small",
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
        models="Gemma 2B, 7B",
    ),
    "gemma2": replace(_NEW_GEMMA, caps_scores=True, models="Gemma 2 2B, 9B, 27B"),
    "gemma3": replace(_NEW_GEMMA, curve_learning_rate=1e-3, models="Gemma 3 1B; 4B–27B (`text_only`)"),
}


def small_options(name: str) -> dict[str, int]:
    """Options of a small model in which heads share keys and values wherever the family can."""
    facts = FACTS[name]
    return facts.small | (_GROUPED if facts.groups_heads else {})


TIED = {name: facts.tied_embedding for name, facts in FACTS.items() if facts.tied_embedding}
"""Embeddings that are the head's matrix too, by family."""
