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
from finetune.training.preference.objective import Divisors, PreferenceObjective

if TYPE_CHECKING:
    from finetune.data.batches.batch_source import StepBatch
    from finetune.machine.randomness.source import Randomness
    from finetune.parallel.parallel_model import ParallelModel
    from finetune.processes.phases import PhaseRecord
    from finetune.training.expert_balance import ExpertBalance
    from finetune.training.loss import LabelPositions
    from finetune.training.overflow import OverflowGuard
    from finetune.training.preference.reward_objective import RewardObjective


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
        objective: The loss of preference data; None: of label tokens.
        balance: The loss that spreads tokens over experts; None: there is none.
    """

    parallel: ParallelModel
    seed: int
    autocast: Callable[[], AbstractContextManager[Any]]
    phases: PhaseRecord
    label_positions: LabelPositions | None = None
    randomness: Sequence[Randomness] = ()
    overflow: OverflowGuard | None = None
    objective: PreferenceObjective | RewardObjective | None = None
    balance: ExpertBalance | None = None


class StepComputation:
    """What `ParallelModel.train` asks for, for one optimizer step.

    Args:
        parts: The model and what surrounds it.
        step: Counted from 0.
        batch: This rank's part of the global batch.
    """

    def __init__(self, parts: ForwardParts, step: int, batch: StepBatch):
        self.parts, self.step = parts, step
        self.batches: list[Any] = batch.micro_batches  # of preference groups where there is an objective
        self.num_label_tokens = batch.num_label_tokens
        self._label_ids: Any = None
        self._divisors = Divisors(batch.num_groups, batch.num_learned_tokens)
        self._divergences: Any = None
        self.figures: Any = None
        if parts.objective:
            self.figures = paddle.zeros([parts.objective.num_sums], dtype="float64")

    def estimate(self) -> None:
        """For losses that compare with an estimate over the global batch: makes it, in a forward pass of its own."""
        parts, objective = self.parts, self.parts.objective
        if parts.balance:
            self._count_choices(parts.balance)
        if not isinstance(objective, PreferenceObjective) or not objective.settings.estimates_divergence:
            return
        sums = paddle.zeros([2], dtype="float64")
        for number, batch in enumerate(self.batches):
            with self.context(number), parts.autocast():
                outputs = parts.parallel.forward(batch.tensors())
                if outputs is not None:
                    logits = logits_of(outputs)
                    sums += objective.estimate(batch, logits, self._label_ids, parts.parallel.logits_group)
        self._divergences = objective.divergences(parts.parallel.sum_samples(sums), self._divisors.num_groups)

    def _count_choices(self, balance: ExpertBalance) -> None:
        parts = self.parts
        with balance.counting():
            for number, batch in enumerate(self.batches):
                with self.context(number), parts.autocast():
                    parts.parallel.forward(batch.tensors())
        if parts.overflow:
            balance.scale(parts.overflow.scale)

    def shape(self, number: int) -> tuple[int, int]:
        """Rows and tokens of each, of a micro-batch."""
        num_rows, length = self.batches[number].shape
        return num_rows, length

    @contextmanager
    def context(self, number: int) -> Iterator[None]:
        """Noise, dropout and label positions of a micro-batch, for its forward and its backward pass."""
        parts, batch = self.parts, self.batches[number]
        paddle.seed(derive_seed(parts.seed, "step", self.step, number))
        with ExitStack() as stack:
            for source in parts.randomness:
                stack.enter_context(source.active(self.step, batch.segments))
            if parts.balance:
                stack.enter_context(parts.balance.active(batch.segments, self.shape(number)[1], batch.weight))
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
        logits, group = logits_of(outputs), parts.parallel.logits_group
        if parts.objective:
            loss, figures = parts.objective.share(
                batch, logits, self._label_ids, group, divisors=self._divisors, divergences=self._divergences
            )
            self.figures += figures
        else:
            total = token_loss_sum(logits, self._label_ids, group)
            loss = total * (batch.weight / self.num_label_tokens)
        return parts.overflow.scaler.scale(loss) if parts.overflow else loss

    def finished(self, number: int) -> None:
        """Lets gradients of the micro-batch be summed early where the sharding stage wants it."""
        self.parts.parallel.replicas.after_micro_batch()


def end_step(
    parallel: ParallelModel, batch: StepBatch, loss: Any, *, stop: bool, figures: Any = None
) -> tuple[float, float, bool, list[float]]:
    """Sums what the ranks computed: the one place of a step where numbers are read from the device.

    Args:
        parallel: The model, after the backward passes of all micro-batches.
        batch: What this rank trained on.
        loss: This rank's share of the step's loss.
        stop: Whether this process was told to stop.
        figures: float64 [n], what the loss summed beside itself; None for nothing.

    Returns:
        The loss of the step, the L2 norm of its gradients, whether any process was told to stop, and the sums of
        `figures`.

    Raises:
        RunError: The processes have different data.
    """
    # The ranks of one model have the same micro-batches; the first of them counts.
    own = batch.micro_batches if parallel.groups.model.is_first else []
    num_own = sum(each.num_label_tokens for each in own)
    counts = [num_own, float(stop)]
    total_loss, norm, sums = parallel.sum_gradients(loss, counts, figures)
    num_label_tokens, num_stops, *others = sums
    if num_label_tokens != batch.num_label_tokens:
        raise RunError(
            f"the processes trained on {num_label_tokens:,.0f} label tokens together, but the global batch has "
            f"{batch.num_label_tokens:,} here: their training data differ. Give all hosts the same files"
        )
    return total_loss, norm, num_stops > 0, others
