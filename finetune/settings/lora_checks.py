"""What the settings of LoRA and its relatives cannot be together with."""

from collections.abc import Iterator, Mapping
from typing import Any

_NEEDS_LORA = ("rslora", "pissa", "use_dora", "lora_use_mixer", "rank_pattern", "alpha_pattern", "lora_dtype")
_OFF_WITH_BOTH: dict[str, Any] = {
    "use_dora": False,
    "lora_use_mixer": False,
    "pissa": False,
    "init_lora_weights": "default",
    "rslora": False,
    "lora_plus_scale": 1.0,
}
"""Setting -> the value with which it asks for nothing."""
_OFF_WITH_VERA: dict[str, Any] = {"rank_pattern": None, "alpha_pattern": None}
_OFF_WITH_LOKR: dict[str, Any] = {"lora_dropout": 0.0}
_MAX_RANK = 65_536


def check_lora(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Faults, each with the names of the settings that it depends on.

    Args:
        values: Resolved values of all settings.
    """
    for name in _NEEDS_LORA:
        if values[name] and not values["lora"]:
            is_true = "is true" if values[name] is True else "is given"
            yield (name, "lora"), f"{name} {is_true}, but lora is false: add --lora true or remove {name}"
    start, pissa = values["init_lora_weights"], values["pissa"]
    for name, is_off in (("lora_bias", "none"), ("init_lora_weights", "default")):
        if values[name] != is_off and not values["lora"]:
            yield (
                (name, "lora"),
                f"{name} is {values[name]}, but lora is false: add --lora true or remove {name}",
            )
    takes_parts = pissa or start.startswith(("pissa", "olora"))
    if pissa and not start.startswith(("default", "pissa")):
        fault = f"pissa is true and init_lora_weights is {start}: choose one"
        yield ("pissa", "init_lora_weights"), fault
    if values["use_dora"] and takes_parts:
        fault = "use_dora is true, but the weights start from parts of the base (pissa, olora): choose one of both"
        yield ("use_dora", "pissa", "init_lora_weights"), fault
    if values["lora_use_mixer"] and (values["use_dora"] or takes_parts):
        fault = (
            "lora_use_mixer is true, which goes with neither use_dora nor pissa or olora: choose one of them"
        )
        yield ("lora_use_mixer", "use_dora", "pissa", "init_lora_weights"), fault
    yield from _check_kinds(values)
    yield from _check_patterns(values)
    yield from _check_type(values)


def _check_kinds(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """VeRA and LoKr have other matrices than LoRA, and little of what belongs to those."""
    if values["vera"] and values["lokr"]:
        yield ("vera", "lokr"), "vera and lokr are both true: choose one"
    for kind, label, extra in (("vera", "VeRA", _OFF_WITH_VERA), ("lokr", "LoKr", _OFF_WITH_LOKR)):
        for name, is_off in (_OFF_WITH_BOTH | extra).items():
            if values[kind] and (values[name] or None) != (is_off or None):
                shown = "is given" if isinstance(values[name], dict) else f"is {str(values[name]).lower()}"
                yield (
                    (kind, name),
                    f"{kind} is true and {name} {shown}, which {label} does not have: remove one of both",
                )
    if values["lokr"] and values["lokr_factor"] == 0:
        yield ("lokr_factor",), "lokr_factor is 0: give -1, or a number from 1 on"


def _check_patterns(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, kind in (("rank_pattern", int), ("alpha_pattern", int | float)):
        for pattern, value in (values[name] or {}).items():
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value <= _MAX_RANK:
                number = "a whole number" if kind is int else "a number"
                yield (
                    (name,),
                    f"{name} gives {pattern!r} the value {value!r}: {number} from 1 to {_MAX_RANK} is needed"
                    if kind is int
                    else f"{name} gives {pattern!r} the value {value!r}: {number} above 0 is needed",
                )


def _check_type(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    wanted = values["lora_dtype"]
    is_half = values["fp16_opt_level"] == "O2"
    weights = (
        "bfloat16" if values["bf16"] and is_half else "float16" if values["fp16"] and is_half else "float32"
    )
    if wanted not in (None, "float32", weights):
        yield (
            ("lora_dtype", "fp16_opt_level", "bf16", "fp16"),
            f"lora_dtype is {wanted}, but the weights of this run are {weights}: leave it out, or set it to float32",
        )
