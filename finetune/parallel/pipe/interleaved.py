"""A pipeline with virtual stages: computes this rank's parts in the schedule's order, transfers running beside it.

Fleet's classes for virtual stages refuse two ranks and fewer micro-batches than ranks, and below twice the ranks they
take all forward passes first, so that the activations of all micro-batches are alive. This one takes any numbers.
"""

from __future__ import annotations

import functools
from typing import Any

import paddle

from finetune.parallel.pipe.hidden_states import HiddenStates
from finetune.parallel.pipe.loss_sum import LossSum
from finetune.parallel.pipe.micro_batches import MicroBatchComputation
from finetune.parallel.pipe.schedule import Event, schedule
from finetune.parallel.pipe.stage import Stage
from finetune.processes.groups import Group

_cached_schedule = functools.cache(schedule)


class InterleavedPipeline:
    """The schedule of virtual stages over the parts that this rank holds.

    Args:
        stage: What this rank computes.
        hidden: What ranks know of the tensors that they hand on.
        group: The ranks of the pipeline, first stage first.

    Attributes:
        engine_name: What a run tells of it.
    """

    engine_name = "finetune InterleavedPipeline"

    def __init__(self, stage: Stage, hidden: HiddenStates, group: Group):
        self.stage, self.hidden, self.group = stage, hidden, group

    def train(self, work: MicroBatchComputation, num_micro_batches: int) -> Any:
        """Runs forward and backward passes of all micro-batches.

        Returns:
            The sum of the losses, float64 [1], on the last stage; 0 elsewhere.
        """
        plan = self.stage.plan
        run = _Execution(self, work)
        for event in _cached_schedule(plan.num_ranks, plan.num_chunks, num_micro_batches, plan.rank):
            getattr(run, event.kind)(event)
        run.finish()
        return run.total_loss.value


class _Execution:
    """One optimizer step's way through the schedule: which tensors are alive, and which are still on their way."""

    def __init__(self, pipeline: InterleavedPipeline, work: MicroBatchComputation):
        self.pipeline, self.work = pipeline, work
        self.inputs: dict[tuple[int, int], Any] = {}
        self.outputs: dict[tuple[int, int], Any] = {}
        self.gradients: dict[tuple[int, int], Any] = {}
        self.arriving: dict[tuple[str, int, int], Any] = {}
        self.leaving: list[tuple[Any, Any]] = []
        self.total_loss = LossSum()
        self.last_part = pipeline.stage.plan.num_parts - 1

    def forward(self, event: Event) -> None:
        key, number = (event.part, event.micro_batch), event.micro_batch
        self._await("forward", *key)
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
        self._await("backward", *key)
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
            shape = self.work.shape(event.micro_batch)
            self.pipeline.hidden.announce(tensor, event.part, of="training", batch_shape=shape)
        tensor = tensor.detach().contiguous()
        self.leaving.append((tensor, self.pipeline.group.begin_send(tensor, event.peer)))

    def receive(self, event: Event) -> None:
        # The gradient of a part's output has the form of the hidden states of the part after it.
        part = event.part + 1 if event.of == "backward" else event.part
        shape = self.work.shape(event.micro_batch)
        tensor = self.pipeline.hidden.empty(part, of="training", batch_shape=shape)
        key = (event.part, event.micro_batch)
        transfer = self.pipeline.group.begin_receive(tensor, event.peer)
        self.arriving[(event.of, event.part, event.micro_batch)] = transfer
        if event.of == "backward":
            self.gradients[key] = tensor
        else:
            tensor.stop_gradient = False
            self.inputs[key] = tensor

    def finish(self) -> None:
        """Waits until all that was sent has left; the tensors are kept until then."""
        for _, transfer in self.leaving:
            transfer.wait()
        self.leaving.clear()

    def _await(self, of: str, part: int, micro_batch: int) -> None:
        transfer = self.arriving.pop((of, part, micro_batch), None)
        if transfer is not None:
            transfer.wait()


def _gradient_of(received: Any) -> Any:
    """The gradient of hidden states that came in; zeros where nothing asked for one."""
    gradient = received.grad
    return paddle.zeros_like(received) if gradient is None else gradient
