"""What preference alignment adds to a run: rows of groups, the loss, the reference, the evaluation."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.preference.sample import PreferenceSample, find_partners
from finetune.settings.alignment import REWARD
from finetune.storage.files import write_atomically

if TYPE_CHECKING:
    from finetune.data.batches.preference_rows import PreferenceRows
    from finetune.models.resolve import ResolvedModel
    from finetune.processes.groups import ProcessGroups
    from finetune.run.directory import RunDirectory
    from finetune.settings.arguments import Arguments
    from finetune.training.loss import LabelPositions
    from finetune.training.preference.evaluation import PreferenceEvaluation
    from finetune.training.preference.losses import LossSettings
    from finetune.training.preference.objective import PreferenceObjective
    from finetune.training.preference.passes import PreferencePasses
    from finetune.training.preference.reward_objective import RewardObjective
    from finetune.training.trainer import FinetuneTrainer

REFERENCE_FILE = "reference_log_probabilities.npz"
"""In the output folder: what the reference model gives to every answer, by split, with the hash of the data."""


def comparison_of(args: Arguments) -> str | None:
    """What the run compares: "pairs", "marked" (single answers, KTO), or None where it aligns nothing."""
    loss_type = args.alignment.loss_type
    return None if loss_type is None else ("marked" if loss_type == "kto" else "pairs")


def gives_rewards(args: Arguments) -> bool:
    """Whether the run trains a reward model."""
    return args.alignment.loss_type == REWARD


def loss_settings(args: Arguments) -> LossSettings:
    """The loss as the settings have it."""
    from dataclasses import fields

    from finetune.training.preference.losses import LossSettings

    return LossSettings(**{each.name: getattr(args.alignment, each.name) for each in fields(LossSettings)})


def build_preference_rows(
    args: Arguments,
    samples: Sequence[PreferenceSample],
    resolved: ResolvedModel,
    *,
    padding: dict[str, Any],
) -> PreferenceRows:
    """Rows whose answers share their prompt, where the family's attention can keep answers apart."""
    from finetune.data.batches.preference_rows import PreferenceRows, group_lengths
    from finetune.data.batches.reward_rows import RewardRows
    from finetune.data.packing.packing import pack

    model, training = args.model, args.training
    mask = resolved.family.packed_mask(
        resolved.config,
        fused=model.use_flash_attention,
        half=training.bf16 or training.fp16,
        has_prefix=model.prefix_tuning,
        shares_prompts=True,
    )
    if not resolved.family.packing:
        mask = None
    is_marked = comparison_of(args) == "marked"
    partners = find_partners(samples) if is_marked else None
    packing = None
    if args.data.zero_padding and mask is not None:
        lengths = group_lengths(samples, partners=partners, reads_ends=gives_rewards(args))
        # A partner's answer is not counted in max_length.
        packing = pack(lengths, max(args.data.max_length, int(lengths.max())), seed=training.seed)
    if gives_rewards(args):
        return RewardRows(samples, packing=packing, mask=mask, **padding)
    return PreferenceRows(
        samples,
        packing=packing,
        mask=mask,
        partners=partners,
        learns_prompts=loss_settings(args).learns_prompts,
        **padding,
    )


def build_objective(args: Arguments) -> PreferenceObjective | RewardObjective | None:
    """The loss of the training data; its reference comes later."""
    return None if comparison_of(args) is None else _make_objective(args)


def _make_objective(args: Arguments) -> PreferenceObjective | RewardObjective:
    from finetune.training.preference.objective import PreferenceObjective
    from finetune.training.preference.reward_objective import RewardObjective

    settings = loss_settings(args)
    return RewardObjective(settings) if gives_rewards(args) else PreferenceObjective(settings)


def build_preference_evaluation(
    args: Arguments, rows: PreferenceRows, *, label_positions: LabelPositions | None, groups: ProcessGroups
) -> PreferenceEvaluation:
    """The evaluation of the dev set; its reference comes later."""
    from finetune.training.preference.evaluation import PreferenceEvaluation
    from finetune.training.preference.passes import PreferencePasses

    batch_size = args.training.per_device_eval_batch_size
    passes = PreferencePasses(rows, batch_size=batch_size, label_positions=label_positions, groups=groups)
    return PreferenceEvaluation(passes, _make_objective(args))


def add_reference(args: Arguments, run: RunDirectory, trainer: FinetuneTrainer) -> list[str]:
    """Gives the losses of a run their reference: the weights as they are before a checkpoint is read.

    They are asked once about every answer. A run that continues takes the same figures from the file of its output
    folder, and so does a later command that evaluates what was trained.

    Returns:
        What the person should know.
    """
    objective = trainer.parts.objective
    if objective is None or not objective.settings.uses_reference:
        return []
    splits = _splits(args, trainer)
    is_fresh = args.training.do_train and run.resume is None and not run.trained
    known = {} if is_fresh else _read_known(run.path / REFERENCE_FILE, trainer.groups)
    found, notes = {}, []
    for split, (passes, each) in splits.items():
        fingerprint = passes.rows.fingerprint()
        table = known.get(f"{split} {fingerprint}")
        if table is None:
            table = _compute(passes, trainer)
            notes += _notes_on_missing(args, split, is_fresh=is_fresh)
        each.reference = found[f"{split} {fingerprint}"] = table
    if trainer.groups.is_first and args.training.do_train and found.keys() - known.keys():
        content = io.BytesIO()
        np.savez(content, **(known | found))
        write_atomically(run.path / REFERENCE_FILE, content.getvalue())
    return notes


def _splits(
    args: Arguments, trainer: FinetuneTrainer
) -> dict[str, tuple[PreferencePasses, PreferenceObjective | RewardObjective]]:
    from finetune.data.batches.batch_source import PreferenceSource
    from finetune.training.preference.evaluation import PreferenceEvaluation
    from finetune.training.preference.passes import PreferencePasses

    found: dict[str, tuple[PreferencePasses, PreferenceObjective | RewardObjective]] = {}
    if isinstance(trainer.batches, PreferenceSource) and trainer.parts.objective:
        passes = PreferencePasses(
            trainer.batches.groups,
            batch_size=args.training.per_device_eval_batch_size,
            label_positions=trainer.parts.label_positions,
            groups=trainer.groups,
        )
        found["train"] = passes, trainer.parts.objective
    if isinstance(trainer.evaluation, PreferenceEvaluation):
        found["dev"] = trainer.evaluation.passes, trainer.evaluation.objective
    return found


def _compute(passes: PreferencePasses, trainer: FinetuneTrainer) -> NDArray[Any]:
    from finetune.training.preference.passes import reference_log_probabilities

    trainer.parts.phases.enter("reference model")
    trainer.model.eval()
    log = trainer.training_log
    with (
        log.evaluating(passes.num_batches, "Reference") as advance,
        trainer.autocast_smart_context_manager(),
    ):
        table = reference_log_probabilities(passes, trainer.parallel, advance)
    trainer.model.train()
    return table


def _read_known(path: Path, groups: ProcessGroups) -> dict[str, NDArray[Any]]:
    """What the file holds, the same on all ranks though the first one alone may see it; nothing of a damaged file."""
    from finetune.processes.joint_steps import on_first

    def read() -> dict[str, Any]:
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name].tolist() for name in file.files}
        except (OSError, ValueError, EOFError, KeyError):
            return {}

    return {name: np.array(rows, dtype=np.float32) for name, rows in on_first(groups, read).items()}


def _notes_on_missing(args: Arguments, split: str, *, is_fresh: bool) -> list[str]:
    if is_fresh:
        return []
    if args.training.do_train:
        return [f"the reference log-probabilities of {split} are not in the output folder: computed anew"]
    return [
        f"{REFERENCE_FILE} in the output folder does not know these data: the reference is the model given, so rewards "
        "are 0 where no adapter is"
    ]
