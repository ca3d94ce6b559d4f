"""Phi-3 and Phi-4: Llama's architecture with joined layers, up to the context of their pretraining."""

from __future__ import annotations

from typing import Any

from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import (
    JOINED_SPLITS,
    gated_decoder_config,
    joined_decoder_weights,
    require_values,
    with_padding_field,
)
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.phi3.chat_formats import CHAT_FORMATS
from finetune.families.rotary_config import ANY_LENGTH, TEXT_POSITIONS, check_head_dim, with_scaling
from finetune.families.tiny_recipe import SentencePieceKind, TensorSpec, TinyRecipe, TinyShape

_PUBLISHED = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_ROTARY_BASE = 10000.0
"""What transformers takes for fields that a config.json leaves out; the base may stand in several places."""


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Refuses what the layers do not compute."""
    adapted = with_scaling(_PUBLISHED | config, kinds=(*ANY_LENGTH, "longrope"), may_turn_parts=True)
    check_head_dim(config)
    require_values(config, "Phi-3", attention_bias=False, hidden_act="silu", resid_pdrop=0.0, embd_pdrop=0.0)
    positions = {TEXT_POSITIONS: adapted.get(TEXT_POSITIONS) or adapted.get("max_position_embeddings")}
    return {
        "rope_theta": _ROTARY_BASE,
        **adapted,
        **positions,
        "sliding_window": config.get("sliding_window"),
    }


def _to_hugging_face(config: dict[str, Any]) -> dict[str, Any]:
    """Transformers' class takes three settings of a scaling, under the name that they had at first."""
    theirs = with_padding_field({name: value for name, value in config.items() if name != TEXT_POSITIONS})
    if scaling := theirs.get("rope_scaling"):
        names = {"type": scaling["rope_type"], "short_factor": None, "long_factor": None}
        theirs["rope_scaling"] = {name: value or scaling[name] for name, value in names.items()}
    return theirs


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(
        shape,
        model_type="phi3",
        architectures=["Phi3ForCausalLM"],
        rms_norm_eps=1e-5,
        sliding_window=None,
        attention_bias=False,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return joined_decoder_weights(shape, "phi3")


PHI3 = register(
    Family(
        name="phi3",
        models="Phi-3 mini, medium, Phi-3.5 mini, Phi-4",
        model_types=("phi3",),
        architectures=("Phi3ForCausalLM",),
        model_class="finetune.families.phi3.layers.Phi3ForCausalLM",
        base_prefix="phi3",
        lora_target_modules=(".*query_key_value_proj.*", ".*o_proj.*", ".*gate_up_proj.*", ".*down_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        window_option="sliding_window",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            end_of_answer="eos",
            pad_fallback="eos",
            chat_ends=("<|end|>", "<|im_end|>"),
            vocab_files=("sentencepiece.bpe.model", "tokenizer.model"),
            tokenizer_class="paddlenlp.transformers.LlamaTokenizer",
            reads_add_bos=True,
        ),
        chat_template={"<|im_sep|>": "phi4", "<|tool_call|>": "phi4_mini", "<|assistant|>": "phi3"},
        hugging_face=HuggingFaceForm(
            pairs=(("layers.{}.self_attn.qkv_proj", "layers.{}.self_attn.query_key_value_proj"),),
            config=_to_hugging_face,
        ),
        chat_formats=CHAT_FORMATS,
        tiny=TinyRecipe(tokenizer=SentencePieceKind(), config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", max_positions=TEXT_POSITIONS),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        argument_folder="llama",
        adapt_config=_adapt_config,
        understood=(
            "embd_pdrop",
            "head_dim",
            "partial_rotary_factor",
            "resid_pdrop",
            "rope_parameters",
            "rope_scaling",
        ),
        tensor_splits=JOINED_SPLITS,
    )
)
