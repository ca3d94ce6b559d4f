"""The adapter of a run: what can be said before data are read, and how it comes onto the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.adapter_folder import LORA_CONFIG, PREFIX_CONFIG, find_adapter_faults, paddle_rule
from finetune.adapters.frozen_parts import check_choice, choice_of, freeze_parts
from finetune.adapters.missing_updates import describe_missing
from finetune.adapters.peft_config import PEFT_CONFIG, read_peft_rule
from finetune.adapters.targets import expected_layers, resolve_targets
from finetune.adapters.update_tensors import LOKR, LORA, VERA
from finetune.errors import UserError
from finetune.models.hubs.adapters import local_adapter
from finetune.models.resolve import quantised_twice, trained_over_another
from finetune.models.shard_files import check_packed
from finetune.run.model import parameter_dtype
from finetune.settings.quantisation import scheme_of
from finetune.storage.files import read_json_if_present

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.processes.groups import ProcessGroups
    from finetune.settings.arguments import Arguments


# Of a saved adapter's settings these do not change what it computes.
_TRAINING_ONLY = ("lora_dropout", "lora_plus_scale")
_ON_RECORD = {
    "lora_target_modules": "which layers it updates",
    "rank_pattern": "which rank each layer has",
    "alpha_pattern": "which alpha each layer has",
    "init_lora_weights": "where it starts",
}
"""Setting -> what a saved adapter says in its place."""


def check_adapter(args: Arguments, resolved: ResolvedModel) -> list[str]:
    """Compares the adapter that a run starts from, or the layers that it is to adapt, with its settings.

    Returns:
        Lines for the person: given settings that the adapter decides.

    Raises:
        UserError: The folder is no adapter that can be trained here, or a pattern is faulty or fits no layer.
    """
    model = args.model
    _check_stored_format(args, resolved)
    notes = [] if args.training.do_train else _describe_missing_adapter(args)
    if model.lora and model.lora_path:
        folder = local_adapter(model.lora_path)
        if faults := find_adapter_faults("lora_path", folder):
            raise UserError(faults)
        _check_start(folder, is_packed=bool(resolved.stored_format or scheme_of(vars(model))))
        return _differences(args, folder) + describe_missing(folder, resolved.family, resolved.config)
    if model.prefix_tuning and model.prefix_path:
        if faults := find_adapter_faults("prefix_path", local_adapter(model.prefix_path, "prefix_path")):
            raise UserError(faults)
    elif not (model.lora or model.prefix_tuning) and (choice := choice_of(model)).is_made:
        check_choice(choice, resolved.family, resolved.family.adapt_config(resolved.config))
    elif model.lora and model.lora_target_modules:
        layers = expected_layers(resolved.family, resolved.family.adapt_config(resolved.config))
        resolve_targets(model.lora_target_modules, resolved.family, layers, layers)
    return notes


def _describe_missing_adapter(args: Arguments) -> list[str]:
    """An evaluation without a path to an adapter reads the model alone, which is easily taken for another thing."""
    for method, path in (("lora", "lora_path"), ("prefix_tuning", "prefix_path")):
        if getattr(args.model, method) and not getattr(args.model, path):
            folder = Path(args.training.output_dir)
            is_there = any((folder / name).is_file() for name in (LORA_CONFIG, PREFIX_CONFIG))
            remedy = f"give --{path} {folder if is_there else '<its folder>'}"
            what = "the model alone" if method == "lora" else "the model with a random prefix"
            return [
                f"warning: {path} is not given, so {what} is evaluated, without anything that was trained: {remedy}"
            ]
    return []


def _check_start(folder: Path, *, is_packed: bool) -> None:
    """What A and B started from has to leave the weights, which packed ones cannot let go."""
    config = read_json_if_present(folder / LORA_CONFIG)
    if is_packed and (config.get("pissa") or config.get("init_lora_weights") == "olora"):
        kind = "pissa" if config.get("pissa") else "init_lora_weights olora"
        raise UserError(
            f"lora_path {folder} was trained with {kind}, which changes the weights that it starts from, and the base is "
            "held in packed weights: merge it into its base with merge_lora_params.py and start from the result, or "
            "take the base unquantised"
        )


def _check_stored_format(args: Arguments, resolved: ResolvedModel) -> None:
    """What cannot be done with a folder whose weights are quantised."""
    form, model = resolved.stored_format, args.model
    if form is None:
        return
    shown = f"model {resolved.name} is quantised ({form.label})"
    if scheme := scheme_of(vars(model)):
        if "weight_quantize_algo" in args.given or not model.lora_path:
            raise quantised_twice(resolved)
        remedy = 'set weight_quantize_algo to "off"'
        raise trained_over_another(resolved, model.lora_path, scheme, remedy=remedy)
    if resolved.folder is not None and resolved.remote is None:
        check_packed(resolved.folder, resolved.family, resolved.config)
    if args.training.do_train and not model.lora:
        raise UserError(
            f"{shown}, and packed weights cannot be trained: add --lora true, or give the model that it was made from"
        )
    start = "pissa" if model.pissa else model.init_lora_weights
    if model.lora and start.startswith(("pissa", "olora")):
        given = "pissa is true" if model.pissa else f"init_lora_weights is {start}"
        raise UserError(
            f"{shown} and {given}, which would change the packed weights that it starts from: "
            f"{'set pissa false' if model.pissa else 'leave init_lora_weights out'}"
        )


def _differences(args: Arguments, folder: Path) -> list[str]:
    """One line for each given setting that the adapter has otherwise; its own counts."""
    lines = []
    for name, theirs in _settings_of(folder).items():
        if name in args.given and (ours := getattr(args.model, name)) != theirs:
            lines.append(
                f"warning: {name} is {_shown(ours)}, but the adapter in {folder} was trained with {_shown(theirs)}, "
                "which is what counts; for another one start without lora_path, on the model that "
                "merge_lora_params.py makes of it"
            )
    lines += [
        f"{name} is not used: the adapter in {folder} says {what}"
        for name, what in _ON_RECORD.items()
        if name in args.given and getattr(args.model, name) not in (None, "default")
    ]
    return lines


def _settings_of(folder: Path) -> dict[str, object]:
    """Values of the settings that the adapter's own configuration decides."""
    if (folder / LORA_CONFIG).is_file():
        config = read_json_if_present(folder / LORA_CONFIG)
        rule = paddle_rule(config)
    else:
        config = _named_as_here(read_json_if_present(folder / PEFT_CONFIG))
        rule = read_peft_rule(folder, read_json_if_present(folder / PEFT_CONFIG))
    of_kind: dict[str, dict[str, object]] = {
        LORA: {"lora_rank": rule.rank, "lora_alpha": rule.alpha, "lora_use_mixer": False},
        VERA: {"vera_rank": rule.rank, "projection_prng_key": 0},
        LOKR: {"lokr_dim": rule.rank, "lokr_alpha": rule.alpha, "lokr_factor": -1, "decompose_both": False},
    }
    recorded = of_kind[rule.kind] | {"lora_bias": "none"}
    return {name: config.get(name, value) for name, value in recorded.items()} | {
        "rslora": rule.rslora,
        "pissa": rule.pissa,
        "use_dora": rule.dora,
        "vera": rule.kind == VERA,
        "lokr": rule.kind == LOKR,
    }


def _named_as_here(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of peft's configuration that have other names here."""
    names = {"bias": "lora_bias", "decompose_factor": "lokr_factor"}
    found = {names.get(name, name): value for name, value in config.items() if name not in names.values()}
    return found | ({"lora_bias": "lora_only"} if found.get("lora_bias") == "vera_only" else {})


def _shown(value: object) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def adapt(model: Any, args: Arguments, resolved: ResolvedModel, groups: ProcessGroups) -> Any:
    """Puts the adapter that the run asks for on the model, or returns it as it is, with parts of it frozen or not.

    All ranks must call it.
    """
    from finetune.adapters.lora import add_lora, load_lora
    from finetune.adapters.prefix import add_prefix, load_prefix

    settings, dtype = args.model, parameter_dtype(args)
    if settings.lora and settings.lora_path:
        return load_lora(
            model,
            local_adapter(settings.lora_path),
            modules_to_save=settings.modules_to_save,
            overrides={
                "base_model_name_or_path": str(settings.model_name_or_path),
                "dtype": settings.lora_dtype or dtype,
            }
            | {name: getattr(settings, name) for name in _TRAINING_ONLY if name in args.given},
        )
    if settings.prefix_tuning and settings.prefix_path:
        return load_prefix(model, local_adapter(settings.prefix_path, "prefix_path"), family=resolved.family)
    if settings.lora:
        return add_lora(model, settings, family=resolved.family, dtype=dtype, seed=args.training.seed)
    if settings.prefix_tuning:
        return add_prefix(model, settings, family=resolved.family, dtype=dtype, seed=args.training.seed)
    if args.training.do_train and (choice := choice_of(settings)).is_made:
        freeze_parts(model, choice, resolved.family, groups)
    return model
