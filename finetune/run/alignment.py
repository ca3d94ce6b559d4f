"""What preference alignment adds to a run: rows of groups, the loss, the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.data.preference.sample import PreferenceSample, find_partners
from finetune.settings.alignment import REWARD

if TYPE_CHECKING:
    from finetune.data.batches.preference_rows import PreferenceRows
    from finetune.models.resolve import ResolvedModel
    from finetune.processes.groups import ProcessGroups
    from finetune.settings.arguments import Arguments
    from finetune.training.loss import LabelPositions
    from finetune.training.preference.evaluation import PreferenceEvaluation
    from finetune.training.preference.losses import LossSettings
    from finetune.training.preference.objective import PreferenceObjective
    from finetune.training.preference.reward_objective import RewardObjective


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
        learns_prompts=loss_settings(args).learns_prompts and not resolved.family.sees_ahead,
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
