"""Rotary settings of config.json in the three places where Hugging Face versions keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError
from finetune.families.rotary_scaling import RotaryScaling, longrope_amplitude, yarn_amplitude

_UNSCALED = (None, "default")
_SETTINGS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
"""Kind of scaling -> settings that it needs."""
_MAY_HAVE = {
    "yarn": (
        *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
        "finetuned",  # a note in the first published files, which no program of theirs reads
    ),
    "longrope": ("factor", "attention_factor", "original_max_position_embeddings"),
}
_POSITIVE = {
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "high_freq_factor",
    "rope_theta",
}
_NUMBERS = _POSITIVE | {"low_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
_SAME_KIND = {"su": "longrope"}  # as the first published files call it
ANY_LENGTH = ("linear", "dynamic", "llama3", "yarn")
"""Kinds that every decoder of ours can have."""
TEXT_POSITIONS = "text_positions"
"""Field of an adapted configuration: most tokens of a text, where its positions allow more."""


def kind_of_scaling(config: dict[str, Any]) -> str | None:
    """Kind of scaling that a config.json asks for; None for none."""
    return _kind(split_rotary(config)[1])


def _check_values(settings: Mapping[str, Any]) -> None:
    """Raises UserError for settings that are no numbers, or by which nothing can be stretched."""
    for name in _NUMBERS & settings.keys():
        value = settings[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and (value > 0 or name not in _POSITIVE)):
            what = "a number above 0" if name in _POSITIVE else "a number"
            raise UserError(
                f"config.json asks for rotary scaling with {name} {value!r}, but it must be {what}: use the published "
                "config.json"
            )
    for name in ("short_factor", "long_factor"):
        values = settings.get(name)
        if values is not None and not (
            isinstance(values, list) and all(isinstance(each, int | float) and each > 0 for each in values)
        ):
            raise UserError(
                f"config.json asks for rotary scaling with a {name} that is no list of numbers above 0: use the published "
                "config.json"
            )


def _kind(settings: dict[str, Any]) -> str | None:
    """Files have one of two names of the kind, or both; releases of transformers differ in which of them counts."""
    _check_values(settings)
    named = [settings[name] for name in ("rope_type", "type") if settings.get(name) is not None]
    kinds = {None if kind in _UNSCALED else _SAME_KIND.get(str(kind), str(kind)) for kind in named}
    if len(kinds) > 1:
        raise UserError(
            f"config.json asks for rotary scaling {named[0]!r} (rope_type) and {named[1]!r} (type) at once: delete the one "
            "that these weights were not trained with"
        )
    return kinds.pop() if kinds else None


def with_scaling(
    config: dict[str, Any], *, kinds: tuple[str, ...] = ANY_LENGTH, may_turn_parts: bool = False
) -> dict[str, Any]:
    """The config with `rope_theta` at the top and the scaling in `rope_scaling`, for decoders of ours.

    Stretched by the length of the texts ("dynamic") nothing is computed: up to `max_position_embeddings`, where texts
    end, it changes nothing. "longrope" is computed for texts of the original length, where texts end, too.

    Args:
        config: As found.
        kinds: Those that are allowed.
        may_turn_parts: Whether positions on a part of each head are computed.

    Raises:
        UserError: Another kind, a setting that is missing, or one that is not known.
    """
    kind, (bare, settings) = kind_of_scaling(config), split_rotary(config)
    share = settings.pop("partial_rotary_factor", None)
    adapted = without_scaling(bare | ({} if share is None else {"partial_rotary_factor": share}),
                              may_turn_parts=may_turn_parts)  # fmt: skip
    if kind is None:
        return adapted
    if kind not in kinds:
        raise _unknown_kind(kind, ", ".join(("none", *kinds)))
    settings = {name: value for name, value in settings.items() if name not in ("type", "rope_type")}
    missing = [name for name in _SETTINGS[kind] if settings.get(name) is None]
    extra = settings.keys() - {*_SETTINGS[kind], *_MAY_HAVE.get(kind, ())}
    if missing or extra:
        what = (
            f"lacks {', '.join(missing)}"
            if missing
            else f"has {', '.join(sorted(extra))}, which is not computed"
        )
        raise UserError(
            f"config.json asks for rotary scaling {kind!r}, but {what}: use the published config.json"
        )
    adapted["rope_scaling"] = {"rope_type": kind, **settings}
    if kind == "longrope":
        adapted |= _longrope_lengths(adapted)
    return adapted


def _longrope_lengths(adapted: dict[str, Any]) -> dict[str, Any]:
    settings, name = adapted["rope_scaling"], "original_max_position_embeddings"
    original = adapted.get(name) or settings.get(name) or adapted["max_position_embeddings"]
    return {name: original, TEXT_POSITIONS: original}


def scaling_of(config: Any) -> RotaryScaling | None:
    """How a model's positions are stretched, from PaddleNLP's object of a configuration of `with_scaling`."""
    settings = config.rope_scaling or {}
    kind, longest = settings.get("rope_type"), config.max_position_embeddings
    factor = float(settings.get("factor") or 1.0)
    original = settings.get("original_max_position_embeddings") or longest
    if kind == "linear":
        return RotaryScaling(kind, factor)
    if kind == "llama3":
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        return RotaryScaling(kind, factor, original, low=low, high=high)
    if kind == "yarn":
        return RotaryScaling(
            kind,
            factor,
            original,
            low=settings.get("beta_slow") or 1.0,
            high=settings.get("beta_fast") or 32.0,
            rounded=settings.get("truncate", True),
            amplitude=_yarn_amplitude(settings, factor),
        )
    if kind == "longrope":
        original = config.original_max_position_embeddings
        amplitude = settings.get("attention_factor") or longrope_amplitude(longest / original, original)
        return RotaryScaling(kind, pair_factors=tuple(settings["short_factor"]), amplitude=amplitude)
    return None


def longest_text(config: Mapping[str, Any], limit: int) -> int:
    """Most tokens of a text whose positions are stretched.

    Files say the length before stretching, or that behind it: the longer reading counts, as nothing in the computation
    ends there.

    Args:
        config: As adapted.
        limit: `max_position_embeddings`.
    """
    settings = config.get("rope_scaling") or {}
    kind, factor = settings.get("rope_type"), settings.get("factor")
    if config.get("rope_scaling_type") == "linear":  # as PaddleNLP's Llama reads it
        kind, factor = "linear", config.get("rope_scaling_factor")
    if kind == "linear" and factor:
        return max(limit, int(limit * factor))
    if kind == "yarn" and factor:
        return max(limit, int((settings.get("original_max_position_embeddings") or limit) * factor))
    return limit


def _yarn_amplitude(settings: dict[str, Any], factor: float) -> float:
    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    weight, divisor = settings.get("mscale"), settings.get("mscale_all_dim")
    if weight and divisor:
        return yarn_amplitude(factor, weight) / yarn_amplitude(factor, divisor)
    return yarn_amplitude(factor)


def _unknown_kind(kind: str, allowed: str) -> UserError:
    return UserError(
        f"config.json asks for rotary scaling {kind!r}, which this stack cannot reproduce for this "
        f"family; allowed: {allowed}. Use weights without that scaling, or delete the "
        "setting if all your texts are shorter than the model's original length"
    )


def split_rotary(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes the rotary settings out of a config.

    transformers 5 writes `rope_parameters` with the base and the scaling in it, older versions a
    top-level `rope_theta` and `rope_scaling`.

    Returns:
        The config without the nested settings and with `rope_theta` at the top where it was given, and
        the scaling settings (empty when there are none).

    Raises:
        UserError: A setting has two values.
    """
    adapted = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    places = {"top": config} | {name: config.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    for name in ("rope_theta", "partial_rotary_factor"):
        given = {place: held[name] for place, held in places.items() if held.get(name) is not None}
        if any(value != next(iter(given.values())) for value in given.values()):
            told = ", ".join(f"{value!r} ({place})" for place, value in given.items())
            raise UserError(
                f"config.json has more than one {name}: {told}; programs differ in which they take. Delete those that these "
                "weights were not trained with"
            )
    scaling = {**places["rope_scaling"], **places["rope_parameters"]}
    if "rope_theta" in scaling:
        adapted["rope_theta"] = scaling.pop("rope_theta")
    return adapted, scaling


def without_scaling(config: dict[str, Any], *, may_turn_parts: bool = False) -> dict[str, Any]:
    """The config with `rope_theta` at the top, for models that are run with unscaled positions only.

    Args:
        config: As found.
        may_turn_parts: Whether positions on a part of each head are computed.

    Raises:
        UserError: The config asks for a scaling, or for positions on a part of each head.
    """
    adapted, scaling = split_rotary(config)
    kind = _kind(scaling)
    if kind is not None:
        raise _unknown_kind(kind, "none")
    share = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if share != 1.0 and not may_turn_parts:
        raise UserError(
            f"config.json has partial_rotary_factor {share}, but this model family is run with 1.0 only: "
            "these weights cannot be used"
        )
    return adapted


def check_head_dim(config: dict[str, Any]) -> None:
    """Raises UserError when heads are wider or narrower than hidden size / number of heads."""
    head_dim, num_heads = config.get("head_dim"), config.get("num_attention_heads")
    hidden_size = config.get("hidden_size")
    if head_dim and num_heads and hidden_size and head_dim * num_heads != hidden_size:
        raise UserError(
            f"config.json has head_dim {head_dim} with {num_heads} heads, but PaddleNLP's model needs "
            f"hidden_size / heads = {hidden_size // num_heads}: these weights cannot be used"
        )
