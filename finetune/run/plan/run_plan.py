"""The plan of a run: its parameters, layout, steps, memory, disk and time, put together from settings and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.trained_shapes import TrainedShapes, number_of, plan_trained
from finetune.machine.device import device_kind
from finetune.models.reward_head import is_reward_config
from finetune.models.weight_shapes import weight_shapes
from finetune.run.directory import ARGUMENTS_FILE, RESULTS_FILE
from finetune.run.disk_space import DiskNeed, plan_disk
from finetune.run.plan.activations import Activations, MicroBatch, Widths, widths_of
from finetune.run.plan.batches import BatchPlan, plan_batches, widest
from finetune.run.plan.facts import MemoryFacts, facts_of
from finetune.run.plan.memory import MemoryPlan, RankMemory
from finetune.run.plan.rank_parts import StageParts, divide_parameters
from finetune.run.trainer import build_order, build_rows
from finetune.storage.files import read_json_or_empty

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.processes.layout import Layout
    from finetune.run.data import RunData
    from finetune.run.tokenizer import TokenizerPair
    from finetune.settings.arguments import Arguments


@dataclass(frozen=True)
class ModelPlan:
    """A model under one method.

    Attributes:
        shapes: Parameters, and which are trained.
        config: Configuration as the family adapts it.
        widths: Sizes of its layers.
    """

    shapes: TrainedShapes
    config: Mapping[str, Any]
    widths: Widths

    @property
    def num_parameters(self) -> int:
        """Of the model and its adapter."""
        return sum(map(number_of, self.shapes.all.values()))

    @property
    def num_trained(self) -> int:
        """Those of them that are trained."""
        return sum(number_of(self.shapes.all[name]) for name in self.shapes.updated)


@dataclass(frozen=True)
class StagePlanned:
    """A pipeline stage with its memory."""

    parts: StageParts
    updated: list[int]
    memory: RankMemory


@dataclass(frozen=True)
class RunPlan:
    """What a run will be.

    Attributes:
        model: Its parameters.
        layout: Degrees of parallelism.
        facts: Settings that memory depends on.
        stages: Of the pipeline, in order.
        batches: What it consumes.
        largest: The micro-batch that needs most.
        disk: What it writes.
        tokens_per_second: Of all cards together; None where nobody knows.
        speed_from: Where that number is from.
    """

    model: ModelPlan
    layout: Layout
    facts: MemoryFacts
    stages: list[StagePlanned]
    batches: BatchPlan
    largest: MicroBatch
    disk: DiskNeed
    tokens_per_second: float | None = None
    speed_from: str = ""

    @property
    def peak(self) -> float:
        """Bytes of the fullest card."""
        return max(stage.memory.peak for stage in self.stages)

    @property
    def fullest(self) -> StagePlanned:
        """The stage whose cards hold most."""
        return max(self.stages, key=lambda stage: stage.memory.peak)

    @property
    def seconds(self) -> float | None:
        """Of the training; None where no speed is known."""
        return self.batches.num_tokens / self.tokens_per_second if self.tokens_per_second else None

    def held_per_rank(self) -> list[int]:
        """Parameters that each rank holds, by rank."""
        stages = [self.layout.coordinates(rank).pipeline for rank in range(self.layout.world)]
        return [self.stages[stage].parts.num_parameters for stage in stages]

    def updated_per_rank(self) -> list[int]:
        """Parameters whose optimizer state each rank keeps, by rank."""
        places = [self.layout.coordinates(rank) for rank in range(self.layout.world)]
        return [self.stages[place.pipeline].updated[place.sharding] for place in places]


def plan_model(args: Arguments, resolved: ResolvedModel) -> ModelPlan:
    """Parameters and sizes, from config.json and settings.

    Raises:
        UserError: Nothing is left to train, or a pattern fits nothing.
    """
    family = resolved.family
    config = family.adapt_config(resolved.config)
    whole = weight_shapes(family, config, options=vars(args.model))
    shapes = plan_trained(args.model, family, config, whole)
    widths = widths_of(family, config, shapes)
    if is_reward_config(config):  # one value for an answer in the place of logits
        widths = Widths(**{**vars(widths), "vocabulary": 1})
    return ModelPlan(shapes, config, widths)


def plan_memory(
    model: ModelPlan,
    resolved: ResolvedModel,
    layout: Layout,
    facts: MemoryFacts,
    batches: tuple[MicroBatch, ...],
) -> tuple[list[StagePlanned], MicroBatch]:
    """The memory of every stage for the micro-batch that needs most, and that micro-batch."""
    family = resolved.family
    parts = divide_parameters(model.shapes, family, model.config, layout, num_chunks=facts.num_chunks)
    activations = Activations(
        model.widths,
        facts,
        tensor_degree=layout.tensor,
        num_prefix=model.shapes.num_prefix_tokens,
    )
    memory = MemoryPlan(model.shapes, family, layout, facts, activations)
    largest = widest(batches, lambda batch: max(memory.stage(each, batch).peak for each in parts))
    return [StagePlanned(each, memory.updated(each), memory.stage(each, largest)) for each in parts], largest


def plan_rows(
    args: Arguments, data: RunData, pair: TokenizerPair, resolved: ResolvedModel, layout: Layout
) -> BatchPlan:
    """What a run consumes, from its samples.

    Args:
        args: Its settings.
        data: As `finetune.run.data.read_data` gives them; of a stream the first.
        pair: The tokenizer, for the id of padding.
        resolved: Its model.
        layout: Degrees of parallelism.
    """
    rows = build_rows(args, data.train, pair, resolved)
    is_stream = bool(data.stream)
    planned = plan_batches(
        args, len(data.train), rows, build_order(args, rows, layout), layout, is_stream=is_stream
    )
    if not is_stream:
        return planned
    # Rows that nobody has seen are taken to be full.
    size, length = int(args.training.per_device_train_batch_size), int(args.data.max_length)
    learned = max(each.labels / each.tokens for each in planned.largest)
    return replace(planned, largest=(MicroBatch(size, length, round(size * length * learned)),))


def make_plan(
    args: Arguments,
    resolved: ResolvedModel,
    layout: Layout,
    batches: BatchPlan,
    *,
    tokens_per_second: float | None = None,
) -> RunPlan:
    """The plan of a run.

    Args:
        args: Its settings.
        resolved: Its model.
        layout: Degrees of parallelism.
        batches: What it consumes.
        tokens_per_second: Of all cards together; None: that of an earlier run in the output folder.
    """
    model, facts = plan_model(args, resolved), facts_of(args, resolved)
    stages, largest = plan_memory(model, resolved, layout, facts, batches.largest)
    adapter = bool(model.shapes.added)
    num_saved = sum(map(number_of, model.shapes.added.values())) if adapter else model.num_parameters
    disk = plan_disk(args, num_saved=num_saved, num_trained=model.num_trained, num_steps=batches.num_steps)
    speed, origin = tokens_per_second, "given"
    if speed is None:
        folder = Path(str(args.training.output_dir)).expanduser()
        speed, origin = measured_speed(folder, facts.device), "the earlier run in output_dir"
    return RunPlan(
        model=model,
        layout=layout,
        facts=facts,
        stages=stages,
        batches=batches,
        largest=largest,
        disk=disk,
        tokens_per_second=speed,
        speed_from=origin if speed else "",
    )


def measured_speed(output_dir: Path, device: str) -> float | None:
    """Tokens a second that an earlier run reached, from its results or its log; None where there is neither.

    Args:
        output_dir: Of the run.
        device: Kind of device that it has to have run on.
    """
    settings = read_json_or_empty(output_dir / ARGUMENTS_FILE)
    if device_kind(str(settings.get("device"))) != device:
        return None
    found = read_json_or_empty(output_dir / RESULTS_FILE).get("train_tokens_per_second")
    return float(found) if isinstance(found, int | float) and found > 0 else _logged_speed(output_dir)


def _logged_speed(output_dir: Path) -> float | None:
    import json

    try:
        lines = (output_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    speeds = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # a run was stopped while it wrote
            continue
        if record.get("kind") == "train" and record.get("tokens_per_second", 0) > 0:
            speeds.append(float(record["tokens_per_second"]))
    # The first steps allocate; the middle of the others is what goes on.
    later = sorted(speeds[len(speeds) // 4 :])
    return later[len(later) // 2] if later else None
