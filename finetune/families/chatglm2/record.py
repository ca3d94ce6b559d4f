"""ChatGLM2-6B and its model of 32k (PaddleNLP's chatglm_v2): multi-query attention, half of a head turned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.families.chat_format import ChatFormat
from finetune.families.chatglm2.generation import (
    POSITION_DIVISOR,
    UNDERSTOOD,
    adapt_config,
    may_be,
    published_config,
)
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.tiny_recipe import TensorSpec, TinyRecipe, TinyShape


def _covers(config: Mapping[str, Any], folder: Path | None) -> bool:
    return may_be(2, config, folder)


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    return adapt_config(config, 2)


def tiny_config(shape: TinyShape) -> dict[str, Any]:
    """config.json of a tiny checkpoint."""
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


def tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    """Weights of a tiny checkpoint."""
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
    return published_config(config, "chatglm2-6b-32k" if POSITION_DIVISOR in config else "chatglm2-6b")


CHATGLM2 = register(
    Family(
        name="chatglm2",
        models="ChatGLM2-6B, -32k",
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
        chat_template="chatglm2",
        hugging_face=HuggingFaceForm(
            prefix="transformer",
            tables=("embedding.word_embeddings",),
            config=_hugging_face_config,
            needs_files="configuration_chatglm.py and modeling_chatglm.py of THUDM/chatglm2-6b (with a rope_ratio other than 1: of "
            "-32k)",
        ),
        memory=LayerMemory(hidden=7, key_value=1, inner=4),
        chat_formats={
            "chatglm2": ChatFormat(
                system="{content}\n\n",
                user="[Round {round}]\n\n问：{content}\n\n答：",
                after="\n\n",
            )
        },
        tiny=TinyRecipe(
            # Half of a head is rotated, in pairs.
            tokenizer="sentencepiece_chatglm2",
            config=tiny_config,
            weights=tiny_weights,
            head_dim_multiple=4,
        ),
        fields=ConfigFields(
            num_kv_heads="multi_query_group_num",
            head_dim="kv_channels",
            inner_size="ffn_hidden_size",
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
        understood=UNDERSTOOD,
        tensor_splits={
            "word_embeddings": "vocabulary",
            "output_layer": "head",
            "query_key_value": "query_key_value",
            r"self_attention\.dense": "rows",
            "dense_h_to_4h": "halves",
            "dense_4h_to_h": "rows",
        },
        covers=_covers,
        told_by="_name_or_path chatglm2..., or a tokenization_chatglm.py without <|user|>",
    )
)
