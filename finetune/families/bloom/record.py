"""BLOOM: attention biased by distance (ALiBi) instead of positions, tied embeddings."""

from __future__ import annotations

from typing import Any

from finetune.errors import UserError
from finetune.families.chat_format import ChatFormat
from finetune.families.config_checks import check_names_agree, check_norm_epsilon
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gguf_form import GgufForm
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.text_patterns import BLOOM_PATTERN
from finetune.families.tiny_recipe import ByteLevelKind, TensorSpec, TinyRecipe, TinyShape

_OTHER_NAMES = {"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """One name per size: the published configs use three sets of names, PaddleNLP reads one.

    Refuses an output layer of its own, which would silently be replaced by the input embedding.
    """
    if config.get("tie_word_embeddings", True) is not True:
        raise UserError(
            f"config.json has tie_word_embeddings {config['tie_word_embeddings']}, but BLOOM is run with True "
            "only. Use other weights"
        )
    check_norm_epsilon(config, "layer_norm_epsilon")
    check_names_agree(config, _OTHER_NAMES)
    adapted = {key: value for key, value in config.items() if key not in _OTHER_NAMES}
    for other, name in _OTHER_NAMES.items():
        if config.get(other) is not None:
            adapted.setdefault(name, config[other])
    return adapted


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "n_layer": shape.num_layers,
        "n_head": shape.num_heads,
        "seq_length": shape.max_length,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "apply_residual_connection_post_layernorm": False,
        "use_cache": True,
    }


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    hidden = shape.hidden_size
    weights = {
        "bloom.word_embeddings.weight": TensorSpec((shape.vocab_size, hidden)),
        **_norm("bloom.word_embeddings_layernorm", hidden),
    }
    for layer in range(shape.num_layers):
        prefix = f"bloom.h.{layer}."
        weights |= _norm(prefix + "input_layernorm", hidden)
        weights |= _linear(prefix + "self_attention.query_key_value", hidden, 3 * hidden)
        weights |= _linear(prefix + "self_attention.dense", hidden, hidden)
        weights |= _norm(prefix + "post_attention_layernorm", hidden)
        weights |= _linear(prefix + "mlp.dense_h_to_4h", hidden, 4 * hidden)
        weights |= _linear(prefix + "mlp.dense_4h_to_h", 4 * hidden, hidden)
    return weights | _norm("bloom.ln_f", hidden)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((inputs, outputs)), f"{name}.bias": TensorSpec((outputs,), "zeros")}


def _norm(name: str, size: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((size,), "ones"), f"{name}.bias": TensorSpec((size,), "zeros")}


BLOOM = register(
    Family(
        name="bloom",
        models="BLOOM, BLOOMZ, SeqGPT",
        model_types=("bloom",),
        architectures=("BloomForCausalLM",),
        model_class="finetune.families.bloom.layers.BloomForCausalLM",
        base_prefix="bloom",
        lora_target_modules=(
            ".*query_key_value.*",
            ".*self_attention.dense.*",
            ".*dense_h_to_4h.*",
            ".*dense_4h_to_h.*",
        ),
        embedding_module="word_embeddings",
        # Distances are added to the scores, which FlashMask cannot do.
        fused_packing="block",
        entry_modules=("word_embeddings", "word_embeddings_layernorm"),
        # Past keys and values: (batch, length, heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.bloom_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            end_of_answer="</s>",
            pad_fallback="<pad>",
            vocab_files=("tokenizer.json",),
            tokenizer_class="finetune.families.bloom.tokenizer.BloomTokenizer",
            own_class=True,
        ),
        hugging_face=HuggingFaceForm(
            prefix="transformer", bare=True, tables=("word_embeddings",), always_tied=True
        ),
        memory=LayerMemory(hidden=5, inner=8, norms=0),
        chat_formats={
            "seqgpt": ChatFormat(system="{content}\n", user="输入: {content}\n输出: [GEN]", after="\n"),
            "bloomz": ChatFormat(system="{content}\n", user="{content}", answer=" {content}", after="\n"),
        },
        tiny=TinyRecipe(
            tokenizer=ByteLevelKind(
                special_tokens=("<unk>", "<s>", "</s>", "<pad>"),
                roles={"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"},
                pattern=BLOOM_PATTERN,
                special_first=True,
                one_file=True,
                settings={"tokenizer_class": "BloomTokenizerFast", "add_prefix_space": False},
            ),
            config=_tiny_config,
            weights=_tiny_weights,
            grouped_heads=False,
            inner_ratio=4,
        ),
        fields=ConfigFields(
            num_layers="n_layer", num_heads="n_head", inner_size=None, max_positions="seq_length"
        ),
        positions_end=False,
        parallel=ParallelLimits(tensor_divides=("n_head", "vocab_size")),
        adapt_config=_adapt_config,
        understood=(
            *_OTHER_NAMES,
            "apply_residual_connection_post_layernorm",
            "n_inner",
            "offset_alibi",
            "tie_word_embeddings",
        ),
        gguf=GgufForm(
            "bloom",
            epsilon="layer_norm_epsilon",
            is_rms=False,
            has_rotary=False,
            joined_heads=True,
            required={"apply_residual_connection_post_layernorm": False},
        ),
        tensor_splits={
            "word_embeddings": "vocabulary",
            "lm_head": "vocabulary",  # the embedding once more
            # Query, key and value of one head after the other.
            "query_key_value": "columns",
            r"self_attention\.dense": "rows",
            "dense_h_to_4h": "columns",
            "dense_4h_to_h": "rows",
        },
    )
)
