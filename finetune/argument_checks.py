"""What makes a set of values unusable. Every check adds its own line, so that all faults show at once."""

import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.argument_data_checks import check_data_settings, looks_like_path
from finetune.argument_ranges import RANGES, find_range_fault
from finetune.argument_refusals import (
    PARALLEL_WORDS,
    REFUSED_QUANT,
    SUPPORTED_VALUES,
    find_refusals,
    find_unknown_words,
)
from finetune.argument_resolution import GENERATION_METRICS, LOSS_METRICS, canonical_metric
from finetune.device import detect_device, device_kind, find_device_fault
from finetune.parallel.topology import SHARDING_STAGES, split_processes

_LAUNCHER = "python -m paddle.distributed.launch"
_CARDS_PER_NODE = 8


class Values:
    """Resolved values by name, together with which of them can be relied on.

    Args:
        values: Every setting by name.
        broken: Names whose given value could not be converted; checks that need one of them are skipped.
    """

    def __init__(self, values: Mapping[str, Any], broken: set[str] | None = None):
        self._values = values
        self._broken = broken or set()

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def sound(self, *names: str) -> bool:
        """True when none of the named settings was given a value of the wrong type."""
        return self._broken.isdisjoint(names)


_DEGREES = ("tensor_parallel_degree", "pipeline_parallel_degree", "sharding_parallel_degree")


def find_faults(values: Values, extras: Mapping[str, Any]) -> list[str]:
    """Every reason not to run with these values, one line each; empty when there is none."""
    faults: list[str] = []
    for check in (
        _check_required,
        _check_task,
        _check_ranges,
        _check_lengths,
        check_data_settings,
        _check_methods,
        _check_paths,
        _check_precision,
        _check_best_model,
        _check_sharding,
        _check_words,
        _check_processes,
        _check_device,
        _check_supported,
        _check_reporting,
    ):
        check(values, faults)
    return faults + find_refusals(extras, {name: values[name] for name in REFUSED_QUANT})


def _check_supported(values: Values, faults: list[str]) -> None:
    for name, (working, remedy) in SUPPORTED_VALUES.items():
        if values.sound(name) and values[name] not in working:
            faults.append(f"{name} is {values[name]!r}, which this version does not have: {remedy}")


def _check_reporting(values: Values, faults: list[str]) -> None:
    packages = {"visualdl": "visualdl", "wandb": "wandb", "tensorboard": "tensorboardX"}
    services = (values["report_to"] or []) if values.sound("report_to") else []
    for service in services:
        package = packages.get(service)
        if package and importlib.util.find_spec(package) is None:
            faults.append(
                f"report_to names {service}, whose package {package} is not installed: pip install {package}, "
                "or leave it out; train_log.jsonl and loss.png are always written"
            )


def count_processes() -> int:
    """Number of processes of this run, as the launcher set it; 1 without a launcher."""
    told = os.environ.get("PADDLE_TRAINERS_NUM", "1")
    return int(told) if told.isdecimal() else 1


def _check_required(values: Values, faults: list[str]) -> None:
    remedies = {
        "model_name_or_path": "give the folder with the weights, or a model name",
        "output_dir": "give the folder to write checkpoints and results to",
        "dataset_name_or_path": "give the folder with train.json and dev.json, or a built-in dataset name",
    }
    for name, remedy in remedies.items():
        if name == "output_dir" and values["preview"]:
            continue
        if name == "dataset_name_or_path" and (values["dataset_mix"] or not values.sound("dataset_mix")):
            continue
        if values.sound(name) and not values[name]:
            faults.append(f"{name} is missing: {remedy}")


def _check_task(values: Values, faults: list[str]) -> None:
    tasks = ("do_train", "do_eval")
    if values.sound(*tasks) and not any(values[task] for task in tasks):
        faults.append("nothing to do: set do_train or do_eval to true")


def _check_ranges(values: Values, faults: list[str]) -> None:
    for name in RANGES:
        if values.sound(name) and (fault := find_range_fault(name, values[name])):
            faults.append(fault)


def _check_lengths(values: Values, faults: list[str]) -> None:
    src_length, max_length = values["src_length"], values["max_length"]
    if values.sound("src_length", "max_length") and src_length >= max_length:
        faults.append(
            f"src_length {src_length} leaves no room for the target in max_length {max_length}: "
            "lower src_length or raise max_length"
        )


def _check_methods(values: Values, faults: list[str]) -> None:
    if values.sound("lora", "prefix_tuning") and values["lora"] and values["prefix_tuning"]:
        faults.append(
            "lora and prefix_tuning are both true: choose one, for example with --prefix_tuning false"
        )
    for name in ("rslora", "pissa"):
        if values.sound(name, "lora") and values[name] and not values["lora"]:
            faults.append(f"{name} is true, but lora is false: add --lora true or remove {name}")
    saved = values.sound("modules_to_save", "lora") and values["modules_to_save"]
    if saved and not values["lora"]:
        faults.append(
            "modules_to_save is given, but lora is false: add --lora true, or remove it (without LoRA the "
            "choice is between all weights and a prefix)"
        )
    uploads = values.sound("save_to_aistudio", "aistudio_repo_id") and values["save_to_aistudio"]
    if uploads and not values["aistudio_repo_id"]:
        faults.append(
            "save_to_aistudio is true, but aistudio_repo_id is missing: give the repository to upload to"
        )


def _check_paths(values: Values, faults: list[str]) -> None:
    for name in (
        "model_name_or_path",
        "tokenizer_name_or_path",
        "lora_path",
        "prefix_path",
    ):
        value = values[name]
        if value and values.sound(name) and looks_like_path(value) and not os.path.exists(value):
            faults.append(
                f'{name} is "{value}", which does not exist (looked in {Path.cwd()}): check the path'
            )
    for method, name in (("lora", "lora_path"), ("prefix_tuning", "prefix_path")):
        value = values[name]
        wanted = values.sound(name, method) and value and values[method] and not looks_like_path(value)
        if wanted and not os.path.isdir(value):
            faults.append(f'{name} is "{value}", which is no folder (looked in {Path.cwd()}): check the path')
    template = values["chat_template"]  # may also be the template's text, in which slashes mean nothing
    if (
        template
        and values.sound("chat_template")
        and template.startswith((".", "/"))
        and not os.path.exists(template)
    ):
        faults.append(
            f'chat_template is "{template}", which does not exist (looked in {Path.cwd()}): check the path'
        )
    checkpoint = values["resume_from_checkpoint"]
    if checkpoint and values.sound("resume_from_checkpoint") and not os.path.isdir(checkpoint):
        faults.append(
            f'resume_from_checkpoint is "{checkpoint}", which is no folder (looked in {Path.cwd()}): check the path, '
            "or leave it out to continue from the newest checkpoint in output_dir"
        )
    output_dir = values["output_dir"]
    if output_dir and values.sound("output_dir") and os.path.isfile(output_dir):
        faults.append(f'output_dir is "{output_dir}", which is a file: give a folder')


def _check_precision(values: Values, faults: list[str]) -> None:
    for half, brain in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if values.sound(half, brain) and values[half] and values[brain]:
            faults.append(f"{half} and {brain} are both true: choose one, for example with --{half} false")


def _check_best_model(values: Values, faults: list[str]) -> None:
    metric = values["metric_for_best_model"]
    if metric is not None and values.sound("metric_for_best_model", "eval_with_do_generation"):
        by_generation = values["eval_with_do_generation"]
        possible = GENERATION_METRICS if by_generation else LOSS_METRICS
        if canonical_metric(metric) not in possible:
            faults.append(
                f'metric_for_best_model is "{metric}", which evaluation by {"generation" if by_generation else "loss"} '
                f"(eval_with_do_generation {str(by_generation).lower()}) does not produce: "
                f"choose one of {', '.join(possible)}"
            )
    needed = ("load_best_model_at_end", "evaluation_strategy", "save_strategy", "eval_steps", "save_steps")
    if not (values.sound(*needed, "logging_steps") and values["load_best_model_at_end"]):
        return
    evaluation, saving = values["evaluation_strategy"], values["save_strategy"]
    if evaluation != saving:
        faults.append(
            f"load_best_model_at_end needs every evaluated model saved, but evaluation_strategy is {evaluation} "
            f"and save_strategy is {saving}: set both to steps or both to epoch"
        )
    elif evaluation == "steps" and values["eval_steps"] > 0 and values["save_steps"] % values["eval_steps"]:
        faults.append(
            f"load_best_model_at_end needs save_steps to be a multiple of eval_steps, "
            f"but they are {values['save_steps']} and {values['eval_steps']}: change one of them"
        )


def _check_sharding(values: Values, faults: list[str]) -> None:
    words = (values["sharding"] or "").split() if values.sound("sharding") else []
    stages = [word for word in words if word in SHARDING_STAGES]
    if words and (len(stages) != 1 or len(words) > 2 or set(words) - {*stages, "offload"}):
        faults.append(f'sharding is "{values["sharding"]}": choose stage1, stage2 or stage3')
    elif "offload" in words:
        remedy = "" if stages == ["stage3"] else "use stage3, "
        faults.append(
            f'sharding is "{values["sharding"]}", but keeping the state in host memory is not available: '
            f"remove offload; if memory is short, {remedy}raise sharding_parallel_degree, or set recompute true"
        )
    if not values.sound("sharding", "sharding_parallel_degree"):
        return
    degree = values["sharding_parallel_degree"]
    if degree > 1 and not words:
        faults.append(
            f"sharding_parallel_degree is {degree}, but sharding does not say what to share out: "
            "add --sharding stage1 (or stage2, stage3), or remove the degree to train plain replicas"
        )


def _check_words(values: Values, faults: list[str]) -> None:
    for name in PARALLEL_WORDS:
        if values.sound(name) and (fault := find_unknown_words(name, values[name])):
            faults.append(fault)


def _check_processes(values: Values, faults: list[str]) -> None:
    if not values.sound("sharding", *_DEGREES):
        return
    num_processes, sharded = count_processes(), bool(values["sharding"])
    tensor, pipeline, sharding = (values[name] for name in _DEGREES)
    if split_processes(num_processes, tensor=tensor, pipeline=pipeline, sharding=sharding, sharded=sharded):
        return
    split = {name: values[name] for name in _DEGREES if values[name] > 1}
    if not sharded:
        split.pop("sharding_parallel_degree", None)
    needed = math.prod(split.values())
    one = num_processes == 1
    alone = " ".join(f"--{name} 1" for name in split)
    faults.append(
        f"{' x '.join(f'{name} {degree}' for name, degree in split.items())} needs {needed} processes or a multiple, "
        f"this run has {'1 process' if one else f'{num_processes} processes'}: "
        f"start it with `{_launch_command(values, needed)}`, or "
        + (f"on one process with {alone}" if one else f"as {num_processes} replicas with {alone}")
    )


def _launch_command(values: Values, num_processes: int) -> str:
    if values.sound("device") and device_kind(detect_device(values["device"])) == "cpu":
        return f"{_LAUNCHER} --nproc_per_node {num_processes} finetune_generation.py ARGS.json --device cpu"
    num_nodes = math.ceil(num_processes / _CARDS_PER_NODE)
    cards = ",".join(str(card) for card in range(min(num_processes, _CARDS_PER_NODE)))
    nodes = f"--nnodes {num_nodes} " if num_nodes > 1 else ""
    return f"{_LAUNCHER} {nodes}--gpus {cards} finetune_generation.py ARGS.json"


def _check_device(values: Values, faults: list[str]) -> None:
    fault = find_device_fault(values["device"]) if values.sound("device", "no_cuda") else None
    if fault:
        faults.append(fault)
