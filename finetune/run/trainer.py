"""The trainer of a run, put together from model, data and records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.samples.sample_store import sample_lengths
from finetune.data.samples.tokenize import Sample
from finetune.data.templates.trained_template import drop_template, record_default
from finetune.models.layers import find_layer
from finetune.models.reward_head import REWARD_HEAD, is_reward_model
from finetune.run.alignment import (
    build_objective,
    build_preference_evaluation,
    build_preference_rows,
    comparison_of,
)
from finetune.run.experts import build_balance
from finetune.run.stream import build_stream_source, make_row_builder
from finetune.run.tokenizer import tokenizer_folder
from finetune.settings.data import default_new_tokens
from finetune.settings.engine_words import split_words
from finetune.settings.trackers import reports_to

if TYPE_CHECKING:
    from finetune.data.batches.batch_source import BatchSource
    from finetune.data.batches.rows import Rows
    from finetune.data.batches.sampler import GlobalOrder
    from finetune.families.family import Family
    from finetune.models.resolve import ResolvedModel
    from finetune.parallel.pipe.stage import Stage
    from finetune.processes.groups import ProcessGroups
    from finetune.processes.layout import Layout
    from finetune.processes.phases import PhaseRecord
    from finetune.run.data import RunData
    from finetune.run.directory import RunDirectory
    from finetune.run.tokenizer import TokenizerPair
    from finetune.settings.arguments import Arguments
    from finetune.training.loss import LabelPositions
    from finetune.training.parts import RunParts
    from finetune.training.trainer import FinetuneTrainer


def build_trainer(
    args: Arguments,
    run: RunDirectory,
    model: Any,
    data: RunData,
    pair: TokenizerPair,
    *,
    resolved: ResolvedModel,
    groups: ProcessGroups,
    stage: Stage | None,
    phases: PhaseRecord,
) -> FinetuneTrainer:
    """Puts model, data and records together into a trainer."""
    from finetune.adapters.base import base_model
    from finetune.run.training_arguments import build_training_arguments
    from finetune.training.loss import LabelPositions
    from finetune.training.trainer import FinetuneTrainer

    base = base_model(model)
    label_positions = None
    if stage is None or stage.plan.holds_last:
        label_positions = LabelPositions(
            find_layer(base, REWARD_HEAD if is_reward_model(base) else resolved.family.head_module),
            length_first=resolved.family.hidden_length_first,
            rows_divided=bool(getattr(base.config, "sequence_parallel", False)),
        )
    batches = None
    if args.training.do_train:
        batches = _build_batches(args, data, pair, resolved, groups)
    trainer = FinetuneTrainer(
        model=model,
        args=build_training_arguments(args),
        batches=batches,
        evaluation=_build_evaluation(
            args, data, pair, resolved, label_positions=label_positions, groups=groups
        ),
        tokenizer=pair.tokenizer,
        parts=_build_parts(
            args,
            base,
            resolved.family,
            groups=groups,
            stage=stage,
            phases=phases,
            label_positions=label_positions,
        ),
    )
    if groups.is_first:
        _add_records(args, run, trainer)
        _record_template(args, run, data)
    return trainer


def _build_parts(
    args: Arguments,
    base: Any,
    family: Family,
    *,
    groups: ProcessGroups,
    stage: Stage | None,
    phases: PhaseRecord,
    label_positions: LabelPositions | None,
) -> RunParts:
    """Layout, randomness and limits of the run."""
    from finetune.checkpoints.writers import RankFileWriter, WholeTensorWriter
    from finetune.models.layers import decoder_layers
    from finetune.run.layout import sharding_stage
    from finetune.training.parts import RunParts

    writes_whole = args.training.unified_checkpoint is not False or groups.model.size == 1
    return RunParts(
        groups=groups,
        stage=stage,
        phases=phases,
        sharding_stage=sharding_stage(args),
        layers=decoder_layers(base),
        label_positions=label_positions,
        randomness=_build_randomness(args, base, family, groups, stage=stage),
        writer=WholeTensorWriter(groups) if writes_whole else RankFileWriter(groups),
        replica_check_steps=args.model.replica_check_steps,
        master_gradients=bool(args.training.amp_master_grad),
        max_skipped_steps=args.model.max_skipped_steps,
        continues_on_save_error=args.model.on_save_error == "continue",
        objective=build_objective(args),
        balance=build_balance(args, base, groups),
        pipeline_words=split_words(args.training.pipeline_parallel_config),
        sharding_words=split_words(args.training.sharding_parallel_config),
        overlaps_sums="gradient_sync_after_accumulate" not in split_words(args.training.data_parallel_config),
    )


def _build_randomness(
    args: Arguments, base: Any, family: Family, groups: ProcessGroups, *, stage: Stage | None
) -> list[Any]:
    """What draws by sample in training: dropout, and NEFTune noise where the embedding is."""
    from finetune.machine.randomness.dropout import KeyedDropout
    from finetune.machine.randomness.no_dropout import NoDropout

    if comparison_of(args) is not None and args.alignment.disable_dropout:
        return [NoDropout(base), *_build_noise(args, base, family, stage)]
    dropout = KeyedDropout(
        base,
        seed=args.training.seed,
        length_first=family.hidden_length_first,
        tensor_degree=groups.tensor.size,
        tensor_rank=groups.tensor.position,
    )
    return [dropout, *_build_noise(args, base, family, stage)]


def _build_noise(args: Arguments, base: Any, family: Family, stage: Stage | None) -> list[Any]:
    from finetune.machine.randomness.embedding_noise import EmbeddingNoise

    if not args.model.neftune or (stage is not None and not stage.plan.holds_first):
        return []
    embedding = find_layer(base, family.embedding_module)
    return [EmbeddingNoise(embedding, alpha=args.model.neftune_noise_alpha, seed=args.training.seed)]


def _add_records(args: Arguments, run: RunDirectory, trainer: FinetuneTrainer) -> None:
    """What the first process shows and writes for all."""
    from finetune.reporting.progress import ProgressReporter
    from finetune.reporting.run_log import RunLog

    _add_trackers(args, run, trainer)
    training = args.training.do_train
    total_steps = trainer.plan_steps() if training else 0
    bar = None if args.training.disable_tqdm is None else not args.training.disable_tqdm
    trainer.training_log.progress = ProgressReporter(total_steps, bar=bar, start_step=run.resume_step or 0)
    if training:
        trainer.training_log.run_log = RunLog(run.path / "train_log.jsonl", run.resume_step)


def _record_template(args: Arguments, run: RunDirectory, data: RunData) -> None:
    """Notes the template of the training where the setting leaves it to the model; the settings hold any other."""
    if args.training.do_train:
        drop_template(run.path)
        if args.data.chat_template is None:
            record_default(
                run.path, tokenizer_folder(args), uses_own=data.reports["train"].num_in_own_template > 0
            )


def _build_batches(
    args: Arguments, data: RunData, pair: TokenizerPair, resolved: ResolvedModel, groups: ProcessGroups
) -> BatchSource:
    """The batches of a data set in memory, or of a stream."""
    from finetune.data.batches.batch_source import MapSource, PreferenceSource

    if data.stream:
        make_rows = make_row_builder(
            padding_of(args, pair), _mask_kind(args, resolved) if args.data.zero_padding else None
        )
        folder = tokenizer_folder(args)
        return build_stream_source(
            args,
            data.stream,
            resolved,
            tokenizer_folder=folder,
            layout=groups.layout,
            rank=groups.rank,
            make_rows=make_rows,
        )
    settings, layout = args.training, groups.layout
    rows = build_rows(args, data.train, pair, resolved)
    kind: type[MapSource] = MapSource if comparison_of(args) is None else PreferenceSource
    order = build_order(args, rows, layout)
    rank, world = layout.data_rank(groups.rank), layout.data_world
    return kind(rows, order, micro_batch_size=settings.per_device_train_batch_size, rank=rank, world=world)


def build_rows(args: Arguments, samples: Sequence[Any], pair: TokenizerPair, resolved: ResolvedModel) -> Any:
    """The samples of a data set in memory as rows, of whichever kind the run has; Paddle is not needed."""
    if comparison_of(args) is None:
        return _build_rows(args, samples, pair, resolved)
    return build_preference_rows(args, samples, resolved, padding=padding_of(args, pair))


def build_order(args: Arguments, rows: Any, layout: Layout) -> GlobalOrder:
    """Which rows each step consumes."""
    from finetune.data.batches.sampler import GlobalOrder, LongestFirst

    settings = args.training
    num_rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    options = {
        "global_batch_size": num_rows * layout.data_world,
        "seed": settings.seed,
        "drop_last": settings.dataloader_drop_last,
    }
    return (
        LongestFirst(rows.lengths, **options)
        if args.data.longest_first
        else GlobalOrder(len(rows), **options)
    )


def padding_of(args: Arguments, pair: TokenizerPair) -> dict[str, Any]:
    """How rows are filled up: the id, and what their lengths are a multiple of."""
    multiple = args.data.pad_to_multiple_of
    if args.training.sequence_parallel:  # every tensor-parallel rank has as many tokens of a row as the next
        multiple = math.lcm(multiple or 1, args.training.tensor_parallel_degree)
    return {"pad_token_id": pair.encoder.pad_token_id, "pad_to_multiple_of": multiple}


def _mask_kind(args: Arguments, resolved: ResolvedModel) -> str:
    model, training = args.model, args.training
    kind = resolved.family.packed_mask(
        resolved.config,
        fused=model.use_flash_attention,
        half=training.bf16 or training.fp16,
        has_prefix=model.prefix_tuning,
    )
    assert kind is not None, "check_topology lets no such run begin"
    return kind


def _build_rows(
    args: Arguments, samples: Sequence[Sample], pair: TokenizerPair, resolved: ResolvedModel
) -> Rows:
    """Padded rows of one sample each, or rows packed with several."""
    from finetune.data.batches.rows import PackedRows, PaddedRows
    from finetune.data.packing.packing import PackedSamples, pack

    padding = padding_of(args, pair)
    if not args.data.zero_padding:
        return PaddedRows(samples, **padding)
    lengths = sample_lengths(samples)
    packing = pack(lengths, args.data.max_length, seed=args.training.seed)
    mask = _mask_kind(args, resolved)
    return PackedRows(PackedSamples(samples, packing), mask=mask, **padding)


def _build_evaluation(
    args: Arguments,
    data: RunData,
    pair: TokenizerPair,
    resolved: ResolvedModel,
    *,
    label_positions: Any,
    groups: ProcessGroups,
) -> Any:
    from finetune.training.evaluation import GenerationEvaluation, GenerationSettings, LossEvaluation

    if not args.training.do_eval:
        return None
    batch_size = args.training.per_device_eval_batch_size
    if comparison_of(args) is not None:
        padding = padding_of(args, pair)
        groups_of_dev = build_preference_rows(args, data.dev, resolved, padding=padding)
        return build_preference_evaluation(
            args, groups_of_dev, label_positions=label_positions, groups=groups
        )
    if not args.data.eval_with_do_generation:
        rows = _build_rows(args, data.dev, pair, resolved)
        return LossEvaluation(rows, batch_size=batch_size, label_positions=label_positions, groups=groups)
    generation = args.generation
    max_new_tokens = generation.max_new_tokens or default_new_tokens(args.data)
    if limit := resolved.family.position_limit(resolved.config):
        longest = max(len(prompt.input_ids) for prompt in data.prompts)
        max_new_tokens = max(1, min(max_new_tokens, limit - longest))  # positions end there
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        top_k=generation.top_k,
        top_p=generation.top_p,
        temperature=generation.temperature,
    )
    return GenerationEvaluation(
        data.prompts,
        batch_size=batch_size,
        encoder=pair.encoder,
        settings=settings,
        seed=args.training.seed,
        groups=groups,
    )


def _add_trackers(args: Arguments, run: RunDirectory, trainer: FinetuneTrainer) -> None:
    """Trackers that PaddleNLP's trainer does not know."""
    folder = Path(trainer.args.logging_dir)
    if reports_to(args.training.report_to, "swanlab"):
        from swanlab.integration.paddlenlp import SwanLabCallback

        folder.mkdir(parents=True, exist_ok=True)
        trainer.add_callback(SwanLabCallback(log_dir=str(folder)))
    if reports_to(args.training.report_to, "mlflow"):
        from finetune.reporting.mlflow_callback import MlflowCallback

        trainer.add_callback(
            MlflowCallback(
                run.path / "mlflow",
                run_name=Path(trainer.args.run_name).name,
                settings=args.to_json(),
                continues=run.resume_step is not None,
            )
        )
