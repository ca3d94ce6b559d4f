"""The forward and backward passes of one optimizer step, micro-batch by micro-batch.

A host that reads a number from a GPU waits until the GPU has done everything before it, and the GPU then waits for the
host. So a step reads once, at its end: the loss, the gradient norm and whether to stop come together (`end_step`).
What a forward or backward pass needs to know, such as the number of label tokens, the host knows from the data.
In float16 Paddle's GradScaler reads besides, when the optimizer has stepped (`finetune/training/overflow.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import paddle

from finetune.errors import RunError
from finetune.machine.randomness.seeding import derive_seed
from finetune.training.loss import logits_of, token_loss_sum

if TYPE_CHECKING:
    from finetune.data.batches.batch_source import StepBatch
    from finetune.machine.randomness.source import Randomness
    from finetune.parallel.parallel_model import ParallelModel
    from finetune.processes.phases import PhaseRecord
    from finetune.training.loss import LabelPositions
    from finetune.training.overflow import OverflowGuard


@dataclass(frozen=True)
class ForwardParts:
    """What the passes of every step use.

    Attributes:
        parallel: The model.
        seed: Of the run.
        autocast: Gives the context of mixed precision.
        phases: What this process does.
        label_positions: Restricts logits to labelled positions; None where no logits are computed.
        randomness: What draws by sample, such as NEFTune noise and dropout.
        overflow: Scales the loss of float16 runs; None in others.
    """

    parallel: ParallelModel
    seed: int
    autocast: Callable[[], AbstractContextManager[Any]]
    phases: PhaseRecord
    label_positions: LabelPositions | None = None
    randomness: Sequence[Randomness] = ()
    overflow: OverflowGuard | None = None


class StepComputation:
    """What `ParallelModel.train` asks for, for one optimizer step.

    Args:
        parts: The model and what surrounds it.
        step: Counted from 0.
        batch: This rank's part of the global batch.
    """

    def __init__(self, parts: ForwardParts, step: int, batch: StepBatch):
        self.parts, self.step, self.batches = parts, step, batch.micro_batches
        self.num_label_tokens = batch.num_label_tokens
        self._label_ids: Any = None

    def shape(self, number: int) -> tuple[int, int]:
        """Rows and tokens of each, of a micro-batch."""
        return self.batches[number].shape

    @contextmanager
    def context(self, number: int) -> Iterator[None]:
        """Noise, dropout and label positions of a micro-batch, for its forward and its backward pass."""
        parts, batch = self.parts, self.batches[number]
        paddle.seed(derive_seed(parts.seed, "step", self.step, number))
        with ExitStack() as stack:
            for source in parts.randomness:
                stack.enter_context(source.active(self.step, batch.segments))
            if parts.label_positions:
                self._label_ids = stack.enter_context(parts.label_positions.only(batch.labels))
            yield

    def forward(self, number: int) -> Any:
        """The model's outputs."""
        with self.parts.autocast():
            return self.parts.parallel.call(self.batches[number].tensors())

    def loss(self, number: int, outputs: Any) -> Any:
        """This micro-batch's part of the step's loss; scaled up in float16 runs."""
        batch, parts = self.batches[number], self.parts
        total = token_loss_sum(logits_of(outputs), self._label_ids, parts.parallel.logits_group)
        loss = total * (batch.weight / self.num_label_tokens)
        return parts.overflow.scaler.scale(loss) if parts.overflow else loss

    def finished(self, number: int) -> None:
        """Lets gradients of the micro-batch be summed early where the sharding stage wants it."""
        self.parts.parallel.replicas.after_micro_batch()


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
