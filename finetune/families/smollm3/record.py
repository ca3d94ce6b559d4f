"""SmolLM3 3B: Llama's layout, of whose layers every fourth knows no positions; a tokenizer.json of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import (
    LINEAR_LAYERS,
    TENSOR_SPLITS,
    gated_decoder_config,
    gated_decoder_weights,
    require_values,
    sized_decoder_weights,
    with_padding_field,
)
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import with_scaling
from finetune.families.text_patterns import LLAMA3_PATTERN
from finetune.families.tiny_recipe import ByteLevelKind, TensorSpec, TinyRecipe, TinyShape

_INTERVAL = "no_rope_layer_interval"
_PUBLISHED = {
    _INTERVAL: 4,
    "attention_bias": False,
    "max_position_embeddings": 32768,
    "mlp_bias": False,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 2000000.0,
    "tie_word_embeddings": True,
}
"""What transformers takes for fields that a config.json leaves out."""


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Brings the rotary base to the top, adds what the file leaves out, layers without positions among it."""
    require_values(config, "SmolLM3", hidden_act="silu", use_sliding_window=False)
    adapted = _PUBLISHED | {name: value for name, value in with_scaling(config).items() if value is not None}
    num_layers = adapted["num_hidden_layers"]
    layers = adapted.setdefault("no_rope_layers", _turned_layers(num_layers, adapted[_INTERVAL]))
    if len(layers) != num_layers:
        raise UserError(
            f"config.json has no_rope_layers of {len(layers)} layers, but num_hidden_layers {num_layers}: copy it again"
        )
    return adapted


def _turned_layers(num_layers: int, interval: int) -> list[int]:
    return [int((number + 1) % interval != 0) for number in range(num_layers)]


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(
        shape,
        model_type="smollm3",
        architectures=["SmolLM3ForCausalLM"],
        attention_bias=False,
        mlp_bias=False,
        no_rope_layer_interval=2,
        no_rope_layers=_turned_layers(shape.num_layers, 2),
        tie_word_embeddings=True,
        use_sliding_window=False,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return gated_decoder_weights(shape, "smollm3", tied=True)


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    has_bias = bool(config["attention_bias"])
    return sized_decoder_weights(
        config, "smollm3", qkv_bias=has_bias, output_bias=has_bias, inner_bias=bool(config["mlp_bias"])
    )


SMOLLM3 = register(
    Family(
        name="smollm3",
        models="SmolLM3 3B",
        model_types=("smollm3",),
        architectures=("SmolLM3ForCausalLM",),
        model_class="finetune.families.smollm3.layers.SmolLM3ForCausalLM",
        base_prefix="smollm3",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            # "<|end_of_text|>" in base models, "<|im_end|>" in the others: the folder says which.
            end_of_answer="eos",
            pad_fallback="eos",
            chat_ends=("<|im_end|>",),
            vocab_files=("tokenizer.json",),
            tokenizer_class="finetune.families.json_tokenizer.JsonTokenizer",
            own_class=True,
            opened_by_file=True,
        ),
        chat_template={"<|im_start|>": "chatml"},
        hugging_face=HuggingFaceForm(config=with_padding_field, always_tied=True),
        weights=_weights,
        tiny=TinyRecipe(
            tokenizer=ByteLevelKind(
                special_tokens=("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
                roles={"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|end_of_text|>"},
                pattern=LLAMA3_PATTERN,
                special_first=False,
                one_file=True,
                settings={"tokenizer_class": "PreTrainedTokenizerFast"},
            ),
            config=_tiny_config,
            weights=_tiny_weights,
        ),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", head_dim="head_dim"),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        argument_folder="llama",
        adapt_config=_adapt_config,
        understood=("rope_parameters", "rope_scaling"),
        tensor_splits=TENSOR_SPLITS,
    )
)
