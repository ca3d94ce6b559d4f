"""Which fields of a config.json a family understands, and the refusal of those that it does not.

A field that nobody reads may be one that changes what the model computes: Granite says in four numbers what its Llama
multiplies, and a reader of Llama's that leaves them out loads every weight and writes nonsense. So a field passes if

- the family's record reads it: it is in the tiny configuration, in `Family.fields` or in `Family.understood`;
- it says nothing of what is computed: a token's number, a kernel, a setting of generation, how it was trained (below);
- it has a value by which it asks for nothing: null, false, an empty one, or the neutral one of a factor (below).

Of the others, those whose names tell of a part of the computation (a factor, a norm, a bias, heads, experts, positions
...) are refused by name. The rest are told in a warning: tools write notes of their own into config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.families.family import Family
from finetune.families.tiny_recipe import TinyShape

_HARMLESS_NAMES = """
    architectures auto_map base_model_name_or_path license language model_type tokenizer_class tokenizer_type
    chat_format chat_template name revision is_composition transformers_version paddlenlp_version adapters finetuning_task task problem_type
    task_specific_params id2label label2id num_labels num_choices classifier_dropout
    dtype torch_dtype bf16 fp16 fp32 use_bfloat16 torchscript tf_legacy_loss onnx_safe return_dict
    return_dict_in_generate use_return_dict use_cache cache_implementation use_cache_kernel use_cache_quantization
    attn_implementation use_flash_attn flash_attention use_flash_attention use_sdpa softmax_in_fp32
    attention_softmax_in_fp32 fp32_residual_connection apply_query_key_layer_scaling masked_softmax_fusion
    bias_dropout_fusion skip_bias_add skip_bias_add_qkv slow_but_exact bias_activation_fuse fuse_rms_norm
    pretraining_tp mp_degree gradient_checkpointing use_reentrant initializer_range init_std initializer_factor layerdrop
    pruned_heads prune_heads is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder chunk_size_feed_forward immediate_clear_past_key_value type_vocab_size
    z_loss_weight router_aux_loss_coef output_router_logits remove_invalid_values
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
    exponential_decay_length_penalty prefix eos_token bos_token pad_token unk_token sep_token
    seq_length max_seq_len max_sequence_length model_max_length max_window_layers sliding_window sliding_window_size
    quantization_config dpo_config refined_recompute no_recompute_layers offload_recompute_inputs
    pp_recompute_interval recompute recompute_granularity recompute_use_reentrant text_positions
    rope_scaling_factor rope_scaling_type original_max_position_embeddings compression_ratio
"""
"""Names of fields that say nothing of what a family computes, or that mean something only beside another field."""

_HARMLESS = frozenset(_HARMLESS_NAMES.split())
_HARMLESS_KINDS = re.compile(
    r"^(_|unsloth_|output_|summary_|use_fused_|fuse_|long_sequence_|use_long_sequence_|tensor_parallel_|pipeline_parallel_|"
    r"virtual_pp_|sequence_parallel|sep_parallel_|context_parallel_|quantization_config_)"
    r"|(dropout|dropout_prob|_pdrop|_token_ids?)$|^(use_last_token|use_flash_attention)_for_generation$"
)

_CLASS_DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_window_layers": 28,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "seq_length": 32768,
    "sliding_window": 4096,
    "text_positions": None,
    "use_sliding_window": False,
}
"""What the class of our decoders writes into config.json, whether a family has such a field or not."""

_OF_COMPUTATION = re.compile(
    r"norm|bias|scal|multipl|cap(ping)?$|clip|expert|moe|rope|rotary|yarn|alibi|ntk|window|sliding|residual|head|attn|"
    r"attention|layer|rank|qk|qkv|act(ivation)?(_|$)|position|mlp|ffn|emb|logit|conv|ssm|mamba|rout(er|ing)|parallel|"
    r"pattern|dim|depth|theta|gate|tie_|block|size|state|kernel|vision|visual|image|audio|causal|swa|mup|mtp|recurr|lambda"
)
"""Words in the names of fields that say what a model computes."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # Granite, MiniCPM, Cohere: factors.
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    # Rotary positions.
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rotary_percent": (1,),
    "rope_ratio": (1,),
    "position_embedding_type": ("rope",),
    "position_embedding": ("rope", "ROPE"),
    # Experts: one that every token takes is none.
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "n_shared_experts": (0,),
    "moe_num_experts": (0,),
    "router_jitter_noise": (0,),
    # Phi-4: written, and read by nobody.
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
}
"""Field -> values by which it changes nothing, beside null, false and empty ones."""

_ANY_SHAPE = TinyShape(
    hidden_size=8,
    intermediate_size=16,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    vocab_size=8,
    max_length=8,
)


def unknown_fields(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    """What a config.json asks of the computation that the family does not read, one message for each field.

    Args:
        config: As found.
        family: The record that covers it.
    """
    for name, value in _not_understood(config, family):
        if _OF_COMPUTATION.search(name.lower()):
            yield (
                f"config.json has {name} {_show(value)}, which family {family.name} does not read: a model that needs it "
                f"would be computed wrongly. Use other weights, or delete {name} from config.json if it changes nothing"
            )


def unread_fields(config: Mapping[str, Any], family: Family) -> list[str]:
    """A warning for each other field that nobody reads; arguments as above."""
    return [
        f"warning: config.json has {name} {_show(value)}, which nothing here reads: it is taken to have no effect"
        for name, value in _not_understood(config, family)
        if not _OF_COMPUTATION.search(name.lower())
    ]


def read_fields(family: Family) -> set[str]:
    """Names of the fields that a family's record reads or has in its tiny configuration."""
    return {*family.tiny.config(_ANY_SHAPE), *vars(family.fields).values(), *family.understood}


def without_class_defaults(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Without fields that the family does not have and that say nothing: what the class of our decoders leaves in it."""
    read, heads = read_fields(family), config.get("num_attention_heads")
    defaults = _CLASS_DEFAULTS | {"num_key_value_heads": heads}
    if heads and config.get("hidden_size"):
        defaults["head_dim"] = config["hidden_size"] // heads
    if family.fields.head_dim is None and "head_dim" not in family.tiny.config(_ANY_SHAPE):
        read.discard("head_dim")  # understood where it says nothing, but no published file has it
    return {
        name: value
        for name, value in config.items()
        if name in read or name not in defaults or value != defaults[name]
    }


def _not_understood(config: Mapping[str, Any], family: Family) -> Iterator[tuple[str, Any]]:
    understood = read_fields(family)
    for name, value in config.items():
        is_harmless = name in understood or name in _HARMLESS or _HARMLESS_KINDS.search(name)
        if not is_harmless and not _asks_nothing(name, value, config):
            yield name, value


def _asks_nothing(name: str, value: Any, config: Mapping[str, Any]) -> bool:
    if name == "is_causal":
        return value is not False
    if value is None or value is False or value in ("", [], {}):
        return True
    if name == "head_dim":
        return bool(value * config.get("num_attention_heads", 0) == config.get("hidden_size"))
    if name == "activation":  # Falcon 3 names its Llama's twice
        return value == "swiglu" and config.get("hidden_act") == "silu"
    if name == "layer_types":
        # Beside a window, transformers' Mistral takes one or the other, by its release and its kernel.
        has_window = config.get("sliding_window") and config.get("use_sliding_window") is not False
        return set(value) <= {"full_attention"} and not has_window
    return not isinstance(value, bool) and value in _NEUTRAL.get(name, ())


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
