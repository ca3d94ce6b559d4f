"""PaddleNLP's TrainingArguments from ours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.settings.arguments import Arguments


def schedule_notes(args: Arguments, num_steps: int) -> Iterator[str]:
    """What is odd about the course of the learning rate, as lines to show before the run.

    Args:
        args: All settings.
        num_steps: Optimizer steps of the whole run.
    """
    training = args.training
    warmup = training.warmup_steps or math.ceil(num_steps * training.warmup_ratio)
    if warmup >= num_steps:
        given = "warmup_steps" if training.warmup_steps else f"warmup_ratio {training.warmup_ratio:g}"
        yield (
            f"warning: the learning rate warms up for {warmup} steps ({given}) and the training has {num_steps}: "
            f"learning_rate {training.learning_rate:g} is never used for a step; lower {given.split()[0]} or train longer"
        )


def build_training_arguments(args: Arguments) -> Any:
    """The object that PaddleNLP's Trainer reads.

    It carries the model settings too, because PaddleNLP's parallel code looks for them there.
    """
    from paddlenlp.trainer import TrainingArguments
    from paddlenlp.transformers.configuration_utils import llmmetaclass

    from finetune.settings.registry import known_settings
    from finetune.settings.trackers import OWN_TRACKERS

    secrets = {name for name, setting in known_settings().items() if setting.is_secret}

    @llmmetaclass
    class FinetuneTrainingArguments(TrainingArguments):
        """PaddleNLP's arguments with the model settings its parallel code looks for."""

        def to_sanitized_dict(self) -> dict[str, Any]:
            """Settings for VisualDL's table, whose integer column no longer takes booleans."""
            settings = super().to_sanitized_dict()
            return {
                name: str(value) if isinstance(value, bool) else value for name, value in settings.items()
            }

        def to_dict(self) -> dict[str, Any]:
            """Settings as they may be written to a log: without keys and tokens."""
            return {name: value for name, value in super().to_dict().items() if name not in secrets}

    # Master gradients are kept where gradients are summed over processes (finetune/parallel/sharding/local_gradients.py).
    kwargs = args.training_kwargs() | {"amp_master_grad": False}
    # Callbacks for services that PaddleNLP does not know are added in `finetune.run.trainer`.
    kwargs["report_to"] = [name for name in args.training.report_to if name not in OWN_TRACKERS]
    try:
        return FinetuneTrainingArguments(**kwargs)
    except (ValueError, TypeError, AssertionError) as error:
        given = ", ".join(sorted(name for name in args.given if name in kwargs))
        raise UserError(
            f"PaddleNLP refuses these training settings ({type(error).__name__}: {error}): correct or remove the one that "
            f"it names among {given}"
        ) from error
