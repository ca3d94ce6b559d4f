"""InternLM 2 and 2.5: Llama's architecture under other names, with one layer for queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.families.chat_format import CHATML
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import (
    TENSOR_SPLITS,
    gated_decoder_config,
    gated_decoder_weights,
    join_input_layers,
    require_values,
)
from finetune.families.internlm.generations import FIRST, SECOND, names_generation
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import check_head_dim, without_scaling
from finetune.families.tiny_recipe import LLAMA_PIECES, SentencePieceKind, TensorSpec, TinyRecipe, TinyShape

_NAMES = {"<|im_start|>": "[UNUSED_TOKEN_146]", "<|im_end|>": "[UNUSED_TOKEN_145]"}
"""Names that a folder gives to pieces which the vocabulary keeps free."""


def _covers(config: Mapping[str, Any], _folder: Path | None) -> bool:
    return names_generation(config) != FIRST


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Refuses what the layers do not compute.

    "dynamic" scaling stretches positions in texts longer than the model's positions, which are refused: it is kept for
    whoever reads the configuration elsewhere.
    """
    require_values(config, "InternLM2", hidden_act="silu", bias=False)
    check_head_dim(config)
    scaling = config.get("rope_scaling")
    is_dynamic = isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "dynamic"
    if not is_dynamic:
        return without_scaling(config) | {"model_type": "internlm2"}
    plain = {name: value for name, value in config.items() if name != "rope_scaling"}
    return without_scaling(plain) | {"model_type": "internlm2", "rope_scaling": scaling}


def _to_hugging_face(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "bias": False, "architectures": ["InternLM2ForCausalLM"]}


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(
        shape,
        model_type="internlm2",
        architectures=["InternLM2ForCausalLM"],
        bias=False,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        rope_scaling={"type": "dynamic", "factor": 2.0},
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return join_input_layers(gated_decoder_weights(shape, "internlm2"))


INTERNLM2 = register(
    Family(
        name="internlm2",
        models="InternLM 2, 2.5",
        model_types=("internlm2", "internlm"),
        architectures=("InternLM2ForCausalLM",),
        model_class="finetune.families.internlm2.layers.InternLM2ForCausalLM",
        base_prefix="internlm2",
        lora_target_modules=(
            *(".*query_key_value_proj.*", ".*o_proj.*", ".*gate_proj.*", ".*up_proj.*", ".*down_proj.*"),
            ".*gate_up_fused_proj.*",
        ),
        embedding_module="embed_tokens",
        fused_packing="rows",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=("bos",),
            end_of_answer="eos",
            pad_fallback="eos",
            chat_ends=("<|im_end|>",),
            vocab_files=("tokenizer.model",),
            tokenizer_class="finetune.families.internlm2.tokenizer.InternLM2Tokenizer",
            own_class=True,
            reads_add_bos=True,
        ),
        chat_template="internlm2",
        hugging_face=HuggingFaceForm(
            head="output",
            pairs=(
                ("tok_embeddings", "embed_tokens"),
                ("layers.{}.attention.wqkv", "layers.{}.self_attn.query_key_value_proj"),
                ("layers.{}.attention.wo", "layers.{}.self_attn.o_proj"),
                ("layers.{}.feed_forward.w1", "layers.{}.mlp.gate_proj"),
                ("layers.{}.feed_forward.w3", "layers.{}.mlp.up_proj"),
                ("layers.{}.feed_forward.w2", "layers.{}.mlp.down_proj"),
                ("layers.{}.attention_norm", "layers.{}.input_layernorm"),
                ("layers.{}.ffn_norm", "layers.{}.post_attention_layernorm"),
            ),
            config=_to_hugging_face,
            needs_files="configuration_internlm2.py and modeling_internlm2.py of the published InternLM2",
        ),
        chat_formats={"internlm2": CHATML},
        tiny=TinyRecipe(
            tokenizer=SentencePieceKind(
                pieces={
                    **LLAMA_PIECES,
                    "user_defined_symbols": list(_NAMES.values()),
                    "add_dummy_prefix": False,
                },
                tokenizer_class="InternLM2Tokenizer",
                names=_NAMES,
            ),
            config=_tiny_config,
            weights=_tiny_weights,
        ),
        fields=ConfigFields(num_kv_heads="num_key_value_heads"),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        argument_folder="llama",
        adapt_config=_adapt_config,
        understood=("bias", "rope_scaling"),
        # Worked out anew; files of converted models hold them.
        computed_weights=(r"rotary_emb\.inv_freq$",),
        covers=_covers,
        told_by=f"architectures or auto_map name {SECOND}...",
        # The queries of a key head, its key, its value; then the next key head's.
        tensor_splits=TENSOR_SPLITS | {"query_key_value_proj": "columns"},
    )
)
