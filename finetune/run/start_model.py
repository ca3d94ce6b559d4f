"""The model and the adapter that a run starts from, checked before anything is loaded; the head of a reward model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from finetune.adapters.adapter_folder import has_reward_head
from finetune.errors import UserError
from finetune.models.hubs.adapters import local_adapter
from finetune.models.reward_head import REWARD_WEIGHT, class_name, is_reward_config, reward_config
from finetune.run.adapter import check_adapter
from finetune.run.adapter_source import fetch_adapter
from finetune.run.alignment import gives_rewards

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.settings.arguments import Arguments


def check_start(args: Arguments, resolved: ResolvedModel) -> tuple[ResolvedModel, list[str]]:
    """The model with the head that the run trains, compared with its settings and its adapter, and lines for the person.

    Raises:
        UserError: They do not belong together.
    """
    notes = [*resolved.notes, *fetch_adapter(args)]
    resolved, head_notes = _resolve_head(args, resolved)
    return resolved, [*notes, *head_notes, *check_adapter(args, resolved)]


def _resolve_head(args: Arguments, resolved: ResolvedModel) -> tuple[ResolvedModel, list[str]]:
    if not gives_rewards(args):
        _refuse_rewards(args, resolved)
        return resolved, []
    notes = []
    adapter = args.model.lora_path if args.model.lora else None
    if not (is_reward_config(resolved.config) or adapter):
        notes.append(
            f"Reward model: {REWARD_WEIGHT} takes the place of the output layer; it is new and drawn with the seed"
        )
    try:
        with_head = replace(resolved, config=reward_config(resolved.config, resolved.family))
    except UserError as error:
        raise UserError(f"model {resolved.name}: {error}") from None
    if adapter and not has_reward_head(local_adapter(adapter)):
        raise UserError(
            f"lora_path {adapter} was not trained with a reward head, and loss_type is reward: merge it into "
            "its base with merge_lora_params.py and start from the result"
        )
    return with_head, notes


def _refuse_rewards(args: Arguments, resolved: ResolvedModel) -> None:
    if is_reward_config(resolved.config):
        name = class_name(resolved.config)
        raise UserError(
            f"model {resolved.name} is a {name}, which gives values and no text: set loss_type to reward to train a "
            "reward model further, or give a causal language model"
        )
    adapter = args.model.lora_path if args.model.lora else None
    if adapter and has_reward_head(local_adapter(adapter)):
        raise UserError(
            f"lora_path {adapter} is the adapter of a reward model: set loss_type to reward to train it further"
        )
