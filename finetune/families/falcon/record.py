"""Falcon 7B, 11B, 40B and 180B: attention and feed-forward layers side by side, layer norms, grouped keys.

Falcon RW 1B and 7B have them one behind the other, and distances (ALiBi) in place of rotary positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.chat_format import ChatFormat
from finetune.families.falcon.config import DISTANCES, MODEL_TYPES, UNDERSTOOD, adapt_config, published_config
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import TENSOR_SPLITS
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.text_patterns import GPT2_PATTERN
from finetune.families.tiny_recipe import ByteLevelKind, TensorSpec, TinyRecipe, TinyShape

_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")


def _is_first(shape: TinyShape) -> bool:
    return 1 < shape.num_kv_heads == shape.num_heads


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    """The form of 7B with one head of keys and values, that of 40B with more, that of RW 1B with one for each query."""
    is_first = _is_first(shape)
    is_new = shape.num_kv_heads > 1 and not is_first
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_length,
        "new_decoder_architecture": is_new,
        "parallel_attn": not is_first,
        "num_ln_in_parallel_attn": 2 if is_new else 1,
        "bias": is_first,
        "rms_norm_eps": 1e-5,
        DISTANCES: is_first,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    norms = ("ln_attn", "ln_mlp") if shape.num_kv_heads > 1 else ("input_layernorm",)
    norms = _TWO_NORMS if _is_first(shape) else norms
    return _falcon_weights(shape, norms, has_bias=_is_first(shape))


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    shape = TinyShape.of_config(config)
    norms = ("ln_attn", "ln_mlp") if config["num_ln_in_parallel_attn"] == 2 else ("input_layernorm",)
    if not config["parallel_attn"]:
        norms = _TWO_NORMS
    weights = _falcon_weights(shape, norms, has_bias=bool(config["bias"]))
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = TensorSpec((shape.hidden_size, shape.vocab_size))
    return weights


def _falcon_weights(shape: TinyShape, norms: tuple[str, ...], *, has_bias: bool) -> dict[str, TensorSpec]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    keys = 2 * shape.num_kv_heads * hidden // shape.num_heads
    weights = {"falcon.embed_tokens.weight": TensorSpec((shape.vocab_size, hidden))}
    for number in range(shape.num_layers):
        layer = f"falcon.layers.{number}."
        matrices = {
            f"{layer}self_attn.query_key_value_proj": (hidden, hidden + keys),
            f"{layer}self_attn.o_proj": (hidden, hidden),
            f"{layer}mlp.up_proj": (hidden, inner),
            f"{layer}mlp.down_proj": (inner, hidden),
        }
        weights |= {f"{name}.weight": TensorSpec(sizes) for name, sizes in matrices.items()}
        if has_bias:
            weights |= {f"{name}.bias": TensorSpec(sizes[1:], "zeros") for name, sizes in matrices.items()}
        for name in norms:
            weights |= _norm(f"{layer}{name}", hidden)
    return weights | _norm("falcon.norm", hidden)


def _norm(name: str, size: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((size,), "ones"), f"{name}.bias": TensorSpec((size,), "zeros")}


def _memory(config: Mapping[str, Any]) -> LayerMemory:
    """One branch behind the other keeps what stands between them; side by side, what each norm gives."""
    hidden = 1 + config["num_ln_in_parallel_attn"] if config["parallel_attn"] else 4
    return LayerMemory(hidden=hidden, inner=2, norms=0)


FALCON = register(
    Family(
        name="falcon",
        models="Falcon 7B, 11B, 40B, 180B, RW 1B, 7B",
        model_types=MODEL_TYPES,
        architectures=("FalconForCausalLM", "RWForCausalLM"),
        model_class="finetune.families.falcon.layers.FalconForCausalLM",
        base_prefix="falcon",
        lora_target_modules=(".*query_key_value_proj.*", ".*o_proj.*", ".*up_proj.*", ".*down_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        distance_option=DISTANCES,
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            end_of_answer="eos",
            pad_fallback="eos",
            vocab_files=("tokenizer.json",),
            tokenizer_class="finetune.families.json_tokenizer.JsonTokenizer",
            own_class=True,
            opened_by_file=True,
        ),
        chat_template="falcon",
        hugging_face=HuggingFaceForm(
            prefix="transformer",
            pairs=(
                ("word_embeddings", "embed_tokens"),
                ("h.{}.self_attention.query_key_value", "layers.{}.self_attn.query_key_value_proj"),
                ("h.{}.self_attention.dense", "layers.{}.self_attn.o_proj"),
                ("h.{}.mlp.dense_h_to_4h", "layers.{}.mlp.up_proj"),
                ("h.{}.mlp.dense_4h_to_h", "layers.{}.mlp.down_proj"),
                *(
                    (f"h.{{}}.{name}", f"layers.{{}}.{name}")
                    for name in ("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp")
                ),
                ("ln_f", "norm"),
            ),
            always_tied=True,
            has_distances=True,
            config=published_config,
        ),
        weights=_weights,
        memory_of=_memory,
        chat_formats={
            "falcon": ChatFormat(
                system="System: {content}\n", user="User: {content}\nFalcon:", answer=" {content}", after="\n"
            )
        },
        tiny=TinyRecipe(
            tokenizer=ByteLevelKind(
                special_tokens=(">>TITLE<<", "<|endoftext|>"),
                roles=dict.fromkeys(("bos", "eos", "pad"), "<|endoftext|>"),
                pattern=GPT2_PATTERN,
                special_first=True,
                one_file=True,
                settings={"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False},
            ),
            config=_tiny_config,
            weights=_tiny_weights,
        ),
        fields=ConfigFields(num_kv_heads="num_key_value_heads"),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        argument_folder="opt",
        adapt_config=adapt_config,
        understood=UNDERSTOOD,
        # The queries of a key head, its key, its value; then the next key head's.
        tensor_splits=TENSOR_SPLITS | {"query_key_value_proj": "columns"},
    )
)
