"""A model as the ranks of a run compute it together: pipeline, replicas, and the sums that tie them.

The gradient of a step is the same in every layout. What a rank's backward passes leave is a part of it:

- over the data axis every rank has the gradient of its own samples: summed over replicas (`replicas.py`);
- a weight that tensor parallelism splits has the gradient of its slice; a whole weight has the same gradient on every
  tensor rank, except where a rank sees part of the activations only (norms under sequence parallelism, the keys and
  values of a trained prefix): summed over the tensor group;
- an embedding that is also the output layer has one part on the first stage of a pipeline and one on the last, a
  prefix has one on each stage: summed over the pipeline.

The global norm counts slices of split weights once each, everything else once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import paddle

from finetune.adapters.base import base_model
from finetune.adapters.prefix import partial_gradients
from finetune.models.layers import decoder_layers, named_weights
from finetune.models.quantised.layers import packed_layers
from finetune.models.reward_head import is_reward_model
from finetune.models.sequence_parallel import set_row_length
from finetune.parallel.pipe.micro_batches import LossSum, MicroBatchComputation
from finetune.parallel.pipe.stage import Stage
from finetune.parallel.replica_hashes import check_replicas
from finetune.parallel.sharding.flat_slices import no_grad_no_autocast
from finetune.parallel.sharding.start import start_replicas
from finetune.processes.groups import Group, ProcessGroups


class ParallelModel:
    """This rank's part of the model.

    Args:
        model: The model or the adapter on it, as this rank holds it.
        groups: The run's process groups.
        stage: This rank's stage of the pipeline; None without one.
        sharding_stage: 0 to 3.
        layers: Decoder layers of this rank, for sharding stage 3.
        master_gradients: Whether gradients are added up in float32 whatever the parameters' dtype.
        pipeline_words: Of the setting `pipeline_parallel_config`.
        overlaps_sums: Whether ranks exchange gradients and weights while they compute, where the engine can.
        sharding_words: Of the setting `sharding_parallel_config`.
    """

    def __init__(
        self,
        model: Any,
        groups: ProcessGroups,
        *,
        stage: Stage | None = None,
        sharding_stage: int = 0,
        layers: Sequence[Any] = (),
        master_gradients: bool = False,
        pipeline_words: Collection[str] = (),
        overlaps_sums: bool = True,
        sharding_words: Collection[str] = (),
    ):
        self.model, self.groups = model, groups
        self.pipeline = _start_pipeline(stage, groups.pipeline, pipeline_words) if stage else None
        weights = named_weights(model)
        self._sizes = {name: int(parameter.size) for name, parameter in weights.items()}
        self._held_twice = self._find_shared(weights)
        self.replicas = start_replicas(
            model,
            groups,
            sharding_stage,
            layers=layers,
            master_gradients=master_gradients,
            overlaps=overlaps_sums,
            sharding_words=sharding_words,
            shared=self._held_twice,
            num_parts=stage.plan.num_chunks if stage else 1,
        )
        self.logits_group = _logits_group(model, groups)
        trained = self.replicas.trained
        self._shared = self._held_twice & set(trained)
        # A prefix is whole on every rank, and each rank computes a part of its gradient.
        self._prefix = partial_gradients(model)
        divided = {name for name, each in trained.items() if getattr(each, "sequence_parallel", False)}
        self._tensor_partial = divided | self._prefix

    @property
    def reports_sample_sums(self) -> bool:
        """Whether this rank's sums over its samples count: one rank for each share of the data."""
        pipeline, tensor = self.groups.pipeline, self.groups.tensor
        return pipeline.position == pipeline.size - 1 and tensor.is_first

    @property
    def engines(self) -> dict[str, str]:
        """What drives each axis that is longer than 1, as "package class"."""
        layout, engines = self.groups.layout, {}
        if layout.tensor > 1:
            engines["tensor"] = f"{_package_of_layers(self.model)} layers over fleet.meta_parallel"
        if self.pipeline:
            engines["pipeline"] = self.pipeline.engine_name
        for axis, degree in (("sharding", layout.sharding), ("data", layout.data)):
            if degree > 1:
                engines[axis] = self.replicas.engine(axis)
        return engines

    def count_updated(self) -> list[int]:
        """How many parameters each rank updates, and keeps optimizer state of."""
        updated = set(self.replicas.tensor_names())
        own = sum(each.size for each in self.replicas.optimizer_parameters() if each.name in updated)
        return [int(each) for each in self.groups.world.gather_objects(int(own))]

    def count_parameters(self) -> tuple[int, int, list[int]]:
        """Parameters of the whole model, those of them that are trained, and how many each rank holds."""
        packed = [layer.packed for layer in packed_layers(self.model).values()]
        own = sum(each.size for each in packed)
        total = sum(each.size for each in packed if each.is_distributed or self.groups.tensor.is_first)
        trained = 0
        for name, parameter in named_weights(self.model).items():
            size = self._sizes[name]
            own += size
            is_split = getattr(parameter, "is_distributed", False)
            counts = (is_split or self.groups.tensor.is_first) and (
                name not in self._held_twice or self.groups.pipeline.is_first
            )
            total += size if counts else 0
            trained += size if counts and not parameter.stop_gradient else 0
        gathered = self.groups.world.gather_objects([own, total, trained])
        members = [gathered[self.groups.world.ranks.index(rank)] for rank in self.groups.model.ranks]
        held = [each[0] for each in gathered]
        return sum(each[1] for each in members), sum(each[2] for each in members), held

    def check_replicas(self, what: str) -> None:
        """Compares what ranks must agree on.

        Args:
            what: When this is, such as "after step 12".

        Raises:
            ReplicasDiverged: With the weights and the ranks that differ.
        """
        self.replicas.finish_updates()
        is_sliced = self.replicas.stage == 3
        if is_sliced:
            names = self.replicas.tensor_names()
            tensors = {names[each.name]: each for each in self.replicas.optimizer_parameters()}
        else:
            tensors = named_weights(self.model)
        parameters = self.replicas.trained if is_sliced else tensors
        whole = [name for name in tensors if not getattr(parameters[name], "is_distributed", False)]
        check_replicas(tensors, self.groups, what, same_over_tensor=whole, is_sliced_over_sharding=is_sliced)

    def train(self, work: MicroBatchComputation, num_micro_batches: int) -> Any:
        """Forward and backward passes of this rank's micro-batches.

        Returns:
            Its share of the loss, float64 [1], on the device: nothing waits for it.
        """
        self.replicas.begin_step(num_micro_batches)
        if self.pipeline:
            return self.pipeline.train(work, num_micro_batches)
        total = LossSum()
        for number in range(num_micro_batches):
            with work.context(number):
                loss = work.loss(number, work.forward(number))
                total.add(loss)
                loss.backward()
            work.finished(number)
        return total.value

    def call(self, inputs: Mapping[str, Any]) -> Any:
        """The outputs of this rank's part of the model for a batch."""
        set_row_length(base_model(self.model), inputs["input_ids"].shape[1])
        return self.model(**inputs)

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        """The outputs of one pass without gradients where the logits come out, None elsewhere."""
        if self.pipeline:
            return self.pipeline.evaluate(lambda: self.call(inputs), tuple(inputs["input_ids"].shape))
        with paddle.no_grad():
            return self.call(inputs)

    def total(self, values: Any) -> list[float]:
        """Sums over all samples of what each share of the data counted; the same on every rank.

        Args:
            values: float64 [n], on the device; changed.
        """
        return [float(value) for value in self.sum_samples(values).tolist()]

    def sum_samples(self, values: Any) -> Any:
        """The same sums as they are on the device: nothing waits for them."""
        with no_grad_no_autocast():
            if not self.reports_sample_sums:
                values = paddle.zeros_like(values)
            self.groups.world.all_reduce(values)
        return values

    def sum_gradients(
        self, loss: Any, counts: Sequence[float] = (), figures: Any = None
    ) -> tuple[float, float, list[float]]:
        """Makes the gradients those of the whole global batch.

        Everything that the host has to know of a step is read from the device here, in one piece.

        Args:
            loss: This rank's share of the step's loss, float64 [1].
            counts: Numbers of this rank to be summed over all ranks on the way.
            figures: float64 [n] on the device, sums over this rank's samples; None for none.

        Returns:
            The step's loss, the L2 norm of all gradients and the sums of `counts` and then of `figures`, the same on
            every rank.
        """
        self.replicas.sum_gradients()
        self._sum_partial()
        with no_grad_no_autocast():
            of_samples = loss if figures is None else paddle.concat([loss, figures])
            if not self.reports_sample_sums:
                of_samples = paddle.zeros_like(of_samples)
            square = self.replicas.squared_norm(self._counts)
            sums = [of_samples[:1], square, paddle.to_tensor([*counts], dtype="float64"), of_samples[1:]]
            totals = paddle.concat(sums if figures is not None else sums[:-1])
            self.groups.world.all_reduce(totals)
            num_totals = totals.shape[0]
            numbers = paddle.concat([totals, self.replicas.presence()]).numpy()
        self.replicas.drop_absent(numbers[num_totals:])
        total_loss, total_square, *others = numbers[:num_totals].tolist()
        return total_loss, math.sqrt(total_square), others

    def _counts(self, name: str) -> bool:
        is_split = getattr(self.replicas.trained[name], "is_distributed", False)
        if not is_split and not self.groups.tensor.is_first:
            return False
        return name not in self._shared or self.groups.pipeline.is_first

    def _sum_partial(self) -> None:
        self._sum_over(self.groups.tensor, self._tensor_partial)
        self._sum_over(self.groups.pipeline if self._prefix else self.groups.ends, self._shared)

    def _sum_over(self, group: Group, names: set[str]) -> None:
        if not names or group.size == 1:
            return
        for name, gradient in self.replicas.gradients():
            if name in names:
                group.all_reduce(gradient)

    def _find_shared(self, weights: dict[str, Any]) -> set[str]:
        """Weights that several stages hold."""
        if self.groups.pipeline.size == 1:
            return set()
        held = self.groups.pipeline.gather_objects(sorted(weights))
        return {name for name in weights if sum(name in names for names in held) > 1}


def _start_pipeline(stage: Stage, group: Group, words: Collection[str]) -> Any:
    from paddle.distributed import fleet

    from finetune.parallel.pipe.fleet_pipeline import FleetInterleavedPipeline, FleetPipeline

    engine = FleetInterleavedPipeline if stage.plan.num_chunks > 1 else FleetPipeline
    return engine(stage, group, fleet.get_hybrid_communicate_group(), words)


def _package_of_layers(model: Any) -> str:
    """Whose decoder layers the model has: "paddlenlp", or "finetune"."""
    return type(decoder_layers(base_model(model))[0]).__module__.partition(".")[0]


def _logits_group(model: Any, groups: ProcessGroups) -> Group:
    """Ranks that each have a part of the vocabulary's logits; PaddleNLP splits a vocabulary that divides evenly."""
    base = base_model(model)
    config = getattr(base, "config", None)
    is_split = config is not None and config.vocab_size % groups.tensor.size == 0
    is_split = is_split and not is_reward_model(base)  # every rank has the whole value
    return groups.tensor if is_split else Group()
