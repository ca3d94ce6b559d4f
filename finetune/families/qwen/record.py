"""Qwen (v1): Qwen-1.8B, -7B, -14B, -72B and their chat versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import require_values
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.qwen.chat_formats import QWEN_FORMAT
from finetune.families.tiny_recipe import TensorSpec, TinyRecipe, TinyShape


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Refuses sizes that PaddleNLP's attention has no place for, and an output layer that is the embedding."""
    require_values(config, "Qwen", tie_word_embeddings=False)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    kv_channels = config.get("kv_channels")
    if config.get("rotary_pct", 1.0) != 1.0:
        raise UserError(
            f"config.json has rotary_pct {config['rotary_pct']}, but PaddleNLP's Qwen rotates all of a head: "
            "these weights cannot be used"
        )
    if heads and hidden and kv_channels and heads * kv_channels != hidden:
        raise UserError(
            f"config.json has kv_channels {kv_channels} with {heads} heads, but PaddleNLP's Qwen needs "
            f"hidden_size / heads = {hidden // heads}: these weights cannot be used"
        )
    return {name: value for name, value in config.items() if name != "auto_map"}


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["QWenForCausalLM"],
        "model_type": "qwen",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        # Both halves of the gated layer together.
        "intermediate_size": 2 * shape.intermediate_size,
        "kv_channels": shape.hidden_size // shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "max_position_embeddings": shape.max_length,
        "seq_length": shape.max_length,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-6,
        "no_bias": True,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    weights = {"qwen.wte.weight": TensorSpec((shape.vocab_size, hidden))}
    for layer in range(shape.num_layers):
        prefix = f"qwen.h.{layer}."
        weights |= {
            prefix + "ln_1.weight": TensorSpec((hidden,), "ones"),
            prefix + "attn.c_attn.weight": TensorSpec((hidden, 3 * hidden)),
            # Not zeros, as before pre-training, so that a test that forgets them fails.
            prefix + "attn.c_attn.bias": TensorSpec((3 * hidden,)),
            prefix + "attn.c_proj.weight": TensorSpec((hidden, hidden)),
            prefix + "ln_2.weight": TensorSpec((hidden,), "ones"),
            prefix + "mlp.w1.weight": TensorSpec((hidden, inner)),
            prefix + "mlp.w2.weight": TensorSpec((hidden, inner)),
            prefix + "mlp.c_proj.weight": TensorSpec((inner, hidden)),
        }
    weights["qwen.ln_f.weight"] = TensorSpec((hidden,), "ones")
    weights["lm_head.weight"] = TensorSpec((hidden, shape.vocab_size))
    return weights


def _hugging_face_config(config: dict[str, Any]) -> dict[str, Any]:
    """PaddleNLP's fields -> Hugging Face's, which differ in the name of the class."""
    return config | {"architectures": ["QWenLMHeadModel"]}


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    shape = TinyShape(
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]) // 2,
        num_layers=int(config["num_hidden_layers"]),
        num_heads=int(config["num_attention_heads"]),
        num_kv_heads=int(config["num_attention_heads"]),
        vocab_size=int(config["vocab_size"]),
        max_length=0,
    )
    weights = _tiny_weights(shape)
    if not config.get("no_bias", True):
        of_layers = [
            name for name in weights if name.endswith((".c_proj.weight", ".w1.weight", ".w2.weight"))
        ]
        for name in of_layers:
            weights[f"{name.removesuffix('.weight')}.bias"] = TensorSpec(weights[name].shape[1:])
    return weights


QWEN = register(
    Family(
        name="qwen",
        models="Qwen 1.8B, 7B, 14B, 72B",
        model_types=("qwen",),
        architectures=("QWenForCausalLM", "QWenForCausalLMPipe", "QWenLMHeadModel"),
        model_class="finetune.families.qwen.layers.QWenForCausalLM",
        base_prefix="qwen",
        lora_target_modules=(
            r".*attn\.c_attn.*",
            r".*attn\.c_proj.*",
            r".*mlp\.w1.*",
            r".*mlp\.w2.*",
            r".*mlp\.c_proj.*",
            ".*gate_up_fused_proj.*",
        ),
        embedding_module="wte",
        fused_packing="rows",
        entry_modules=("wte",),
        # Past keys and values: (batch, length, heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.qwen_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            end_of_answer="<|endoftext|>",
            pad_fallback="<|endoftext|>",
            chat_ends=("<|im_end|>",),
            vocab_files=("qwen.tiktoken",),
            tokenizer_class="paddlenlp.transformers.QWenTokenizer",
        ),
        chat_template="qwen",
        hugging_face=HuggingFaceForm(
            prefix="transformer",
            tables=("wte",),
            config=_hugging_face_config,
            needs_files="configuration_qwen.py and modeling_qwen.py of the published Qwen",
        ),
        weights=_weights,
        memory=LayerMemory(query=8.5),
        chat_formats={"qwen": QWEN_FORMAT},
        tiny=TinyRecipe(
            tokenizer="tiktoken", config=_tiny_config, weights=_tiny_weights, grouped_heads=False
        ),
        fields=ConfigFields(head_dim="kv_channels", inner_parts=2),
        positions_end=False,
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "vocab_size"),
            # The config counts w1 and w2 together.
            tensor_divides_half=("intermediate_size",),
        ),
        sequence_parallel=True,
        refused_options={"fuse_attention_ffn": "PaddleNLP has no rule that joins the weights w1 and w2"},
        computed_weights=(r"rotary_emb\.inv_freq$",),
        adapt_config=_adapt_config,
        understood=("attn_dropout_prob", "emb_dropout_prob", "scale_attn_weights", "use_logn_attn"),
        tensor_splits={
            "wte": "vocabulary",
            "lm_head": "head",
            r"attn\.c_attn": "query_key_value",
            r"attn\.c_proj": "rows",
            r"mlp\.w[12]": "columns",
            r"mlp\.c_proj": "rows",
        },
    )
)
