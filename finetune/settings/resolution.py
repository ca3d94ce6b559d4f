"""Fill in what follows from other settings: defaults that depend on one another, and the device."""

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from finetune.machine.device import detect_device, device_kind
from finetune.settings.alignment import BASE, METRICS, REWARD, REWARD_METRICS, START, resolve_alignment
from finetune.settings.paths import looks_like_path
from finetune.settings.quantisation import resolve_quantisation
from finetune.settings.registry import foreign_settings, known_settings

_ALIGNMENT_ALIASES = {"rewards/accuracies": "rewards_accuracy", "rewards_accuracies": "rewards_accuracy",
                      "rewards/margins": "rewards_margin", "rewards_margins": "rewards_margin",
                      "rewards/chosen": "rewards_chosen", "rewards/rejected": "rewards_rejected"}  # fmt: skip
_LOSS_METRICS = ("loss", "perplexity", "accuracy")
_GENERATION_METRICS = ("bleu4", "rouge1", "rouge2", "rougel")
_METRIC_ALIASES = {"ppl": "perplexity"} | _ALIGNMENT_ALIASES
_HALF_PRECISION = ("fp16", "bf16", "fp16_full_eval", "bf16_full_eval")
_LOWER_IS_BETTER = frozenset({"loss", "perplexity", "rewards_rejected", "logps_rejected"})
_HUB_NAMES = ("model_name_or_path", "tokenizer_name_or_path", "lora_path", "prefix_path", "reference_model")


def resolve(values: MutableMapping[str, Any], given: frozenset[str], foreign: Mapping[str, Any]) -> list[str]:
    """Completes ``values`` in place and returns the warnings that come of it.

    Args:
        values: Every setting by name, defaults included.
        given: Names that the file or the command line set.
        foreign: Given values of settings that have no place here.
    """
    for name, setting in known_settings().items():
        if setting.is_path and values[name]:
            values[name] = os.path.expanduser(values[name])
    for name in _HUB_NAMES if values["from_aistudio"] else ():
        is_word = name == "reference_model" and values[name] in (START, BASE)
        if values[name] and not is_word and "://" not in values[name] and not looks_like_path(values[name]):
            values[name] = f"aistudio://{values[name]}"
    if values["vera"] or values["lokr"]:
        values["lora"] = True
    if values["lora_alpha"] is None and values["lora_rank"] > 0:
        values["lora_alpha"] = 2.0 * values["lora_rank"]
    if values["modules_to_save"] is not None:
        parts = [part.strip() for item in values["modules_to_save"] for part in item.split(",")]
        values["modules_to_save"] = [part for part in parts if part] or None
    if values["preview"] and not (values["do_train"] or values["do_eval"]):
        values["do_train"] = True  # the samples to look at
    if "src_length" not in given and values["src_length"] >= values["max_length"] > 1:
        values["src_length"] = values["max_length"] // 2
    warnings = resolve_alignment(values, given)
    warnings += _resolve_evaluation(values, given)
    warnings += resolve_quantisation(values)
    for method, path in (("lora", "lora_path"), ("prefix_tuning", "prefix_path")):
        if values[path] and not values[method]:
            warnings.append(f"{path} is not read, because {method} is false")
    ignored = [foreign_settings()[name].find_ignored(value) for name, value in foreign.items()]
    ignored += [each.find_ignored(values[name]) for name, each in known_settings().items() if name in given]
    return warnings + [warning for warning in ignored if warning]


def canonical_metric(name: str) -> str:
    """The metric's name in results: no ``eval_`` prefix, lower case, aliases replaced."""
    lowered = name.lower().removeprefix("eval_")
    return _METRIC_ALIASES.get(lowered, lowered)


def possible_metrics(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The metrics that the evaluation of a run produces, the one that decides by default first."""
    if values["loss_type"] is not None:
        return REWARD_METRICS if values["loss_type"] == REWARD else METRICS
    return _GENERATION_METRICS if values["eval_with_do_generation"] else _LOSS_METRICS


def _resolve_evaluation(values: MutableMapping[str, Any], given: frozenset[str]) -> list[str]:
    warnings = []
    if values["do_train"] is False:
        # The file of a training run, used to evaluate what it left: nothing is chosen or repeated then.
        values.update(evaluation_strategy="no", load_best_model_at_end=False, metric_for_best_model=None)
    strategy = values["evaluation_strategy"]
    if strategy != "no" and not values["do_eval"]:
        values["do_eval"] = True
        if "do_eval" in given:
            warnings.append(
                f'do_eval false gives way to evaluation_strategy "{strategy}": '
                "set evaluation_strategy no to train without evaluating"
            )
    if strategy == "steps" and not values["eval_steps"]:
        values["eval_steps"] = values["logging_steps"]
    if values["load_best_model_at_end"] and strategy == values["save_strategy"] == "no":
        values["load_best_model_at_end"] = False
        warnings.append(
            "load_best_model_at_end is turned off, because evaluation_strategy and save_strategy are no: "
            "there is no checkpoint to choose from"
        )
    metric, possible = values["metric_for_best_model"], possible_metrics(values)
    if metric is not None:  # one that is not possible stays as it was written, for the fault line
        names = [canonical_metric(metric)]
        if values["loss_type"] == REWARD:  # TRL's reward trainer says accuracy and margin
            names.append(f"rewards_{names[0]}")
        metric = next((name for name in names if name in possible), metric)
    elif values["load_best_model_at_end"]:
        metric = possible[0]
    values["metric_for_best_model"] = metric
    if values["greater_is_better"] is None and metric is not None:
        values["greater_is_better"] = metric not in _LOWER_IS_BETTER
    return warnings


def adapt_to_device(values: MutableMapping[str, Any]) -> list[str]:
    """Settles ``values["device"]`` and turns off, with one warning, what Paddle has on GPUs only."""
    if values["no_cuda"] and device_kind(values["device"] or "gpu") == "gpu":
        values["device"] = "cpu"
    values["device"] = detect_device(values["device"])
    rehearses = values["rehearse_half_precision"]
    if device_kind(values["device"]) != "cpu":
        values["rehearse_half_precision"] = False
        return ["rehearse_half_precision is for CPUs and has no effect on this device"] if rehearses else []
    half = [name for name in _HALF_PRECISION if values[name] and not rehearses]
    kernels = [name for name, each in known_settings().items() if each.gpu_only and values[name]]
    turned_off = half + [name for name in kernels if name not in _HALF_PRECISION]
    values.update(dict.fromkeys(turned_off, False))
    if values["amp_master_grad"] and not (values["fp16"] or values["bf16"]):
        values["amp_master_grad"] = False
        turned_off.append("amp_master_grad")
    hint = " (rehearse_half_precision true computes in half precision on CPU, slowly)" if half else ""
    return [f"on CPU these settings are turned off: {', '.join(turned_off)}{hint}"] if turned_off else []
