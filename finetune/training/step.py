"""The forward and backward passes of one optimizer step, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import paddle

from finetune.training.loss import logits_of, token_loss_sum
from finetune.training.seeding import derive_seed

if TYPE_CHECKING:
    from finetune.parallel.groups import ProcessGroups
    from finetune.training.rows import Batch
    from finetune.training.trainer import FinetuneTrainer


class StepWork:
    """What `ParallelModel.train` asks for, for one optimizer step.

    Args:
        trainer: Gives the model and what surrounds it.
        step: Counted from 0.
        batches: This rank's micro-batches.
        num_label_tokens: Of the whole global batch.
    """

    def __init__(
        self, trainer: FinetuneTrainer, step: int, batches: Sequence[Batch], *, num_label_tokens: int
    ):
        self.trainer, self.step, self.batches = trainer, step, batches
        self.num_label_tokens = num_label_tokens
        self._label_ids: Any = None

    @contextmanager
    def context(self, number: int) -> Iterator[None]:
        """Noise, dropout and label positions of a micro-batch, for its forward and its backward pass."""
        trainer, batch = self.trainer, self.batches[number]
        paddle.seed(derive_seed(trainer.args.seed, "step", self.step, number))
        with ExitStack() as stack:
            for source in trainer.randomness:
                stack.enter_context(source.active(self.step, batch.segments))
            if trainer.label_positions:
                labels = paddle.to_tensor(batch.labels)
                self._label_ids = stack.enter_context(trainer.label_positions.only(labels))
            yield

    def forward(self, number: int) -> Any:
        """The model's outputs."""
        with self.trainer.autocast_smart_context_manager():
            return self.trainer.parallel.call(self.batches[number].tensors())

    def loss(self, number: int, outputs: Any) -> Any:
        """This micro-batch's part of the step's loss; scaled up in float16 runs."""
        batch, trainer = self.batches[number], self.trainer
        total = token_loss_sum(logits_of(outputs), self._label_ids, trainer.parallel.logits_group)
        loss = total * (batch.weight / self.num_label_tokens)
        return trainer.scaler.scale(loss) if trainer.do_grad_scaling else loss

    def finished(self, number: int) -> None:
        """Lets gradients of the micro-batch be summed early where the sharding stage wants it."""
        self.trainer.parallel.replicas.after_micro_batch()


def count_tokens(batches: Sequence[Batch], groups: ProcessGroups, *, stop: bool) -> tuple[int, int, bool]:
    """Tokens and label tokens of the whole global batch, and whether any rank was told to stop."""
    # The ranks of one model have the same batches; the first of them counts.
    own = groups.model.is_first
    num_tokens = sum(batch.num_tokens for batch in batches) if own else 0
    num_label_tokens = sum(batch.num_label_tokens for batch in batches) if own else 0
    sums = groups.world.all_reduce_numbers([num_tokens, num_label_tokens, float(stop)])
    return int(sums[0]), int(sums[1]), sums[2] > 0
