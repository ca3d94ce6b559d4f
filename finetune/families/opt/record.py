"""OPT: learned positions, ReLU; an output layer that is the embedding, or in PaddleNLP's files may be another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError
from finetune.families.config_checks import check_names_agree
from finetune.families.family import Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.text_patterns import GPT2_PATTERN
from finetune.families.tiny_recipe import ByteLevelKind, TensorSpec, TinyRecipe, TinyShape

_OTHER_NAMES = {
    "ffn_dim": "intermediate_size",
    "do_layer_norm_before": "normalize_before",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "activation_function": "hidden_act",
}
# PaddleNLP's "gelu" is the tanh approximation; the exact function has no name there.
_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
# Variants of the architecture that the layers here do not have, with the one value they do have.
_FIXED = {
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's names -> PaddleNLP's.

    PaddleNLP does not look for most of Hugging Face's names and would silently take its defaults.
    """
    for name, only in _FIXED.items():
        if config.get(name, only) != only:
            raise UserError(
                f"config.json has {name} {config[name]}, but OPT is run with {only} only. Use other weights"
            )
    check_names_agree(config, {name: other for name, other in _OTHER_NAMES.items() if other != "hidden_act"})
    adapted = {key: value for key, value in config.items() if key not in _OTHER_NAMES}
    for other, name in _OTHER_NAMES.items():
        if config.get(other) is not None:
            adapted[name] = config[other]
    activation = config.get("activation_function")
    if activation is not None:
        if activation not in _ACTIVATIONS:
            raise UserError(
                f"config.json has activation_function {activation!r}; allowed for OPT: "
                f"{', '.join(_ACTIVATIONS)}. Use other weights"
            )
        adapted["hidden_act"] = _ACTIVATIONS[activation]
    if adapted.get("word_embed_proj_dim") is None and "hidden_size" in adapted:
        adapted["word_embed_proj_dim"] = adapted["hidden_size"]
    return adapted


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "max_position_embeddings": shape.max_length,
        "word_embed_proj_dim": shape.hidden_size,
        "hidden_act": "relu",
        "normalize_before": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    weights = {
        "opt.embeddings.word_embeddings.weight": TensorSpec((shape.vocab_size, hidden)),
        # The first two rows are never used: see OPTModel.
        "opt.embeddings.position_embeddings.weight": TensorSpec((shape.max_length + 2, hidden)),
    }
    for layer in range(shape.num_layers):
        prefix = f"opt.decoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights |= _linear(f"{prefix}self_attn.{name}", hidden, hidden)
        weights |= _linear(prefix + "linear1", hidden, inner)
        weights |= _linear(prefix + "linear2", inner, hidden)
        weights |= _norm(prefix + "norm1", hidden)
        weights |= _norm(prefix + "norm2", hidden)
    return weights | _norm("opt.decoder.final_layer_norm", hidden)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((inputs, outputs)), f"{name}.bias": TensorSpec((outputs,), "zeros")}


def _norm(name: str, size: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": TensorSpec((size,), "ones"), f"{name}.bias": TensorSpec((size,), "zeros")}


def _hugging_face_config(config: dict[str, Any]) -> dict[str, Any]:
    """PaddleNLP's fields -> Hugging Face's."""
    theirs = {here: there for there, here in _OTHER_NAMES.items()}
    renamed = {theirs.get(name, name): value for name, value in config.items()}
    if renamed.get("activation_function") == "gelu":  # PaddleNLP's is the tanh approximation
        renamed["activation_function"] = "gelu_new"
    return renamed


# Hugging Face's names and PaddleNLP's where they differ.
_NAMES = (
    ("decoder.embed_tokens", "embeddings.word_embeddings"),
    ("decoder.embed_positions", "embeddings.position_embeddings"),
    ("decoder.project_in", "embeddings.project_in"),
    ("decoder.layers.{}.self_attn_layer_norm", "decoder.layers.{}.norm1"),
    ("decoder.layers.{}.final_layer_norm", "decoder.layers.{}.norm2"),
    ("decoder.layers.{}.fc1", "decoder.layers.{}.linear1"),
    ("decoder.layers.{}.fc2", "decoder.layers.{}.linear2"),
)


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Those of the tiny recipe; narrow embeddings (350M) have projections, norms behind the sums no last norm."""
    shape = TinyShape(
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=int(config["num_attention_heads"]),
        num_kv_heads=int(config["num_attention_heads"]),
        vocab_size=int(config["vocab_size"]),
        max_length=int(config["max_position_embeddings"]),
    )
    weights = _tiny_weights(shape)
    narrow = int(config.get("word_embed_proj_dim") or shape.hidden_size)
    table = TensorSpec((shape.vocab_size, narrow))
    weights["opt.embeddings.word_embeddings.weight"] = table
    if narrow != shape.hidden_size:
        weights["opt.embeddings.project_in.weight"] = TensorSpec((narrow, shape.hidden_size))
        weights["opt.decoder.project_out.weight"] = TensorSpec((shape.hidden_size, narrow))
    if not config.get("normalize_before", True):
        weights = {name: each for name, each in weights.items() if "final_layer_norm" not in name}
    if config.get("tie_word_embeddings") is False:
        weights["lm_head.decoder_weight"] = table
    return weights


OPT = register(
    Family(
        name="opt",
        models="OPT 125M–66B",
        model_types=("opt",),
        architectures=("OPTForCausalLM", "OPTForConditionalGeneration"),
        model_class="finetune.families.opt.layers.OPTForCausalLM",
        base_prefix="opt",
        lora_target_modules=(
            ".*q_proj.*",
            ".*k_proj.*",
            ".*v_proj.*",
            ".*out_proj.*",
            ".*linear1.*",
            ".*linear2.*",
        ),
        embedding_module="word_embeddings",
        fused_packing="rows",
        entry_modules=("embeddings",),
        prefix_postprocess="finetune.families.opt.layers.prefix_cache",
        tokenizer=TokenizerFacts(
            # The token that opens a text is also the one that ends it.
            prefix=("</s>",),
            end_of_answer="</s>",
            pad_fallback="<pad>",
            vocab_files=("vocab.json",),
            tokenizer_class="paddlenlp.transformers.GPTTokenizer",
            own_class=True,
        ),
        hugging_face=HuggingFaceForm(
            bare=True,
            pairs=_NAMES,
            tables=("embeddings.word_embeddings", "embeddings.position_embeddings"),
            always_tied=True,
            own_head="lm_head.decoder_weight",
            config=_hugging_face_config,
        ),
        weights=_weights,
        memory=LayerMemory(hidden=4, inner=1, norms=0),
        tiny=TinyRecipe(
            tokenizer=ByteLevelKind(
                special_tokens=("<s>", "<pad>", "</s>", "<unk>"),
                roles={"bos": "</s>", "eos": "</s>", "pad": "<pad>", "unk": "</s>"},
                pattern=GPT2_PATTERN,
                special_first=True,
                one_file=False,
                settings={
                    "tokenizer_class": "GPT2Tokenizer",
                    "add_bos_token": True,
                    "add_prefix_space": False,
                },
            ),
            config=_tiny_config,
            weights=_tiny_weights,
            grouped_heads=False,
        ),
        # The last is the width of the two projections around narrow embeddings (opt-350m).
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "intermediate_size", "vocab_size", "word_embed_proj_dim")
        ),
        adapt_config=_adapt_config,
        understood=(*_OTHER_NAMES, *_FIXED, "tie_word_embeddings"),
        tensor_splits={
            "word_embeddings": "vocabulary",
            "lm_head": "vocabulary",  # the embedding once more, or of its shape
            "project_(in|out)": "columns",
            "[qkv]_proj": "columns",
            # Query, key and value of one head after the other.
            "qkv_proj": "columns",
            "out_proj": "rows",
            "linear1": "columns",
            "linear2": "rows",
        },
    )
)
