"""Fill in what follows from other settings: defaults that depend on one another, and the device."""

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from finetune.argument_refusals import list_ignored, list_training_ignored
from finetune.device import detect_device, device_kind

LOSS_METRICS = ("loss", "perplexity", "accuracy")
GENERATION_METRICS = ("bleu4", "rouge1", "rouge2", "rougel")
METRIC_ALIASES = {"ppl": "perplexity"}
_LOWER_IS_BETTER = frozenset({"loss", "perplexity"})

# Number formats that Paddle computes in on GPUs only, and what depends on them.
HALF_PRECISION_SETTINGS = ("fp16", "bf16", "fp16_full_eval", "bf16_full_eval")
# Kernels that Paddle has on GPUs only.
GPU_ONLY_SETTINGS = (
    "use_flash_attention",
    "use_fused_rms_norm",
    "use_fused_rope",
    "use_fused_linear",
    "use_fused_dropout_add",
    "use_fused_linear_cross_entropy",
)
_PATH_SETTINGS = (
    "model_name_or_path",
    "tokenizer_name_or_path",
    "dataset_name_or_path",
    "chat_template",
    "lora_path",
    "prefix_path",
    "output_dir",
    "logging_dir",
    "resume_from_checkpoint",
)


def resolve(values: MutableMapping[str, Any], given: frozenset[str], extras: Mapping[str, Any]) -> list[str]:
    """Complete ``values`` in place and return the warnings that come of it.

    Args:
        values: Every setting by name, defaults included.
        given: Names that the file or the command line set.
        extras: Settings of PaddleNLP without a place here that were given.
    """
    for name in _PATH_SETTINGS:
        if values[name]:
            values[name] = os.path.expanduser(values[name])
    if values["lora_alpha"] is None and values["lora_rank"] > 0:
        values["lora_alpha"] = 2.0 * values["lora_rank"]
    if values["modules_to_save"] is not None:
        parts = [part.strip() for item in values["modules_to_save"] for part in item.split(",")]
        values["modules_to_save"] = [part for part in parts if part] or None
    if values["preview"] and not (values["do_train"] or values["do_eval"]):
        values["do_train"] = True  # the samples to look at
    if "src_length" not in given and values["src_length"] >= values["max_length"] > 1:
        values["src_length"] = values["max_length"] // 2
    warnings = _resolve_evaluation(values, given)
    for method, path in (("lora", "lora_path"), ("prefix_tuning", "prefix_path")):
        if values[path] and not values[method]:
            warnings.append(f"{path} is not read, because {method} is false")
    return warnings + list_ignored(extras) + list_training_ignored(values, given)


def canonical_metric(name: str) -> str:
    """The metric's name in results: no ``eval_`` prefix, lower case, aliases replaced."""
    lowered = name.lower().removeprefix("eval_")
    return METRIC_ALIASES.get(lowered, lowered)


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
    metric = values["metric_for_best_model"]
    possible = GENERATION_METRICS if values["eval_with_do_generation"] else LOSS_METRICS
    if metric is not None:  # one that is not possible stays as it was written, for the fault line
        metric = canonical_metric(metric) if canonical_metric(metric) in possible else metric
    elif values["load_best_model_at_end"]:
        metric = "bleu4" if values["eval_with_do_generation"] else "loss"
    values["metric_for_best_model"] = metric
    if values["greater_is_better"] is None and metric is not None:
        values["greater_is_better"] = metric not in _LOWER_IS_BETTER
    return warnings


def adapt_to_device(values: MutableMapping[str, Any]) -> list[str]:
    """Settle ``values["device"]`` and turn off, with one warning each, what Paddle has on GPUs only."""
    if values["no_cuda"] and device_kind(values["device"] or "gpu") == "gpu":
        values["device"] = "cpu"
    values["device"] = detect_device(values["device"])
    if device_kind(values["device"]) != "cpu":
        return _ignore_rehearsal(values)
    warnings = []
    if turned_off := _turn_off(values, GPU_ONLY_SETTINGS):
        warnings.append(f"on CPU these settings are turned off: {turned_off}")
    if not values["rehearse_half_precision"] and any(values[name] for name in HALF_PRECISION_SETTINGS):
        turned_off = _turn_off(values, (*HALF_PRECISION_SETTINGS, "amp_master_grad"))
        warnings.append(
            f"on CPU half precision is turned off ({turned_off}): "
            "set rehearse_half_precision true to compute in it on CPU"
        )
    return warnings


def _ignore_rehearsal(values: MutableMapping[str, Any]) -> list[str]:
    if not values["rehearse_half_precision"]:
        return []
    values["rehearse_half_precision"] = False
    return [f"rehearse_half_precision has no effect on {values['device']}: it is for runs on CPU"]


def _turn_off(values: MutableMapping[str, Any], names: tuple[str, ...]) -> str:
    """Sets those that are on to false; returns their names."""
    turned_off = [name for name in names if values[name]]
    values.update(dict.fromkeys(turned_off, False))
    return ", ".join(turned_off)
