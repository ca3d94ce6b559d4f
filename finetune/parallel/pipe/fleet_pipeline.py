"""A pipeline driven by Fleet: its `PipelineParallel`, and with virtual stages its `PipelineParallelWithInterleave`.

Fleet's classes run the schedule and hand hidden states on. What they drive is the family's own model: Fleet's
`PipelineLayer` gets one callable for each part of the model, which runs it (`stage.py`), so that parameters keep their
names and no family needs a pipeline model. Fleet finds no parameters there, and sums no gradients: losses, replicas
and slices are ours (`parallel_model.py`).

Two things of Fleet's are left out. It sends the shape of hidden states ahead of them, once for all of a run (then rows
of other lengths fail) or every time (then the receiver reads it from the device, and the gradient of a micro-batch is
awaited in the shape of a later one); here both ends know it (`transfers.py`). And it broadcasts the loss of every step,
which is read there to find its dtype; here the ranks' shares are summed with the other numbers of a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import paddle
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import (
    PipelineLayer,
    PipelineParallel,
    PipelineParallelWithInterleave,
)
from paddle.distributed.fleet.meta_parallel.pp_utils.utils import number_2_dtype

from finetune.models.sequence_parallel import set_row_length
from finetune.parallel.pipe.micro_batches import LossSum, MicroBatchComputation
from finetune.parallel.pipe.stage import Stage
from finetune.parallel.pipe.transfers import Pass, Transfers
from finetune.processes.groups import Group


class FleetPipeline(PipelineParallel):  # type: ignore[misc]
    """Fleet's 1F1B pipeline over a stage of the family's model.

    Args:
        stage: What this rank computes.
        group: The ranks of the pipeline, first stage first.
        topology: Fleet's `HybridCommunicateGroup`.
        words: Of the setting `pipeline_parallel_config`.

    Attributes:
        engine_name: What a run tells of it.
    """

    engine_name = f"fleet {PipelineParallel.__name__}"

    def __init__(self, stage: Stage, group: Group, topology: Any, words: Collection[str] = ()):
        transfers = Transfers(stage, group)
        passes = _StagePasses(stage, transfers)
        layers = PipelineLayer(
            layers=[passes.compute] * stage.plan.num_parts,
            num_stages=stage.plan.num_ranks,
            topology=topology.topology(),
            loss_fn=passes.compute_loss,
            seg_method=f"layer:{passes.compute.__name__}",
            num_virtual_pipeline_stages=stage.plan.num_chunks,
        )
        super().__init__(layers, topology, _strategy(stage, words))
        self._stage, self._passes, self._p2p_helper = stage, passes, transfers

    def train(self, work: MicroBatchComputation, num_micro_batches: int) -> Any:
        """Runs forward and backward passes of all micro-batches.

        Returns:
            The sum of the losses, float64 [1], on the last stage; 0 elsewhere.
        """
        self.accumulate_steps = max(num_micro_batches, self._fewest_micro_batches)
        self._init_user_hooks()  # they count micro-batches
        self._forward_passes, self._backward_passes = self._order(forward=True), self._order(forward=False)
        self._passes.begin(work, num_micro_batches)
        shapes = [self._passes.shape(number) for number in range(self.accumulate_steps)]
        self._p2p_helper.begin(
            "training", shapes, forward=self._forward_passes, backward=self._backward_passes
        )
        return self.forward_backward_pipeline(_NoData(), None)

    def evaluate(self, compute: Callable[[], Any], shape: tuple[int, ...]) -> Any:
        """One forward pass through all parts, without gradients.

        Args:
            compute: Runs the model on this rank's copy of the batch.
            shape: Rows of the batch and tokens of each.

        Returns:
            The outputs of the last part, on the last stage; None elsewhere.
        """
        plan, transfers, outputs = self._stage.plan, self._p2p_helper, None
        parts = range(plan.rank, plan.num_parts, plan.num_ranks)
        transfers.begin("evaluation", [shape], forward=[(part, 0) for part in parts])
        with paddle.no_grad():
            for part in parts:
                received = transfers.recv_forward(part == 0, batch_p2p_comm=self._use_batch_p2p_comm)
                with self._stage.computing(part, received):
                    outputs = compute()
                if part < plan.num_parts - 1:
                    output, outputs = self._stage.take_output(), None
                    transfers.send_forward(output, False, batch_p2p_comm=self._use_batch_p2p_comm)
        return outputs

    @property
    def _fewest_micro_batches(self) -> int:
        """With which Fleet's schedule works out."""
        return 1

    def _order(self, *, forward: bool) -> list[Pass]:
        """This rank's passes in one direction, in the order in which Fleet asks for them."""
        return [(self.stage_id, number) for number in range(self.accumulate_steps)]

    def _forward_step(self, input_tensor: Any, *args: Any, step_id: int, **options: Any) -> Any:
        with self._passes.computing(self._forward_passes[step_id], input_tensor):
            return super()._forward_step(input_tensor, *args, step_id=step_id, **options)

    def _backward_step(self, input_tensor: Any, *args: Any, step_id: int, **options: Any) -> Any:
        with self._passes.computing(self._backward_passes[step_id], input_tensor):
            gradient = super()._backward_step(input_tensor, *args, step_id=step_id, **options)
        self._passes.finish()
        if input_tensor is not None and gradient is None:  # nothing asked for it
            gradient = paddle.zeros_like(input_tensor)
        return gradient

    def _broadcast_final_loss(self, *_: Any, **__: Any) -> Any:
        return self._passes.total_loss.value


class FleetInterleavedPipeline(FleetPipeline, PipelineParallelWithInterleave):  # type: ignore[misc]
    """Fleet's interleaved 1F1B pipeline over the chunks of a stage."""

    engine_name = f"fleet {PipelineParallelWithInterleave.__name__}"

    def _check_sanity(self) -> None:
        """Two ranks and any number of micro-batches are right here, which Fleet refuses.

        Between two ranks the messages of both directions, and of the way from the last rank to the first, take one
        link: batches of them would be mixed up, single ones are begun in the same order on both sides. Below twice as
        many micro-batches as ranks Fleet has a class that computes all forward passes first; with at least as many as
        ranks this one does so by itself.
        """

    @property
    def _fewest_micro_batches(self) -> int:
        """What lacks is handed round without being computed: then only the waiting is as long."""
        return int(self.num_stages)

    def _order(self, *, forward: bool) -> list[Pass]:
        num_passed: Counter[int] = Counter()
        passes = []
        for step in range(self.accumulate_steps * self.num_model_chunks):
            part = self._get_virtual_pp_rank(step, forward) * self.num_stages + self.stage_id
            passes.append((part, num_passed[part]))
            num_passed[part] += 1
        return passes


class _StagePasses:
    """What Fleet's layer and loss function do: the passes of the stage's parts of the family's model."""

    def __init__(self, stage: Stage, transfers: Transfers):
        self.stage, self.transfers = stage, transfers

    def begin(self, work: MicroBatchComputation, num_micro_batches: int) -> None:
        """Takes up a step.

        Args:
            work: What is computed.
            num_micro_batches: Of the step; nothing is computed for those that the schedule has beyond.
        """
        self.work, self.num_micro_batches, self.total_loss = work, num_micro_batches, LossSum()

    def shape(self, number: int) -> tuple[int, ...]:
        """Rows and tokens of a micro-batch."""
        return self.work.shape(number if number < self.num_micro_batches else 0)

    @contextmanager
    def computing(self, which: Pass, received: Any) -> Iterator[None]:
        """What must hold while a part is computed for a micro-batch, in either direction."""
        self.part, self.number = which
        if self._is_missing:
            yield
        else:
            with self.stage.computing(self.part, received), self.work.context(self.number):
                # For recomputation in a backward pass, which follows forward passes of other micro-batches.
                set_row_length(self.stage.model, self.work.shape(self.number)[1])
                yield

    def compute(self, _received: Any) -> Any:
        """Hidden states for the next part; the model's outputs of the last one."""
        if self._is_missing:
            return self._stand_in()
        outputs = self.work.forward(self.number)
        if self._is_last_part:
            return outputs
        output = self.stage.take_output()
        if output.stop_gradient:  # nothing is trained up to here, but Fleet differentiates everything
            output = output.detach()
            output.stop_gradient = False
        return output

    def compute_loss(self, outputs: Any, _labels: Any) -> Any:
        """The micro-batch's loss."""
        if self._is_missing:
            return outputs
        loss = self.work.loss(self.number, outputs)
        self.total_loss.add(loss)
        return loss

    def finish(self) -> None:
        """A backward pass is done."""
        if not self._is_missing:
            self.work.finished(self.number)

    @property
    def _is_missing(self) -> bool:
        return self.number >= self.num_micro_batches

    @property
    def _is_last_part(self) -> bool:
        return self.part == self.stage.plan.num_parts - 1

    def _stand_in(self) -> Any:
        """What goes to the next part for a micro-batch that the step lacks."""
        dtype = "float32" if self._is_last_part else number_2_dtype(self.transfers.dtype(self.part + 1))
        nothing = paddle.zeros(self.stage.hidden_shape(self.shape(self.number)), dtype=dtype)
        nothing.stop_gradient = False
        return nothing


class _NoData:
    """What Fleet takes batches from: every stage has them already."""

    def __next__(self) -> tuple[None, None]:
        return None, None


def _strategy(stage: Stage, words: Collection[str]) -> Any:
    """Fleet's settings of a pipeline."""
    # Hidden states are the same on all tensor ranks, which then send a part each, unless each has other tokens.
    may_send_parts = not getattr(stage.model.config, "sequence_parallel", False)
    # With virtual stages the transfers are many, and Fleet's schedule lets them run beside the computing.
    overlaps = stage.plan.num_chunks > 1 or "enable_overlap_p2p_comm" in words
    strategy = fleet.DistributedStrategy()
    strategy.pipeline_configs = {
        "accumulate_steps": 1,
        "micro_batch_size": 1,
        "enable_partial_send_recv": may_send_parts and "disable_partial_send_recv" not in words,
        "p2p_cache_shape": True,
    }
    strategy.hybrid_configs = {
        "pp_configs": {
            # A loss is divided by the label tokens of the global batch before Fleet sees it; not by micro-batches then.
            "delay_scale_loss": True,
            "overlap_p2p_comm": overlaps,
            "use_batch_p2p_comm": not overlaps and "disable_batch_p2p_comm" not in words,
        }
    }
    return strategy
