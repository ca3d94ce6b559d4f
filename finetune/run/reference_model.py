"""A reference that is not the model of the run as it starts: found, compared with the run, loaded by itself."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.errors import UserError
from finetune.models.resolve import resolve_model
from finetune.run.base_weights import describe_weights
from finetune.run.preference_data import check_positions
from finetune.run.processes import plan_layout
from finetune.settings.alignment import BASE, START, has_reference

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.processes.groups import ProcessGroups
    from finetune.processes.phases import PhaseRecord
    from finetune.run.data import RunData
    from finetune.run.directory import RunDirectory
    from finetune.run.tokenizer import TokenizerPair
    from finetune.settings.arguments import Arguments
    from finetune.training.trainer import FinetuneTrainer


@dataclass(frozen=True)
class OtherModel:
    """A reference that is not the model of the run as it starts.

    Attributes:
        args: Settings of a run that would start from it, and neither trains nor evaluates.
        resolved: The model.
        identity: What tells it from others in `REFERENCE_FILE`.
    """

    args: Arguments
    resolved: ResolvedModel
    identity: str


def find_other_model(args: Arguments, resolved: ResolvedModel) -> OtherModel | None:
    """The reference that the settings ask for, compared with the layout before processes meet.

    Args:
        args: The settings of the run.
        resolved: The model that it trains.

    Returns:
        None where the run has no reference, or that is the model of the run as it starts.

    Raises:
        UserError: There is no such model, or it cannot be laid out over the processes.
    """
    if not has_reference(vars(args.alignment)):
        return None
    chosen = args.alignment.reference_model
    if chosen not in (START, BASE) and _same_folder(chosen, str(args.model.model_name_or_path)):
        chosen = BASE
    if chosen == START or (chosen == BASE and not _has_adapter(args)):
        return None
    if chosen == BASE:
        return OtherModel(_own_settings(args, resolved), resolved, BASE)
    try:
        found = resolve_model(chosen, text_only=args.model.text_only)
        own = _own_settings(args, found, chosen)
        plan_layout(own, found)
    except UserError as error:
        raise UserError([f"reference_model: {fault}" for fault in error.faults]) from None
    return OtherModel(own, found, _identify(found))


def _has_adapter(args: Arguments) -> bool:
    """Whether the run starts from more than the base: a saved adapter, or a prefix, which is never without effect."""
    return bool((args.model.lora and args.model.lora_path) or args.model.prefix_tuning)


def _same_folder(first: str, second: str) -> bool:
    return Path(first).exists() and Path(first).resolve() == Path(second).resolve()


def _own_settings(args: Arguments, resolved: ResolvedModel, name: str | None = None) -> Arguments:
    """Settings of a run that loads the model without an adapter, and neither trains nor evaluates."""
    changed: dict[str, Any] = {"lora": False, "lora_path": None, "prefix_tuning": False, "prefix_path": None}
    if name is not None:
        changed |= {"model_name_or_path": name, "tokenizer_name_or_path": None}
    if resolved.stored_format is not None:  # its files are packed already
        changed |= {"weight_quantize_algo": None, "weight_double_quant": False}
    training = copy.copy(args.training)
    vars(training).update(do_train=False, do_eval=False, report_to=[])
    return replace(args, model=replace(args.model, **changed), training=training)


def _identify(resolved: ResolvedModel) -> str:
    """A hash of the weights' files; of the name where they are not here yet."""
    files = describe_weights(resolved.folder) if resolved.folder and not resolved.remote else {}
    content = json.dumps(files or resolved.name, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def matching_tokenizer(
    other: OtherModel, args: Arguments, pair: TokenizerPair, data: RunData
) -> TokenizerPair:
    """The tokenizer of the reference, which has to mean the same by the ids of the data.

    Raises:
        UserError: It does not, or the model lacks embeddings or positions for them.
    """
    if other.identity == BASE:
        return pair
    from finetune.run.tokenizer import load_tokenizer_pair

    name, family = other.resolved.name, other.resolved.family
    own = load_tokenizer_pair(other.args, other.resolved)
    stores = [samples for samples in (data.train, data.dev) if len(samples)]
    ids = np.unique(np.concatenate([each.tokens for each in stores])).tolist()  # type: ignore[attr-defined]
    size = family.adapt_config(other.resolved.config).get("vocab_size")
    if size is not None and ids[-1] >= size:
        raise UserError(
            f"reference_model {name} has embeddings for {size:,} tokens, but the data have token {ids[-1]}, "
            f"{_token(pair, ids[-1])!r}: give a reference that knows all tokens of "
            f"{args.model.model_name_or_path}, or reference_model start"
        )
    for number in ids:
        if (ours := _token(pair, number)) != (theirs := _token(own, number)):
            raise UserError(
                f"reference_model {name} has another tokenizer than {args.model.model_name_or_path}: token {number} is "
                f"{theirs!r} there and {ours!r} here. Both must have the same one: give a model of the same origin, or "
                "reference_model start"
            )
    try:
        check_positions(data, other.args.data, other.resolved)  # type: ignore[arg-type]
    except UserError as error:
        raise UserError([f"reference_model {name}: {fault}" for fault in error.faults]) from None
    return own


def _token(pair: TokenizerPair, number: int) -> str | None:
    try:
        return str(pair.tokenizer.convert_ids_to_tokens([number])[0])
    except (IndexError, KeyError, ValueError):
        return None


def load_reference(
    other: OtherModel,
    run: RunDirectory,
    data: RunData,
    pair: TokenizerPair,
    *,
    groups: ProcessGroups,
    phases: PhaseRecord,
) -> FinetuneTrainer:
    """The model, frozen, as all ranks compute it together."""
    from finetune.run.model import load_base_model
    from finetune.run.trainer import build_trainer

    base, stage = load_base_model(other.args, other.resolved, pair, groups)
    for parameter in base.parameters():
        parameter.stop_gradient = True
    return build_trainer(
        other.args,
        run,
        base,
        data,
        pair,
        resolved=other.resolved,
        groups=groups,
        stage=stage,
        phases=phases,
    )


def release_memory() -> None:
    """Frees what nothing refers to any more, on the card too."""
    import paddle

    gc.collect()
    if paddle.device.is_compiled_with_cuda():
        paddle.device.cuda.empty_cache()
