"""The forward and backward passes of one optimizer step, micro-batch by micro-batch.

A host that reads a number from a GPU waits until the GPU has done everything before it, and the GPU then waits for the
host. So a step reads once, at its end: the loss, the gradient norm and whether to stop come together (`end_step`).
What a forward or backward pass needs to know, such as the number of label tokens, the host knows from the data.
In float16 Paddle's GradScaler reads besides, when the optimizer has stepped (`finetune/training/overflow.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import paddle

from finetune.errors import RunError
from finetune.machine.randomness.seeding import derive_seed
from finetune.training.loss import logits_of, token_loss_sum

if TYPE_CHECKING:
    from finetune.data.batches.batch_source import StepBatch
    from finetune.parallel.parallel_model import ParallelModel
    from finetune.training.trainer import FinetuneTrainer


class StepComputation:
    """What `ParallelModel.train` asks for, for one optimizer step.

    Args:
        trainer: Gives the model and what surrounds it.
        step: Counted from 0.
        batch: This rank's part of the global batch.
    """

    def __init__(self, trainer: FinetuneTrainer, step: int, batch: StepBatch):
        self.trainer, self.step, self.batches = trainer, step, batch.micro_batches
        self.num_label_tokens = batch.num_label_tokens
        self._label_ids: Any = None

    def shape(self, number: int) -> tuple[int, int]:
        """Rows and tokens of each, of a micro-batch."""
        return self.batches[number].shape

    @contextmanager
    def context(self, number: int) -> Iterator[None]:
        """Noise, dropout and label positions of a micro-batch, for its forward and its backward pass."""
        trainer, batch = self.trainer, self.batches[number]
        paddle.seed(derive_seed(trainer.args.seed, "step", self.step, number))
        with ExitStack() as stack:
            for source in trainer.randomness:
                stack.enter_context(source.active(self.step, batch.segments))
            if trainer.label_positions:
                self._label_ids = stack.enter_context(trainer.label_positions.only(batch.labels))
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


def end_step(
    parallel: ParallelModel, batch: StepBatch, loss: Any, *, stop: bool
) -> tuple[float, float, bool]:
    """Sums what the ranks computed: the one place of a step where numbers are read from the device.

    Args:
        parallel: The model, after the backward passes of all micro-batches.
        batch: What this rank trained on.
        loss: This rank's share of the step's loss.
        stop: Whether this process was told to stop.

    Returns:
        The loss of the step, the L2 norm of its gradients, and whether any process was told to stop.

    Raises:
        RunError: The processes have different data.
    """
    # The ranks of one model have the same micro-batches; the first of them counts.
    own = batch.micro_batches if parallel.groups.model.is_first else []
    num_own = sum(each.num_label_tokens for each in own)
    total_loss, norm, (num_label_tokens, num_stops) = parallel.sum_gradients(loss, [num_own, float(stop)])
    if num_label_tokens != batch.num_label_tokens:
        raise RunError(
            f"the processes trained on {num_label_tokens:,.0f} label tokens together, but the global batch has "
            f"{batch.num_label_tokens:,} here: their training data differ. Give all hosts the same files"
        )
    return total_loss, norm, num_stops > 0
