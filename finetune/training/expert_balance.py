"""The loss that keeps tokens spread over experts, Shazeer et al. 2017, as transformers' `load_balancing_loss_func` has it.

Over all tokens of the global batch that are no padding, whether they are learned or not, and all layers with experts,

    coefficient * experts * sum over experts e of (choices of e / T) * (sum of the probabilities of e / T)

where T is tokens times layers with experts. Both factors are of the whole global batch, so no layout changes the
loss: a mean over micro-batches would be another one for every size of them. How often an expert is chosen has no
gradient. So a pass without gradients counts first; then what the loss adds to the gradient of every probability is one
row, the same for all tokens, which each router adds in its own backward pass, wherever it stands in a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddle.autograd import PyLayer

from finetune.families.experts import ExpertFeedForward

if TYPE_CHECKING:
    from finetune.processes.groups import ProcessGroups


class ExpertBalance:
    """Counts how tokens are routed and hands routers their gradient; one for all layers of this rank.

    Args:
        model: This rank's part of the model.
        num_routed: Of each layer that has some.
        coefficient: What the loss is multiplied by.
        groups: The run's process groups.

    Attributes:
        loss: Of the last global batch that was counted, float64 [1], on the device, the same on every rank.
    """

    def __init__(self, model: Any, num_routed: int, coefficient: float, groups: ProcessGroups):
        self._layers = [each for each in model.sublayers() if isinstance(each, ExpertFeedForward)]
        self._num_routed, self._coefficient, self._groups = num_routed, coefficient, groups
        self._real: Any = None
        self._sums: Any = None
        self._gradient: Any = None
        self.loss: Any = None
        for layer in self._layers:
            layer.observer = self

    @contextmanager
    def active(self, rows: Sequence[Sequence[tuple[int, int]]], length: int, weight: float) -> Iterator[None]:
        """Within the block the routing of a micro-batch is seen.

        Args:
            rows: For each row its samples in a row: (tokens, sample index).
            length: Tokens of a row, padding included.
            weight: Of the micro-batch; 0 where it only keeps ranks in step.
        """
        real = np.zeros((len(rows), length), np.float32)
        for row, samples in zip(real, rows, strict=True):
            row[: sum(size for size, _ in samples)] = weight
        self._real = paddle.to_tensor(real.reshape(-1, 1))  # [tokens, 1]
        try:
            yield
        finally:
            self._real = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within the block passes count; after it `loss` and the gradients of the routers are known."""
        num_routed = self._num_routed
        # Choices, sums of probabilities, and the number of tokens times layers, in float64: [2 * experts + 1].
        self._sums = paddle.zeros([2 * num_routed + 1], dtype="float64")
        try:
            yield
        finally:
            sums, self._sums = self._sums, None
        if not self._groups.tensor.is_first:
            sums = paddle.zeros_like(sums)
        self._groups.world.all_reduce(sums)
        chosen, probabilities, total = paddle.split(sums, [num_routed, num_routed, 1])
        factor = self._coefficient * num_routed / total.square()
        self.loss = factor * (chosen * probabilities).sum()
        self._gradient = (factor * chosen).astype("float32")  # [experts]

    def scale(self, factor: float) -> None:
        """Multiplies loss and gradients of the step, where what it learns is multiplied."""
        self.loss, self._gradient = self.loss * factor, self._gradient * factor

    def see(self, probabilities: Any, chosen: Any) -> Any:
        """See `finetune.families.experts.RoutingObserver`."""
        if self._real is None:
            return probabilities
        if self._sums is not None:
            self._count(probabilities, chosen)
        elif self._gradient is not None and not probabilities.stop_gradient:
            return _AddedGradient.apply(probabilities, self._real * self._gradient)
        return probabilities

    def _count(self, probabilities: Any, chosen: Any) -> None:
        num_routed = probabilities.shape[-1]
        choices = paddle.nn.functional.one_hot(chosen, num_routed).sum(1)  # [tokens, experts]
        columns = paddle.concat([choices, probabilities, paddle.ones_like(self._real)], axis=1)
        self._sums += (columns * self._real).astype("float64").sum(0)


class _AddedGradient(PyLayer):
    """The identity, whose backward pass adds a gradient."""

    @staticmethod
    def forward(context: Any, value: Any, gradient: Any) -> Any:
        context.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(context: Any, passed: Any) -> Any:
        (gradient,) = context.saved_tensor()
        return passed + gradient, None
