"""Runs a pipeline's schedule: computes this rank's parts and exchanges hidden states with its neighbours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import paddle

from finetune.parallel.pipe.loss_sum import LossSum
from finetune.parallel.pipe.schedule import Event, schedule
from finetune.parallel.pipe.stage import Stage
from finetune.processes.groups import Group

_cached_schedule = functools.cache(schedule)
_DTYPES = ("float32", "bfloat16", "float16", "float64")


class MicroBatchComputation(Protocol):
    """What the trainer computes for a micro-batch."""

    def shape(self, number: int) -> tuple[int, ...]:
        """What the shapes of hidden states depend on: rows and tokens of each."""
        ...

    def context(self, number: int) -> AbstractContextManager[Any]:
        """Everything that must hold during the forward pass and the recomputation in the backward pass."""
        ...

    def forward(self, number: int) -> Any:
        """The model's outputs; only those of the last part are looked at."""
        ...

    def loss(self, number: int, outputs: Any) -> Any:
        """The scalar to differentiate, from the outputs of the last part."""
        ...

    def finished(self, number: int) -> None:
        """A backward pass of this micro-batch is done."""
        ...


@dataclass(frozen=True)
class _Kind:
    """Tensors of one shape and dtype: what both ends of a transfer know of it beforehand.

    Attributes:
        of: "forward", "backward" or "evaluation".
        part: The part of the model that computes the tensor next.
        batch_shape: Of the micro-batch.
    """

    of: str
    part: int
    batch_shape: tuple[int, ...]


class Pipeline:
    """A stage and its neighbours.

    Batches are of any length, so the shape of hidden states is not known beforehand. It is sent ahead, and read from the
    device, the first time that a kind of tensor is handed on; from then on both ends know it.

    Args:
        stage: What this rank computes.
        group: The ranks of the pipeline, first stage first.
    """

    def __init__(self, stage: Stage, group: Group):
        self.stage, self.group = stage, group
        self._sent: dict[_Kind, list[int]] = {}
        self._received: dict[_Kind, tuple[list[int], str]] = {}

    @property
    def is_last(self) -> bool:
        """Whether the loss is computed here."""
        return self.stage.plan.holds_last

    def train(self, work: MicroBatchComputation, num_micro_batches: int) -> Any:
        """Runs forward and backward passes of all micro-batches.

        Returns:
            The sum of the losses, float64 [1], on the last stage; 0 elsewhere.
        """
        plan = self.stage.plan
        run = _ScheduleExecution(self, work)
        for event in _cached_schedule(plan.num_ranks, plan.num_chunks, num_micro_batches, plan.rank):
            getattr(run, event.kind)(event)
        return run.total_loss.value

    def forward(self, compute: Callable[[], Any], shape: tuple[int, ...]) -> Any:
        """One forward pass through all parts, without gradients.

        Args:
            compute: Runs the model on this rank's copy of the batch.
            shape: Rows of the batch and tokens of each.

        Returns:
            The outputs of the last part, on the last stage; None elsewhere.
        """
        plan, outputs = self.stage.plan, None
        with paddle.no_grad():
            for part in range(plan.rank, plan.num_parts, plan.num_ranks):
                kind = _Kind("evaluation", part, shape)
                received = self._receive((part - 1) % plan.num_ranks, kind) if part > 0 else None
                with self.stage.computing(part, received):
                    outputs = compute()
                if part < plan.num_parts - 1:
                    kind = _Kind("evaluation", part + 1, shape)
                    self._send(self.stage.take_output(), (part + 1) % plan.num_ranks, kind)
                    outputs = None
        return outputs

    def _send(self, tensor: Any, to: int, kind: _Kind) -> None:
        """Shape and dtype go first where the receiver cannot know them: the first time for this kind."""
        header = [_DTYPES.index(str(tensor.dtype).rpartition(".")[2]), *tensor.shape]
        if kind not in self._sent:
            self._sent[kind] = header
            self.group.send(paddle.to_tensor(header + [0] * (5 - len(header)), dtype="int64"), to)
        elif self._sent[kind] != header:
            raise RuntimeError(f"{kind} was {self._sent[kind]} and is {header} (dtype and shape) now")
        self.group.send(tensor.detach(), to)

    def _receive(self, source: int, kind: _Kind) -> Any:
        if kind not in self._received:
            header = paddle.zeros([5], dtype="int64")
            self.group.receive(header, source)
            dtype, *sizes = header.tolist()
            self._received[kind] = [size for size in sizes if size], _DTYPES[dtype]
        shape, dtype = self._received[kind]
        tensor = paddle.empty(shape, dtype=dtype)
        self.group.receive(tensor, source)
        return tensor


class _ScheduleExecution:
    """One optimizer step's way through the schedule: which tensors are alive."""

    def __init__(self, pipeline: Pipeline, work: MicroBatchComputation):
        self.pipeline, self.work = pipeline, work
        self.inputs: dict[tuple[int, int], Any] = {}
        self.outputs: dict[tuple[int, int], Any] = {}
        self.gradients: dict[tuple[int, int], Any] = {}
        self.total_loss = LossSum()
        self.last_part = pipeline.stage.plan.num_parts - 1

    def forward(self, event: Event) -> None:
        key, number = (event.part, event.micro_batch), event.micro_batch
        received = self.inputs.get(key)
        stage = self.pipeline.stage
        with stage.computing(event.part, received), self.work.context(number):
            outputs = self.work.forward(number)
            if event.part == self.last_part:
                loss = self.work.loss(number, outputs)
                self.total_loss.add(loss)
                self.outputs[key] = loss
            else:
                self.outputs[key] = stage.take_output()

    def backward(self, event: Event) -> None:
        key, number = (event.part, event.micro_batch), event.micro_batch
        output, received = self.outputs.pop(key), self.inputs.pop(key, None)
        gradient = self.gradients.pop(key, None)
        with self.pipeline.stage.computing(event.part, received), self.work.context(number):
            if not output.stop_gradient:
                paddle.autograd.backward([output], [gradient])
        if received is not None:
            self.gradients[(event.part - 1, number)] = _gradient_of(received)
        self.work.finished(number)

    def send(self, event: Event) -> None:
        if event.of == "backward":
            tensor = self.gradients.pop((event.part, event.micro_batch))
        else:
            tensor = self.outputs[(event.part - 1, event.micro_batch)]
        self.pipeline._send(tensor, event.peer, self._kind(event))

    def receive(self, event: Event) -> None:
        tensor = self.pipeline._receive(event.peer, self._kind(event))
        if event.of == "backward":
            self.gradients[(event.part, event.micro_batch)] = tensor
        else:
            tensor.stop_gradient = False
            self.inputs[(event.part, event.micro_batch)] = tensor

    def _kind(self, event: Event) -> _Kind:
        return _Kind(event.of, event.part, self.work.shape(event.micro_batch))


def _gradient_of(received: Any) -> Any:
    """The gradient of hidden states that came in; zeros where nothing asked for one."""
    gradient = received.grad
    return paddle.zeros_like(received) if gradient is None else gradient
