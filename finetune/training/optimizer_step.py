"""One optimizer step: passes, sums over the ranks, clipping, update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.training.gradient_norm import clip_factor
from finetune.training.overflow import check_finite
from finetune.training.step import ForwardParts, StepComputation, end_step

if TYPE_CHECKING:
    from finetune.data.batches.batch_source import StepBatch


@dataclass(frozen=True)
class StepResult:
    """A step that is done.

    Attributes:
        loss: In nats per label token of the global batch.
        grad_norm: L2 norm of its gradients before clipping.
        learning_rate: The rate it was taken with.
        stops: Whether any process was told to stop.
        facts: What only float16 runs tell: `loss_scale`, and `skipped` where gradients overflowed.
        figures: Metrics of the global batch that the loss gives beside itself.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    stops: bool
    facts: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


class OptimizerStep:
    """Computes the steps of a run.

    Args:
        parts: The model and what its passes use.
        optimizer: Of what this rank updates, without clipping of its own.
        lr_scheduler: Its learning rate.
        max_grad_norm: Gradients are scaled down to this norm; 0 or less only measures.
    """

    def __init__(
        self,
        parts: ForwardParts,
        *,
        optimizer: Any,
        lr_scheduler: Any,
        max_grad_norm: float,
    ):
        self._parts, self._parallel, self.overflow = parts, parts.parallel, parts.overflow
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._max_grad_norm = max_grad_norm

    def train_batch(self, step: int, batch: StepBatch, *, stop: bool) -> StepResult:
        """Forward, backward and update.

        Args:
            step: Counted from 0.
            batch: This rank's part of the global batch.
            stop: Whether this process was told to stop.

        Raises:
            RunError: Loss or gradients are no finite numbers, or the processes have different data.
        """
        computation = StepComputation(self._parts, step, batch)
        computation.estimate()
        share = self._parallel.train(computation, len(batch.micro_batches))
        if self._parts.balance:
            # Of the global batch, so that each share of the data reports a part of it.
            share += self._parts.balance.loss / self._parallel.groups.layout.data_world
        self._parts.phases.enter("gradients", step + 1)
        loss, norm, stops, sums = end_step(
            self._parallel, batch, share, stop=stop, figures=computation.figures
        )
        scale = self.overflow.scale if self.overflow else 1.0
        loss, norm = loss / scale, norm / scale
        learning_rate = float(self._lr_scheduler.get_lr())
        facts: dict[str, Any] = {}
        if self.overflow:
            facts = self.overflow.check(loss, norm, step)
        else:
            check_finite(loss, norm, step)
        self._parts.phases.enter("update", step + 1)
        self._update_weights(norm, skips="skipped" in facts)
        objective = self._parts.objective
        figures = objective.metrics(sums, batch.num_groups) if objective else {}
        return StepResult(loss, norm, learning_rate, stops, facts, figures)

    def _update_weights(self, norm: float, *, skips: bool) -> None:
        """Clips and lets the optimizer step.

        Args:
            norm: Of the gradients.
            skips: Whether gradients overflowed in float16: weights, optimizer state and schedule then stay.
        """
        replicas = self._parallel.replicas
        factor = 1.0 if skips else clip_factor(norm, self._max_grad_norm)
        if factor != 1.0:
            replicas.scale_gradients(factor)
        if self.overflow:
            self.overflow.step(self._optimizer, skips=skips)
        else:
            self._optimizer.step()
        if not skips:
            replicas.after_update()
            self._lr_scheduler.step()
        replicas.clear_gradients()
