"""The pipeline that this rank is a part of: training by Fleet's engine, and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import paddle

from finetune.parallel.pipe.hidden_states import HiddenStates
from finetune.parallel.pipe.micro_batches import MicroBatchComputation
from finetune.parallel.pipe.stage import Stage
from finetune.processes.groups import Group


class Pipeline:
    """A stage and its neighbours.

    Args:
        stage: What this rank computes.
        group: The ranks of the pipeline, first stage first.
        words: Of the setting `pipeline_parallel_config`.
    """

    def __init__(self, stage: Stage, group: Group, words: Collection[str] = ()):
        self.stage, self.group = stage, group
        self._hidden = HiddenStates(stage, group)
        self._engine = self._start_engine(words)

    @property
    def is_last(self) -> bool:
        """Whether the loss is computed here."""
        return self.stage.plan.holds_last

    def train(self, work: MicroBatchComputation, num_micro_batches: int) -> Any:
        """Runs forward and backward passes of all micro-batches.

        Returns:
            The sum of the losses, float64 [1], on the last stage; 0 elsewhere.
        """
        return self._engine.train(work, num_micro_batches)

    def forward(self, compute: Callable[[], Any], shape: tuple[int, ...]) -> Any:
        """One forward pass through all parts, without gradients.

        Args:
            compute: Runs the model on this rank's copy of the batch.
            shape: Rows of the batch and tokens of each.

        Returns:
            The outputs of the last part, on the last stage; None elsewhere.
        """
        plan, hidden, outputs, received = self.stage.plan, self._hidden, None, None
        with paddle.no_grad():
            for part in range(plan.rank, plan.num_parts, plan.num_ranks):
                if part > 0:
                    received = hidden.empty(part, of="evaluation", batch_shape=shape)
                    self.group.receive(received, (part - 1) % plan.num_ranks)
                with self.stage.computing(part, received):
                    outputs = compute()
                if part < plan.num_parts - 1:
                    output, outputs = self.stage.take_output(), None
                    hidden.announce(output, part + 1, of="evaluation", batch_shape=shape)
                    self.group.send(output, (part + 1) % plan.num_ranks)
        return outputs

    @property
    def engine(self) -> str:
        """What drives the training, as "package class"."""
        return self._engine.engine_name

    def _start_engine(self, words: Collection[str]) -> Any:
        from paddle.distributed import fleet

        from finetune.parallel.pipe.fleet_pipeline import FleetInterleavedPipeline, FleetPipeline

        engine = FleetInterleavedPipeline if self.stage.plan.num_chunks > 1 else FleetPipeline
        return engine(self.stage, self._hidden, fleet.get_hybrid_communicate_group(), words)
