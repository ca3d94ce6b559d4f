"""What the folder of an adapter holds, told by its configuration file, before Paddle is imported.

lora_config.json      LoRA of this project or of PaddleNLP
prefix_config.json    a prefix of either
adapter_config.json   an adapter of peft
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from finetune.adapters.pattern_matching import match_names
from finetune.adapters.peft_config import (
    PEFT_CONFIG,
    SEQUENCE_CLASSIFICATION,
    check_peft_type,
    read_peft_rule,
)
from finetune.adapters.scaling import ScalingRule
from finetune.adapters.update_tensors import LOKR, LORA, VERA
from finetune.errors import UserError
from finetune.models.reward_head import REWARD_HEAD, REWARD_WEIGHT
from finetune.storage.files import read_json_if_present
from finetune.storage.quantisation.record import FACTS_FILE

LORA_CONFIG, PREFIX_CONFIG = "lora_config.json", "prefix_config.json"
CONFIG_FILES = {"lora_path": (LORA_CONFIG, PEFT_CONFIG), "prefix_path": (PREFIX_CONFIG,)}
"""Setting that names an adapter -> configuration files that such a folder may have."""
START_STEM = "initial_factors"
"""Begins the names of files with what A and B started from where that has left the base."""
PADDING_FACT = "pad_token_id"
"""Of a reward model, among the facts beside an adapter: what rows are padded with."""
_PADDLENLP_KINDS = {
    "vera_config.json": "PaddleNLP's VeRA, which trains the matrices of every layer as well",
    "lokr_config.json": "a LoKr adapter in PaddleNLP's form",
    "reft_config.json": "an adapter of ReFT",
}
_PATTERNS = {"rank_pattern": (1, "ranks above 0"), "alpha_pattern": (-math.inf, "numbers")}
"""Fields with values of single layers: the least value, and what they are."""
_OPTION_OF = {LORA_CONFIG: "lora_path", PEFT_CONFIG: "lora_path", PREFIX_CONFIG: "prefix_path"}


def find_adapter_faults(setting: str, folder: Path) -> list[str]:
    """Why a folder cannot be the adapter that a setting names; empty when it can.

    Args:
        setting: "lora_path" or "prefix_path".
        folder: Its value.
    """
    if not folder.is_dir():
        return [f"{setting} {folder} is no folder: give the output folder of a fine-tuning run"]
    expected = CONFIG_FILES[setting]
    name = next((each for each in expected if (folder / each).is_file()), None)
    try:
        if name is not None:
            _check_content(folder, name)
            return []
        if (folder / PEFT_CONFIG).is_file():  # given as a prefix
            check_peft_type(folder, read_json_if_present(folder / PEFT_CONFIG))
    except UserError as error:
        return list(error.faults)
    if fault := name_paddlenlp_kind(folder):
        return [f"{setting} {folder} {fault}"]
    if other := next((each for each in _OPTION_OF if (folder / each).is_file()), None):
        return [f"{setting} {folder} holds {other}: give it as {_OPTION_OF[other]}"]
    what = " but a whole model" if (folder / "config.json").is_file() else ""
    return [
        f"{setting} {folder} holds no {' or '.join(expected)}{what}: give the output folder of a fine-tuning run"
    ]


def has_reward_head(folder: Path) -> bool:
    """Whether a LoRA adapter was trained with the head of a reward model, which it holds whole."""
    if (folder / LORA_CONFIG).is_file():
        patterns = read_json_if_present(folder / LORA_CONFIG).get("trainable_modules") or ()
        return any(match_names([patterns] if isinstance(patterns, str) else patterns, [REWARD_WEIGHT]))
    config = read_json_if_present(folder / PEFT_CONFIG)
    saved = config.get("modules_to_save") or ()
    return config.get("task_type") == SEQUENCE_CLASSIFICATION or REWARD_HEAD in saved


def recorded_padding(folder: Path) -> dict[str, Any]:
    """The field of config.json that says what rows of a reward model are padded with; empty where nothing is known."""
    facts = read_json_if_present(folder / FACTS_FILE)
    return {PADDING_FACT: facts[PADDING_FACT]} if PADDING_FACT in facts else {}


def name_paddlenlp_kind(folder: Path) -> str | None:
    """Of an adapter of PaddleNLP that is none of LoRA's form: what it holds and what to do; None for any other folder."""
    found = next((name for name in _PADDLENLP_KINDS if (folder / name).is_file()), None)
    if found is None:
        return None
    return f"holds {found}, {_PADDLENLP_KINDS[found]}, which is not read here: train it anew, or merge it with PaddleNLP"


def _check_content(folder: Path, name: str) -> None:
    config = read_json_if_present(folder / name)
    if name == PEFT_CONFIG:
        read_peft_rule(folder, config)
    elif name == LORA_CONFIG:
        check_paddle_lora(folder, config)


def check_paddle_lora(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses what `lora_config.json` may ask for and nobody here computes.

    Raises:
        UserError: The adapter belongs to a changed base or covers parts of layers; rank or alpha are no numbers.
    """
    path = folder / LORA_CONFIG
    if config.get("enable_lora_list"):
        raise UserError(
            f"{path} has enable_lora_list, whose updates cover parts of a layer and are not read here. Merge it with "
            "the PaddleNLP release that trained it"
        )
    if config.get("loraga"):
        raise UserError(
            f"{path} has loraga true: such an adapter belongs to a base that its training changed and that is not "
            "on record here. Merge it with PaddleNLP, or train without loraga"
        )
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if not _is_number(value) or (name == "r" and value < 1):
            raise UserError(f"{path} has {name} {value!r}, but a number above 0 is needed: copy it again")
    for name in ("target_modules", "trainable_modules"):
        value = config.get(name)
        if value is not None and not _are_patterns([value] if isinstance(value, str) else value):
            raise UserError(f"{path} has {name} {value!r}, but regular expressions are needed: copy it again")
    for name in ("lora_dropout", "lora_plus_scale", "d_initial", "projection_prng_key", "lokr_factor"):
        if config.get(name) is not None and not _is_number(config[name]):
            raise UserError(f"{path} has {name} {config[name]!r}, but a number is needed: copy it again")
    for name, (least, what) in _PATTERNS.items():
        values = config.get(name) or {}
        if not isinstance(values, dict) or not all(
            _is_number(value) and value >= least for value in values.values()
        ):
            raise UserError(f"{path} has {name} {values!r}, but names with {what} are needed: copy it again")
        if not _are_patterns(list(values)):
            raise UserError(
                f"{path} has {name} {values!r}, but regular expressions are needed: copy it again"
            )


def paddle_rule(config: Mapping[str, Any]) -> ScalingRule:
    """Rank and factor of the layers of an adapter, by PaddleNLP's names.

    Args:
        config: Content of lora_config.json, see `check_paddle_lora`.
    """
    return ScalingRule(
        int(config["r"]),
        float(config["lora_alpha"]),
        bool(config.get("rslora")),
        bool(config.get("pissa")),
        dora=bool(config.get("use_dora")),
        kind=VERA if config.get("vera") else LOKR if config.get("lokr") else LORA,
        rank_pattern={name: int(value) for name, value in (config.get("rank_pattern") or {}).items()},
        alpha_pattern=config.get("alpha_pattern") or {},
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31


def _are_patterns(values: object) -> bool:
    try:
        return isinstance(values, list) and all(isinstance(each, str) and re.compile(each) for each in values)
    except (re.error, RecursionError, OverflowError):
        return False


def read_num_tokens(folder: Path) -> int | None:
    """Tokens of the tokenizer that an adapter was trained with; None when that is not on record.

    Raises:
        UserError: The record cannot be read, or is no number of tokens.
    """
    path = folder / FACTS_FILE
    recorded = read_json_if_present(path).get("num_tokens")
    if recorded is None:
        return None
    if isinstance(recorded, bool) or not isinstance(recorded, int) or not 0 < recorded < 2**31:
        raise UserError(
            f"{path} has num_tokens {recorded!r}, but a number of tokens is needed: copy it again"
        )
    return recorded


def find_adapter_as_model(folder: Path) -> str | None:
    """What to do where the folder of an adapter is given as the model; None where it is none."""
    if (folder / "config.json").is_file():
        return None
    name = next((each for each in _OPTION_OF if (folder / each).is_file()), None)
    if name is None:
        return None
    return (
        f"model_name_or_path {folder} holds an adapter alone ({name}): give the base as "
        f"--model_name_or_path, and this folder as --{_OPTION_OF[name]}"
    )
