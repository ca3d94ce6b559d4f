"""Llama 1, 2 and 3, with grouped-query attention, and what shares its architecture: Yi, Skywork, Ziya, OpenBuddy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError
from finetune.families.family import ConfigFields, Family, TokenizerFacts, register
from finetune.families.gated_decoder import (
    LINEAR_LAYERS,
    TENSOR_SPLITS,
    gated_decoder_config,
    gated_decoder_weights,
    require_values,
    sized_decoder_weights,
)
from finetune.families.gguf_form import GgufForm
from finetune.families.layer_memory import LayerMemory
from finetune.families.llama.chat_formats import CHAT_FORMATS
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import kind_of_scaling, split_rotary, with_scaling
from finetune.families.tiny_recipe import SentencePieceKind, TensorSpec, TinyRecipe, TinyShape

_LINEAR_SCALING = ("linear",)
_OWN_SCALING = ("yarn", "dynamic")


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Moves rotary settings to where PaddleNLP's LlamaConfig reads them.

    Newer Hugging Face folders keep `rope_theta` and the scaling inside `rope_parameters`, older ones
    keep the scaling in `rope_scaling`. PaddleNLP reads a top-level `rope_theta`, the Llama 3 scaling
    from `rope_scaling`, and linear scaling from two fields of its own; what it does not find there it
    silently replaces by its default. Its feed-forward layer is SwiGLU whatever `hidden_act` says. Skywork's folders have
    names of their own for the same model.
    """
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(
            f"config.json has hidden_act {activation!r}, but PaddleNLP's Llama computes silu only. Use other weights"
        )
    if _variant(config):
        require_values(
            config, "a Llama with biases, a head_dim of its own or such rotary scaling", alibi=False
        )
        return with_scaling(config)
    kind, (adapted, rope) = kind_of_scaling(config), split_rotary(config)
    if config.get("model_type") == "skywork":
        adapted |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if kind == "llama3":
        adapted["rope_scaling"] = {**rope, "rope_type": "llama3"}
    elif kind in _LINEAR_SCALING:
        adapted["rope_scaling_type"] = "linear"
        adapted["rope_scaling_factor"] = rope["factor"]
    elif kind is not None:
        raise UserError(
            f"config.json asks for rotary scaling {kind!r}, which this stack cannot reproduce; allowed: "
            "none, linear, dynamic, llama3, yarn. Use weights without that scaling"
        )
    return adapted


def _variant(config: Mapping[str, Any]) -> str | None:
    """The class for what PaddleNLP's Llama has not: biases, heads of a size of their own, further scalings."""
    head_dim, num_heads, hidden = (
        config.get(name) for name in ("head_dim", "num_attention_heads", "hidden_size")
    )
    wide = bool(head_dim and num_heads and hidden and head_dim * num_heads != hidden)
    is_own = wide or config.get("attention_bias") or config.get("mlp_bias")
    is_own = is_own or kind_of_scaling(dict(config)) in _OWN_SCALING
    return "finetune.families.llama.own_layers.LlamaForCausalLM" if is_own else None


_LEFT_OUT = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
}
"""What transformers takes for fields that the configuration of a larger model leaves out of its text part."""


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(shape, model_type="llama", architectures=["LlamaForCausalLM"])


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return gated_decoder_weights(shape, "llama")


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    bias = bool(config.get("attention_bias"))
    inner_bias = bool(config.get("mlp_bias"))
    return sized_decoder_weights(config, "llama", qkv_bias=bias, output_bias=bias, inner_bias=inner_bias)


LLAMA = register(
    Family(
        name="llama",
        models="Llama 1–3.3, DeepSeek-R1-Distill-Llama, Yi, Skywork, Ziya, OpenBuddy",
        model_types=("llama", "skywork"),
        architectures=("LlamaForCausalLM", "LlamaForCausalLMPipe", "SkyworkForCausalLM"),
        model_class="finetune.families.llama.layers.LlamaForCausalLM",
        base_prefix="llama",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        distance_option="alibi",
        cpu_layers="finetune.families.llama.cpu_layers.install_llama",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=("bos",),
            end_of_answer="eos",
            pad_fallback="eos",
            chat_ends=("<|eot_id|>", "<|im_end|>"),  # of Llama 3 and of Yi
            vocab_files=("sentencepiece.bpe.model", "tokenizer.model"),
            tokenizer_class="paddlenlp.transformers.LlamaTokenizer",
            reads_add_bos=True,
        ),
        weights=_weights,
        memory=LayerMemory(
            query=6.7,
            key_value=1.9,
            tables=2,
            cpu=LayerMemory(hidden=4, query=6, key_value=2, inner=4, tables=2),
        ),
        chat_template={
            "<｜Assistant｜>": "deepseek_r1",
            "<|start_header_id|>": "llama3",
            "<|im_start|>": "yi",
        },
        chat_formats=CHAT_FORMATS,
        tiny=TinyRecipe(tokenizer=SentencePieceKind(), config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", head_dim="head_dim"),
        # Embeddings are kept whole on every rank when the degree does not divide the vocabulary: no limit.
        # PaddleNLP would do the same with key and value heads, but then each rank's gradients, those of the
        # layer's input among them, are of its own heads only, and nothing adds them up.
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        adapt_config=_adapt_config,
        understood=("alibi", "attention_bias", "head_dim", "mlp_bias", "rope_parameters", "rope_scaling"),
        variants=_variant,
        gguf=GgufForm("llama", interleaved=True),
        left_out=_LEFT_OUT,
        tensor_splits=TENSOR_SPLITS,
    )
)
