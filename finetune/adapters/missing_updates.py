"""Which layers an adapter promises to update and has no update of, told from names before a weight is read.

peft loads such an adapter with a warning, and the layers stay as the base has them; so does this project, with a line
that names them, because peft's `target_modules` may name layers that were never trained. An adapter of PaddleNLP's
form that lacks what its own patterns name is refused: PaddleNLP writes all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.adapters.pattern_matching import match_names
from finetune.adapters.peft_config import PEFT_CONFIG
from finetune.adapters.peft_folder import open_peft_folder
from finetune.adapters.targets import ALL_LINEAR, expected_layers, linear_layers
from finetune.errors import UserError
from finetune.families.family import Family
from finetune.models.hf_names import JOINED_LAYERS, is_tied, joined_parts, to_hugging_face

_MAX_LISTED = 4
_LAYER_NUMBER = r".*\.[^.]*\.(\d+)\."


def describe_missing(folder: Path, family: Family, config: Mapping[str, Any]) -> list[str]:
    """A line for the person on layers without an update; empty for adapters that are not peft's, and whole ones.

    Args:
        folder: Of the adapter.
        family: Record of its base.
        config: Configuration of the base as found.

    Raises:
        UserError: The adapter cannot be read.
    """
    if not (folder / PEFT_CONFIG).is_file():
        return []
    source = open_peft_folder(folder, family, tied=is_tied(config, family))
    adapted = family.adapt_config(dict(config))
    known = [to_hugging_face(name, family) for name in linear_layers(family, adapted)]
    ends = [to_hugging_face(name, family) for name in expected_layers(family, adapted)]
    try:
        promised = _promised(source.config, [name for name in known if _leaf(name) not in JOINED_LAYERS])
    except UserError as error:
        raise UserError(f"{folder / PEFT_CONFIG} names layers by what cannot be used: {error}") from None
    saved = _matching(_names(source.config.get("modules_to_save")), ends)
    held = {to_hugging_face(name, family).rpartition(".")[0] for name in source.whole}
    missing = [name for name in promised if name not in source.matrices]
    if missing := missing + [name for name in saved if name not in held]:
        return [
            f"warning: the adapter in {folder} has nothing for {len(missing)} of the {len(promised) + len(saved)} layers "
            f"that its {PEFT_CONFIG} names: {_listed(missing)}. They stay as the base has them, as in peft; if they "
            "were trained, copy the adapter again"
        ]
    leaves = {_leaf(name) for name in source.matrices}
    alike = [name for name in known if _leaf(name) in leaves]
    if without := [name for name in alike if name not in source.matrices]:
        return [
            f"the adapter in {folder} updates some layers alone, as its {PEFT_CONFIG} says: of the {len(alike)} called "
            f"{', '.join(sorted(leaves))}, {len(without)} have no update: {_listed(without)}"
        ]
    return []


def check_complete(
    path: Path, config: Mapping[str, Any], linear: Sequence[str], updated: Collection[str]
) -> None:
    """Refuses an adapter in PaddleNLP's form that lacks updates of layers that its patterns name.

    Args:
        path: Its configuration file, for the message.
        config: What that holds.
        linear: PaddleNLP's names of the base's linear layers.
        updated: Those with an update; joined layers stand for their parts.

    Raises:
        UserError: Some are missing, or a pattern cannot be used.
    """
    given = config.get("target_modules") or []
    patterns = [given] if isinstance(given, str) else given
    covered = {part for layer in updated for part in (layer, *joined_parts(layer))}
    named = {name for names in match_names(patterns, linear) for name in names}
    if missing := [name for name in linear if name in named and name not in covered]:
        raise UserError(
            f"{path.parent} lacks updates of {len(missing)} of the {len(named)} layers that target_modules in "
            f"{path.name} names: {_listed(missing)}. Copy all files of the adapter from the same run"
        )


def _promised(config: Mapping[str, Any], layers: Sequence[str]) -> list[str]:
    """The layers that peft would put an update on, by its rules for `target_modules` and the fields beside it.

    Args:
        config: Content of adapter_config.json.
        layers: Hugging Face's names of linear layers.
    """
    targets, excluded = config.get("target_modules") or [], config.get("exclude_modules") or []
    chosen = _matching(targets, layers)
    if not isinstance(targets, str):
        chosen = [name for name in chosen if _is_of_layers(name, config)]
    left_out = set(_matching(excluded, layers))
    return [name for name in chosen if name not in left_out]


def _matching(entries: Any, layers: Sequence[str]) -> list[str]:
    """Layers that a text fits as a regular expression, or one of several names as an end."""
    if isinstance(entries, str):
        if entries.lower() in ALL_LINEAR:
            return list(layers)
        return match_names([entries], layers)[0] if entries else []
    ends = _names(entries)
    return [name for name in layers if any(name == end or name.endswith(f".{end}") for end in ends)]


def _is_of_layers(name: str, config: Mapping[str, Any]) -> bool:
    """Whether `layers_to_transform`, where it is given, names the layer's number."""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or []
    forms = [
        rf".*\.{re.escape(str(each))}\.(\d+)\."
        for each in ([patterns] if isinstance(patterns, str) else patterns)
    ]
    match = next((found for form in forms or [_LAYER_NUMBER] if (found := re.match(form, f"{name}."))), None)
    numbers = wanted if isinstance(wanted, list) else [wanted]
    return match is not None and int(match[1]) in numbers


def _names(given: Any) -> list[str]:
    return [str(each) for each in given] if isinstance(given, list) else []


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + f" and {more} more" * (more > 0)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
