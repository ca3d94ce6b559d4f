"""What makes a set of values unusable. Every check tells its own lines, so that all faults show at once.

A check yields a fault with the names of the settings it depends on. It may be wrong about those whose given
value could not be converted, since their default stands in for them: such faults are dropped by `find_faults`.
"""

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from finetune.errors import holds_credentials
from finetune.machine.device import find_device_fault
from finetune.settings.alignment import check_alignment
from finetune.settings.data_checks import check_data
from finetune.settings.degrees import check_degrees
from finetune.settings.engine_words import check_engine_words
from finetune.settings.lora_checks import check_lora
from finetune.settings.model import FROZEN_PARTS
from finetune.settings.paths import (
    describe_missing,
    find_obstacle,
    looks_like_hub_name,
    looks_like_path,
    shorten,
)
from finetune.settings.quantisation import check_quantisation, find_export_command
from finetune.settings.registry import foreign_settings, known_settings
from finetune.settings.resolution import canonical_metric, possible_metrics
from finetune.settings.trackers import TRACKER_PACKAGES

Values = Mapping[str, Any]
Faults = Iterator[tuple[tuple[str, ...], str]]


def find_faults(
    values: Values, broken: Set[str], foreign: Values, *, is_elsewhere: bool = False
) -> list[str]:
    """Every reason not to run with these values, one line each; empty when there is none.

    Args:
        values: Resolved values of all settings.
        broken: Names whose given value could not be converted; no more is said about them.
        foreign: Given values of settings that have no place here.
        is_elsewhere: Whether the run is to be on another machine, whose device and packages nobody knows.
    """
    checks = [check for check in _CHECKS if not (is_elsewhere and check is _check_surroundings)]
    faults = [fault for check in checks for names, fault in check(values) if broken.isdisjoint(names)]
    for name, value in foreign.items():
        faults.extend(foreign_settings()[name].find_faults(value))
    return faults


def _check_required(values: Values) -> Faults:
    remedies = {
        ("model_name_or_path",): "give the folder with the weights, or a model name",
        ("output_dir", "preview"): "give the folder to write checkpoints and results to",
        (
            "dataset_name_or_path",
            "dataset_mix",
        ): "give the folder with train.json and dev.json, or a built-in dataset name",
    }
    for names, remedy in remedies.items():
        if not any(values[name] for name in names):
            yield names, f"{names[0]} is missing: {remedy}"
    if not (values["do_train"] or values["do_eval"] or values["do_ptq"] or values["do_gptq"]):
        yield ("do_train", "do_eval"), "nothing to do: set do_train or do_eval to true"


def _check_each(values: Values) -> Faults:
    """What the record of a setting says about its value alone."""
    is_answered = find_export_command(values) is not None  # told with the command that does it
    for name, setting in known_settings().items():
        if is_answered and setting.group == "quant":
            continue
        yield from (((name,), fault) for fault in setting.find_faults(values[name]))


def _check_methods(values: Values) -> Faults:
    for first, second in (("lora", "prefix_tuning"), ("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if values[first] and values[second]:
            remedy = f"choose one, for example with --{second if first == 'lora' else first} false"
            yield (first, second), f"{first} and {second} are both true: {remedy}"
    yield from check_lora(values)
    if values["modules_to_save"] and not (values["lora"] or any(values[name] for name in FROZEN_PARTS)):
        yield (
            ("modules_to_save", "lora", *FROZEN_PARTS),
            "modules_to_save is given, but lora is false and all weights are trained: add --lora true, remove it, or "
            "name what alone is trained in trainable_parameters",
        )
    for method in ("lora", "prefix_tuning"):
        if values[method] and (given := [name for name in FROZEN_PARTS if values[name]]):
            remedy = (
                "modules_to_save and lora_target_modules say what is trained"
                if method == "lora"
                else "remove it"
            )
            yield (
                (method, *given),
                f"{given[0]} is for full fine-tuning, but {method} is true, which freezes the base: {remedy}, or set "
                f"{method} false",
            )
    if values["save_to_aistudio"] and not values["aistudio_repo_id"]:
        fault = "save_to_aistudio is true, but aistudio_repo_id is missing: give the repository to upload to"
        yield ("save_to_aistudio", "aistudio_repo_id"), fault


def _check_steps(values: Values) -> Faults:
    if values["max_steps"] == 0:
        yield (
            ("max_steps",),
            "max_steps is 0: give the number of optimizer steps, -1 to train num_train_epochs, or do_train false "
            "to evaluate only",
        )


def _check_credentials(values: Values) -> Faults:
    """Addresses are written to arguments.json and into logs."""
    for name, setting in known_settings().items():
        if setting.is_path and isinstance(values[name], str) and holds_credentials(values[name]):
            yield (
                (name,),
                f"{name} holds a password or a token, which would be written to arguments.json and the logs: give the "
                "name alone, and the token in the environment, such as HF_TOKEN",
            )


def _check_paths(values: Values) -> Faults:
    looked = f"(looked in {Path.cwd()}): check the path"
    for name in (
        "model_name_or_path",
        "tokenizer_name_or_path",
        "lora_path",
        "prefix_path",
        "reference_model",
    ):
        if values[name] and looks_like_path(values[name]) and not os.path.exists(values[name]):
            yield (name,), f'{name} is "{shorten(values[name])}", {describe_missing(values[name])}'
    for method, name in (("lora", "lora_path"), ("prefix_tuning", "prefix_path")):
        value = values[name]
        is_name = looks_like_hub_name(value or "")  # whether a hub has it is asked when it is needed
        if value and values[method] and not (looks_like_path(value) or is_name or os.path.isdir(value)):
            yield (name, method), f'{name} is "{shorten(value)}", which is no folder {looked}'
    template = values["chat_template"] or ""  # may also be the template's text, in which slashes mean nothing
    if template.startswith((".", "/")) and not os.path.exists(template):
        yield ("chat_template",), f'chat_template is "{shorten(template)}", {describe_missing(template)}'
    checkpoint = values["resume_from_checkpoint"]
    if checkpoint and not os.path.isdir(checkpoint):
        yield (
            ("resume_from_checkpoint",),
            f'resume_from_checkpoint is "{shorten(checkpoint)}", which is no folder {looked}, '
            "or leave it out to continue from the newest checkpoint in output_dir",
        )
    if os.path.isfile(values["output_dir"] or ""):
        yield ("output_dir",), f'output_dir is "{values["output_dir"]}", which is a file: give a folder'
    for name in ("output_dir", "logging_dir", "data_cache_dir"):  # may be made yet
        if values[name] and (obstacle := find_obstacle(values[name])):
            yield (name,), f'{name} is "{shorten(values[name])}", {obstacle}'


def _check_patterns(values: Values) -> Faults:
    for pattern in values["lora_target_modules"] or ():
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield (
                ("lora_target_modules",),
                f'lora_target_modules has "{shorten(pattern)}", which is no regular expression ({error}): correct it, or '
                "give all, default, or the bare names of layers",
            )


def _check_best_model(values: Values) -> Faults:
    metric, by_generation = values["metric_for_best_model"], values["eval_with_do_generation"]
    possible = possible_metrics(values)
    if metric is not None and canonical_metric(metric) not in possible:
        yield (
            ("metric_for_best_model", "eval_with_do_generation"),
            f'metric_for_best_model is "{metric}", which evaluation by {"generation" if by_generation else "loss"} '
            f"(eval_with_do_generation {str(by_generation).lower()}) does not produce: "
            f"choose one of {', '.join(possible)}",
        )
    needed = ("load_best_model_at_end", "evaluation_strategy", "save_strategy", "eval_steps", "save_steps")
    is_wanted, evaluation, saving, every, save_every = (values[name] for name in needed)
    names = (*needed, "logging_steps")  # where eval_steps comes from
    if is_wanted and evaluation != saving:
        yield (
            names,
            f"load_best_model_at_end needs every evaluated model saved, but evaluation_strategy is {evaluation} "
            f"and save_strategy is {saving}: set both to steps or both to epoch",
        )
    elif is_wanted and evaluation == "steps" and every > 0 and save_every % every:
        yield (
            names,
            f"load_best_model_at_end needs save_steps to be a multiple of eval_steps, "
            f"but they are {save_every} and {every}: change one of them",
        )


def _check_surroundings(values: Values) -> Faults:
    """What this machine lacks: a device, a package."""
    if fault := find_device_fault(values["device"]):
        yield ("device", "no_cuda"), fault
    for service in values["report_to"] or []:
        package = TRACKER_PACKAGES.get(service)
        if package and importlib.util.find_spec(package) is None:
            yield (
                ("report_to",),
                f"report_to names {service}, whose package {package} is not installed: pip install {package}, "
                "or leave it out; train_log.jsonl and loss.png are always written",
            )


_CHECKS = (
    _check_required,
    _check_each,
    check_data,
    _check_methods,
    check_quantisation,
    check_alignment,
    _check_patterns,
    _check_steps,
    _check_credentials,
    _check_paths,
    _check_best_model,
    check_degrees,
    check_engine_words,
    _check_surroundings,
)
