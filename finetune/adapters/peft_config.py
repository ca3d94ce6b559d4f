"""peft's `adapter_config.json`: what of it is understood, and what would make another model of an adapter.

A field either says how an adapter was made (any value will do), or its rank and factor (read), or changes what the
adapter computes. Fields of the last kind, and those that nobody here knows, must be off; otherwise an adapter would
be used as something that it is not. The fields are those of peft 0.1 to 0.18.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.adapters.scaling import ScalingRule
from finetune.adapters.update_tensors import LOKR, LORA, VERA
from finetune.errors import UserError

SEQUENCE_CLASSIFICATION = "SEQ_CLS"
"""What peft calls the task of a reward model."""
PEFT_CONFIG = "adapter_config.json"

_HOW_IT_WAS_MADE = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_core", "merge_weights",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
))  # fmt: skip
"""Read elsewhere, told by the weights themselves, or without a part in what the trained adapter computes."""

_HOW_VERA_WAS_MADE = _HOW_IT_WAS_MADE | frozenset((
    "d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout",
))  # fmt: skip
_HOW_LOKR_WAS_MADE = _HOW_IT_WAS_MADE | frozenset((
    "alpha", "decompose_both", "decompose_factor", "init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale",
    "use_effective_conv2d",
))  # fmt: skip

_WHAT_IT_CHANGES = {
    "alora_invocation_tokens": "it works from the invocation tokens on only (activated LoRA)",
    "arrow_config": "it chooses among several adapters for every token (Arrow)",
    "enable_lora": "its updates cover parts of a layer",
    "layer_replication": "its base has layers more than once",
    "lora_bias": "its updates have biases of their own",
    "megatron_config": "it belongs to a model of Megatron's",
    "target_parameters": "it updates parameters outside linear layers",
    "trainable_token_indices": "it replaces embeddings of single tokens",
    "use_bdlora": "its matrices are block-diagonal (BD-LoRA)",
    "use_qalora": "its inputs are averaged in groups (QA-LoRA)",
}
_NOT_MERGED = ("alora_invocation_tokens", "arrow_config")
"""What no merge can take up, peft's neither."""
_TYPES = {
    "ADALORA": "an AdaLoRA adapter",
    "ADAPTION_PROMPT": "a LLaMA-Adapter",
    "IA3": "an IA3 adapter",
    "P_TUNING": "a prompt of P-tuning",
    "PREFIX_TUNING": "a prefix of peft",
    "PROMPT_TUNING": "a prompt of prompt tuning",
}
_UNCHANGED_BASE = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal")
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KINDS = {"LORA": LORA, "VERA": VERA, "LOKR": LOKR}
_USE_PEFT = "Use it with peft"
_REMEDY = "Merge it with peft's merge_and_unload, and use the merged model"


_KNOWN_FIELDS = {LORA: _HOW_IT_WAS_MADE, VERA: _HOW_VERA_WAS_MADE, LOKR: _HOW_LOKR_WAS_MADE}


def _kind(config: Mapping[str, Any]) -> str:
    return _KINDS[config.get("peft_type") or "LORA"]


def check_peft_type(folder: Path, config: Mapping[str, Any]) -> None:
    """Names an adapter that is none of LoRA and its relatives for what it is.

    Raises:
        UserError: It is of another type.
    """
    kind = config.get("peft_type")
    if kind in (None, *_KINDS):
        return
    what = _TYPES.get(str(kind), f"an adapter of type {kind}")
    raise UserError(
        f"{folder / PEFT_CONFIG} has peft_type {kind!r}: it is {what}, and only LoRA, VeRA and LoKr are read here. Use it with peft, "
        "or train with --lora true or --prefix_tuning true"
    )


def read_peft_rule(folder: Path, config: Mapping[str, Any]) -> ScalingRule:
    """Kind of the updates of an adapter, and their ranks and factors.

    Args:
        folder: Of the adapter, for messages.
        config: Content of its configuration file.

    Raises:
        UserError: It is no LoRA, computes something else than a low-rank update, or belongs to a changed base.
    """
    check_peft_type(folder, config)
    path = folder / PEFT_CONFIG
    if faults := [*_changes(config), *_base_faults(config)]:
        raise UserError(f"{path} has {'; '.join(faults)}")
    kind = _kind(config)
    if kind == VERA:
        return _vera_rule(path, config)
    if kind == LOKR and not isinstance(factor := config.get("decompose_factor", -1), int):
        raise UserError(
            f"{path} has decompose_factor {factor!r}, but a whole number is needed: copy it again"
        )
    alpha = "alpha" if kind == LOKR else "lora_alpha"
    return ScalingRule(
        int(_positive(path, "r", config.get("r"))),
        _number(path, alpha, config.get(alpha)),
        bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        kind=kind,
        rank_pattern={
            name: int(_positive(path, f"rank_pattern {name!r}", value))
            for name, value in _pattern(path, "rank_pattern", config).items()
        },
        alpha_pattern={
            name: _number(path, f"alpha_pattern {name!r}", value)
            for name, value in _pattern(path, "alpha_pattern", config).items()
        },
    )


def _vera_rule(path: Path, config: Mapping[str, Any]) -> ScalingRule:
    rank = int(_positive(path, "r", config.get("r")))
    key = config.get("projection_prng_key", 0)
    if isinstance(key, bool) or not isinstance(key, int):
        raise UserError(
            f"{path} has projection_prng_key {key!r}, but a whole number is needed: copy it again"
        )
    return ScalingRule(rank, float(rank), kind=VERA)


def _changes(config: Mapping[str, Any]) -> list[str]:
    """Fields that are on and change what is computed, or that nobody here knows."""
    faults = []
    for name, value in config.items():
        if name in _KNOWN_FIELDS[_kind(config)] or not value:
            continue
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        why = _WHAT_IT_CHANGES.get(name, "which this release does not know")
        remedy = _USE_PEFT if name in _NOT_MERGED else _REMEDY
        faults.append(f"{name} {shown}: {why}, so it is more than a low-rank update. {remedy}")
    return faults


def _base_faults(config: Mapping[str, Any]) -> list[str]:
    initial = config.get("init_lora_weights")
    word = initial.lower() if isinstance(initial, str) else initial
    if word in _UNCHANGED_BASE:
        return []
    if isinstance(word, str) and word.startswith(_CHANGED_BASE):
        return [
            f"init_lora_weights {initial!r}: its base was changed before training. Save it from peft with "
            "path_initial_model_for_weight_conversion, which makes it an adapter of the unchanged base"
        ]
    return [
        f"init_lora_weights {initial!r}, which this release does not know: its base may have been changed. {_REMEDY}"
    ]


def _pattern(path: Path, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{path} has {name} {found!r}, but names with numbers are needed: copy it again")
    return found


def _number(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{path} has {name} {value!r}, but a number is needed: copy it again")
    return float(value)


def _positive(path: Path, name: str, value: Any) -> float:
    number = _number(path, name, value)
    if number < 1 or number != int(number):
        raise UserError(f"{path} has {name} {value!r}, but a whole number above 0 is needed: copy it again")
    return number
