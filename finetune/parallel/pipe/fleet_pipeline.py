"""A pipeline without virtual stages, driven by Fleet's `PipelineParallel`.

Fleet's class runs the 1F1B schedule and hands hidden states on. What it drives is the family's own model: Fleet's
`PipelineLayer` gets one callable for each stage, which runs the stage's part (`stage.py`), so that parameters keep
their names and no family needs a pipeline model. Fleet finds no parameters there, and sums no gradients: losses,
replicas and slices are ours (`parallel_model.py`).

Two things of Fleet's are left out. It sends the shape of hidden states ahead of them, once for all of a run (then rows
of other lengths fail) or every time (then the receiver reads it from the device, and the gradient of a micro-batch is
awaited in the shape of a later one); here both ends know it. And it broadcasts the loss of every step, which is read there
to find its dtype; here the ranks' shares are summed with the other numbers of a step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import paddle
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import PipelineLayer, PipelineParallel
from paddle.distributed.fleet.meta_parallel.pp_utils.p2p_communication import P2pHelper
from paddle.distributed.fleet.meta_parallel.pp_utils.utils import PADDLE_TO_NUMBER

from finetune.parallel.pipe.hidden_states import HiddenStates
from finetune.parallel.pipe.loss_sum import LossSum
from finetune.parallel.pipe.micro_batches import MicroBatchComputation
from finetune.parallel.pipe.stage import Stage


class FleetPipeline(PipelineParallel):  # type: ignore[misc]
    """Fleet's 1F1B pipeline over a stage of the family's model.

    Args:
        stage: What this rank computes; one part.
        hidden: What ranks know of the tensors that they hand on.
        topology: Fleet's `HybridCommunicateGroup`.
        words: Of the setting `pipeline_parallel_config`.

    Attributes:
        engine_name: What a run tells of it.
    """

    engine_name = f"fleet {PipelineParallel.__name__}"

    def __init__(self, stage: Stage, hidden: HiddenStates, topology: Any, words: Collection[str] = ()):
        passes = _StagePasses(stage)
        layers = PipelineLayer(
            layers=[passes.compute] * stage.plan.num_ranks,
            num_stages=stage.plan.num_ranks,
            topology=topology.topology(),
            loss_fn=passes.compute_loss,
        )
        # Hidden states are the same on all tensor ranks, which then send a part each, unless each has other tokens.
        is_whole = not getattr(stage.model.config, "sequence_parallel", False)
        super().__init__(layers, topology, _strategy(words, may_send_parts=is_whole))
        self._passes, self._p2p_helper = passes, _KnownShapes(hidden)

    def train(self, work: MicroBatchComputation, num_micro_batches: int) -> Any:
        """Runs forward and backward passes of all micro-batches.

        Returns:
            The sum of the losses, float64 [1], on the last stage; 0 elsewhere.
        """
        self._passes.begin(work)
        self._p2p_helper.begin([work.shape(number) for number in range(num_micro_batches)])
        self.accumulate_steps = num_micro_batches
        self._init_user_hooks()  # they count micro-batches
        return self.forward_backward_pipeline(_NoData())

    def _forward_step(self, input_tensor: Any, *args: Any, step_id: int, **options: Any) -> Any:
        with self._passes.computing(step_id, input_tensor):
            return super()._forward_step(input_tensor, *args, step_id=step_id, **options)

    def _backward_step(self, input_tensor: Any, *args: Any, step_id: int, **options: Any) -> Any:
        with self._passes.computing(step_id, input_tensor):
            gradient = super()._backward_step(input_tensor, *args, step_id=step_id, **options)
        self._passes.finished(step_id)
        if input_tensor is not None and gradient is None:  # nothing asked for it
            gradient = paddle.zeros_like(input_tensor)
        return gradient

    def _broadcast_final_loss(self, *_: Any, **__: Any) -> Any:
        return self._passes.total_loss.value


class _StagePasses:
    """What Fleet's layer and loss function do: the passes of the stage's part of the family's model."""

    def __init__(self, stage: Stage):
        self.stage = stage
        self.begin(None)

    def begin(self, work: MicroBatchComputation | None) -> None:
        """Takes up a step."""
        self.work: Any = work
        self.total_loss = LossSum()
        self.number = 0

    @contextmanager
    def computing(self, number: int, received: Any) -> Iterator[None]:
        """What must hold while a micro-batch is computed, in either direction."""
        self.number = number
        with self.stage.computing(self.stage.plan.rank, received), self.work.context(number):
            yield

    def compute(self, _received: Any) -> Any:
        """Hidden states for the next stage; the model's outputs on the last one."""
        outputs = self.work.forward(self.number)
        if self.stage.plan.holds_last:
            return outputs
        output = self.stage.take_output()
        if output.stop_gradient:  # nothing is trained up to here, but Fleet differentiates everything
            output = output.detach()
            output.stop_gradient = False
        return output

    def compute_loss(self, outputs: Any, _labels: Any) -> Any:
        """The micro-batch's loss."""
        loss = self.work.loss(self.number, outputs)
        self.total_loss.add(loss)
        return loss

    def finished(self, number: int) -> None:
        """A micro-batch's backward pass is done."""
        self.work.finished(number)


class _NoData:
    """What Fleet takes batches from: every stage has them already."""

    def __next__(self) -> tuple[None, None]:
        return None, None


class _KnownShapes(P2pHelper):  # type: ignore[misc]
    """Fleet's transfers, with the shapes that both ends know in the place of messages about them.

    Micro-batches follow each other in both directions, so counting tells which one a transfer belongs to.
    """

    def __init__(self, hidden: HiddenStates):
        super().__init__(use_cache=True)
        self._hidden, self._part = hidden, hidden.stage.plan.rank
        self.begin([])

    def begin(self, shapes: list[tuple[int, ...]]) -> None:
        """Makes the batch shapes of a step's micro-batches known."""
        self._shapes, self._num_sent, self._num_received, self._num_gradients = shapes, 0, 0, 0

    def _send_meta(self, output_tensor: Any, *_: Any, **__: Any) -> None:
        shape, self._num_sent = self._shapes[self._num_sent], self._num_sent + 1
        self._hidden.announce(output_tensor, self._part + 1, of="training", batch_shape=shape)

    def _recv_meta(self, *_: Any, **__: Any) -> None:
        meta = self._send_recv_meta
        shape, self._num_received = self._shapes[self._num_received], self._num_received + 1
        meta.recv_shape_message = self._hidden.stage.hidden_shape(shape)
        meta.recv_dtype_message = self._dtype_number(self._part)
        meta.recv_stop_gradient = False

    def recv_backward(self, pp_last_stage: bool, *args: Any, **options: Any) -> Any:
        if not pp_last_stage:
            meta = self._send_recv_meta
            shape, self._num_gradients = self._shapes[self._num_gradients], self._num_gradients + 1
            meta.send_shape_message = self._hidden.stage.hidden_shape(shape)
            meta.send_dtype_message = self._dtype_number(self._part + 1)
        return super().recv_backward(pp_last_stage, *args, **options)

    def _dtype_number(self, part: int) -> int:
        dtype = self._hidden.dtype(part, of="training")
        return int(PADDLE_TO_NUMBER[getattr(paddle, dtype)])


def _strategy(words: Collection[str], *, may_send_parts: bool) -> Any:
    """Fleet's settings of a pipeline."""
    strategy = fleet.DistributedStrategy()
    strategy.pipeline_configs = {
        "accumulate_steps": 1,
        "micro_batch_size": 1,
        "enable_partial_send_recv": may_send_parts and "disable_partial_send_recv" not in words,
        "p2p_cache_shape": True,
    }
    overlaps = "enable_overlap_p2p_comm" in words
    strategy.hybrid_configs = {
        "pp_configs": {
            # A loss is divided by the label tokens of the global batch before Fleet sees it; not by micro-batches then.
            "delay_scale_loss": True,
            "overlap_p2p_comm": overlaps,
            "use_batch_p2p_comm": not overlaps and "disable_batch_p2p_comm" not in words,
        }
    }
    return strategy
