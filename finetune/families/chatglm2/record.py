"""ChatGLM2-6B and ChatGLM3-6B (PaddleNLP's chatglm_v2): one architecture, multi-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.tiny_recipe import TensorSpec, TinyRecipe, TinyShape

# Hugging Face's field -> PaddleNLP's.
_RENAMED = {
    "num_layers": "num_hidden_layers",
    "padded_vocab_size": "vocab_size",
    "seq_length": "max_sequence_length",
}
# What PaddleNLP's model is built for; other values would be ignored and give other logits.
_FIXED: dict[str, tuple[Any, ...]] = {
    "rope_ratio": (1, 1.0),
    "rmsnorm": (True,),
    "original_rope": (True,),
    "post_layer_norm": (True,),
    "interleaved_qkv": (False,),
    "pre_seq_len": (None,),
    "tie_word_embeddings": (False,),
}


def _covers(config: Mapping[str, Any], _folder: Path | None) -> bool:
    """ChatGLM-6B has the same `model_type` in Hugging Face's folders, but another architecture."""
    return "ffn_hidden_size" in config


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's field names -> PaddleNLP's; one key and value head per head where they are not shared."""
    faults = [
        f"config.json has {name} {config[name]!r}, which this stack cannot reproduce; allowed: "
        f"{', '.join(map(repr, allowed))}. Use other weights"
        for name, allowed in _FIXED.items()
        if name in config and config[name] not in allowed
    ]
    if faults:
        raise UserError(faults)
    adapted = {_RENAMED.get(name, name): value for name, value in config.items() if name != "auto_map"}
    if config.get("multi_query_attention") is False:
        adapted["multi_query_group_num"] = adapted["num_attention_heads"]
    # PaddleNLP's name table leaves the output layer out for Hugging Face's "ChatGLMModel".
    return adapted | {
        "model_type": "chatglm_v2",
        "architectures": ["ChatGLMv2ForCausalLM"],
        "tie_word_embeddings": False,
    }


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["ChatGLMv2ForCausalLM"],
        "model_type": "chatglm_v2",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.intermediate_size,
        "kv_channels": shape.hidden_size // shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "multi_query_group_num": shape.num_kv_heads,
        "max_sequence_length": shape.max_length,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "layernorm_epsilon": 1e-5,
        "rmsnorm": True,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    qkv_size = hidden + 2 * hidden // shape.num_heads * shape.num_kv_heads
    weights = {"chatglm_v2.embedding.word_embeddings.weight": TensorSpec((shape.vocab_size, hidden))}
    for layer in range(shape.num_layers):
        prefix = f"chatglm_v2.encoder.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": TensorSpec((hidden,), "ones"),
            prefix + "self_attention.query_key_value.weight": TensorSpec((hidden, qkv_size)),
            # Not zeros, as before pre-training, so that a test that forgets them fails.
            prefix + "self_attention.query_key_value.bias": TensorSpec((qkv_size,)),
            prefix + "self_attention.dense.weight": TensorSpec((hidden, hidden)),
            prefix + "post_attention_layernorm.weight": TensorSpec((hidden,), "ones"),
            # The first half of the columns goes through the activation, the second half is the factor.
            prefix + "mlp.dense_h_to_4h.weight": TensorSpec((hidden, 2 * inner)),
            prefix + "mlp.dense_4h_to_h.weight": TensorSpec((inner, hidden)),
        }
    weights["chatglm_v2.encoder.final_layernorm.weight"] = TensorSpec((hidden,), "ones")
    weights["chatglm_v2.output_layer.weight"] = TensorSpec((hidden, shape.vocab_size))
    return weights


def _hugging_face_config(config: dict[str, Any]) -> dict[str, Any]:
    """PaddleNLP's fields -> Hugging Face's."""
    theirs = {there: here for here, there in _RENAMED.items()}
    renamed = {theirs.get(name, name): value for name, value in config.items()}
    return renamed | {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "multi_query_attention": renamed.get("multi_query_group_num") != renamed.get("num_attention_heads"),
    }


CHATGLM2 = register(
    Family(
        name="chatglm2",
        model_types=("chatglm_v2", "chatglm"),
        architectures=("ChatGLMv2ForCausalLM", "ChatGLMv2ForCausalLMPipe", "ChatGLMModel"),
        model_class="finetune.families.chatglm2.layers.ChatGLMv2ForCausalLM",
        base_prefix="chatglm_v2",
        source_prefix="transformer",
        lora_target_modules=(
            ".*query_key_value.*",
            ".*self_attention.dense.*",
            ".*dense_h_to_4h.*",
            ".*dense_4h_to_h.*",
        ),
        embedding_module="word_embeddings",
        fused_packing="rows",
        entry_modules=("word_embeddings",),
        head_module="output_layer",
        hidden_length_first=True,
        # Past keys and values: (length, batch, groups, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.chatglm_postprocess_past_key_value",
        prefix_needs_cache=True,
        tokenizer=TokenizerFacts(
            prefix=("[gMASK]", "sop"),
            end_of_answer="eos",
            pad_fallback="pad",
            vocab_files=("tokenizer.model",),
            # Folders name "ChatGLMTokenizer", which is that of ChatGLM-6B in PaddleNLP.
            tokenizer_class="finetune.families.chatglm2.tokenizer.ChatGLMv2Tokenizer",
            own_class=True,
        ),
        hugging_face=HuggingFaceForm(
            prefix="transformer",
            tables=("embedding.word_embeddings",),
            config=_hugging_face_config,
            needs_files="configuration_chatglm.py and modeling_chatglm.py of THUDM/chatglm2-6b",
        ),
        tiny=TinyRecipe(
            # Half of a head is rotated, in pairs.
            tokenizer="sentencepiece_chatglm2",
            config=_tiny_config,
            weights=_tiny_weights,
            head_dim_multiple=4,
        ),
        fields=ConfigFields(
            num_kv_heads="multi_query_group_num",
            head_dim="kv_channels",
            max_positions="max_sequence_length",
        ),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "multi_query_group_num", "ffn_hidden_size", "vocab_size")
        ),
        sequence_parallel=True,
        # Rotary inverse frequencies: the model works them out anew in every pass.
        computed_weights=(r"rotary_pos_emb\.inv_freq$",),
        refused_options={
            "recompute_use_reentrant": "Paddle's PyLayer form of recomputation fails on the layers of this model"
        },
        adapt_config=_adapt_config,
        understood=(
            *(*_RENAMED, *_FIXED, "apply_residual_connection_post_layernorm", "multi_query_attention"),
            "hidden_size_per_attention_head",
        ),
        tensor_splits={
            "word_embeddings": "vocabulary",
            "output_layer": "head",
            "query_key_value": "query_key_value",
            r"self_attention\.dense": "rows",
            "dense_h_to_4h": "halves",
            "dense_4h_to_h": "rows",
        },
        covers=_covers,
    )
)
