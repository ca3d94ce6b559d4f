"""Builds the parts of a run from its arguments: data, model, adapter, trainer.

Every function here takes what the one before returned, so that the entry script reads as
the list of what happens. Nothing imports Paddle before its function is called.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.dataset import DataReport, load_prompts, load_samples
from finetune.data.sample_store import sample_lengths
from finetune.data.splits import find_sources, read_splits
from finetune.data.template import load_template
from finetune.data.tokenize import Prompt, Sample
from finetune.parallel.layout import Layout
from finetune.parallel.phases import phase
from finetune.parallel.topology import check_topology
from finetune.streaming import build_stream_source, check_sources, make_row_builder, read_first

if TYPE_CHECKING:
    from finetune.data.mixing import DataSource
    from finetune.models.family import Family
    from finetune.models.loading import ResolvedModel
    from finetune.models.tokenizer import FamilyEncoder
    from finetune.models.vocabulary import VocabularyGrowth
    from finetune.parallel.groups import ProcessGroups
    from finetune.run_directory import RunDirectory
    from finetune.settings.arguments import Arguments
    from finetune.training.batch_source import BatchSource
    from finetune.training.rows import Rows
    from finetune.training.trainer import FinetuneTrainer


@dataclass
class TokenizerPair:
    """A tokenizer as PaddleNLP has it and as the project uses it.

    Attributes:
        tokenizer: PaddleNLP's.
        encoder: Ours around it.
        note: Why many texts take longer than they need to; "" when they do not.
    """

    tokenizer: Any
    encoder: FamilyEncoder
    note: str = ""


@dataclass
class RunData:
    """What is trained and evaluated; a part that the run does not need is empty.

    Attributes:
        train: To train on; of a stream, the first ones.
        dev: To evaluate on by loss.
        prompts: To evaluate on by generation.
        reports: What became of the lines, by split.
        stream: What to train on where it is read as a stream.
    """

    train: Sequence[Sample]
    dev: Sequence[Sample]
    prompts: list[Prompt]
    reports: dict[str, DataReport]
    stream: tuple[DataSource, ...] = ()


def find_files(args: Arguments) -> dict[str, list[DataSource]]:
    """Finds the data files of a run before anything expensive starts.

    Returns:
        Data sets by split; a built-in dataset's name has none.

    Raises:
        UserError: A split that the run needs is missing.
    """
    files = find_sources(args.data, training=args.training.do_train, evaluating=args.training.do_eval)
    if args.data.lazy and args.training.do_train:
        check_sources(files.get("train", ()))
    return files


def load_tokenizer_pair(args: Arguments, resolved: ResolvedModel) -> TokenizerPair:
    """Loads the tokenizer, the model's own unless another one is named.

    Raises:
        UserError: It cannot be read, or the adapter to be loaded was trained with another one.
    """
    from finetune.adapters.checkpoint import check_tokenizer
    from finetune.models.fast_encoder import load_fast_encoder
    from finetune.models.tokenizer import FamilyEncoder, load_tokenizer

    source = args.model.tokenizer_name_or_path or resolved.folder or resolved.name
    tokenizer = load_tokenizer(source, resolved.family)
    if adapter := _adapter_folder(args):
        # Here rather than where the adapter is loaded: before any data is tokenized.
        check_tokenizer(adapter, len(tokenizer))
    fast, reason = load_fast_encoder(_tokenizer_folder(args), resolved.family)
    encoder = FamilyEncoder(tokenizer, resolved.family, fast)
    note = "" if encoder.fast else f"Tokenizing with PaddleNLP, text by text: {reason or 'the ids differ'}."
    return TokenizerPair(tokenizer, encoder, note)


def _adapter_folder(args: Arguments) -> Path | None:
    """The saved adapter that the run starts from, if it does."""
    settings = args.model
    path = settings.lora_path if settings.lora else settings.prefix_path if settings.prefix_tuning else None
    return Path(path) if path else None


def read_data(args: Arguments, files: dict[str, list[DataSource]], pair: TokenizerPair) -> RunData:
    """Reads, renders and tokenizes the splits a run needs, or takes them from the cache.

    Raises:
        UserError: Faulty lines, all of them, or a split without a usable sample.
    """
    from finetune.data.run_cache import read_cached

    phase("reading data")
    folder = _tokenizer_folder(args)
    # A stream is read while training, and a built-in data set has no files to know it by.
    if not args.data.data_cache or args.data.lazy or not files or not folder.is_dir():
        return _encode_data(args, files, pair)
    return RunData(**read_cached(args, files, folder, lambda: vars(_encode_data(args, files, pair))))


def _encode_data(args: Arguments, files: dict[str, list[DataSource]], pair: TokenizerPair) -> RunData:
    settings, do_train, do_eval = args.data, args.training.do_train, args.training.do_eval
    template = load_template(settings.chat_template, _tokenizer_folder(args))
    is_stream = do_train and settings.lazy
    splits = read_splits(
        settings,
        files,
        seed=args.training.seed,
        training=do_train and not is_stream,
        evaluating=do_eval,
    )
    data = RunData(train=[], dev=[], prompts=[], reports={})
    common: dict[str, Any] = {
        "src_length": settings.src_length,
        "truncation": settings.truncation,
        "system": settings.system,
    }
    encoding = {**common, "max_length": settings.max_length, "train_on": settings.train_on}
    if is_stream:
        data.stream = tuple(files["train"])
        folder = _tokenizer_folder(args)
        data.train, data.reports["train"] = read_first(args, data.stream, pair.encoder, folder)
    elif do_train:
        data.train, data.reports["train"] = load_samples(splits.train, pair.encoder, template, **encoding)
    if do_eval and settings.eval_with_do_generation:
        data.prompts, data.reports["dev"] = load_prompts(splits.dev, pair.encoder, template, **common)
    elif do_eval:
        data.dev, data.reports["dev"] = load_samples(splits.dev, pair.encoder, template, **encoding)
    for split, faults in splits.faults.items():
        if split in data.reports:
            data.reports[split].add_faults(faults)
    return data


def _tokenizer_folder(args: Arguments) -> Path:
    """Where the tokenizer's files lie, or would lie: a name on the hub may be in the cache."""
    from finetune.models import hub

    name = str(args.model.tokenizer_name_or_path or args.model.model_name_or_path)
    return Path(name) if Path(name).is_dir() else hub.cached_folder(name) or Path(name)


def plan_vocabulary(args: Arguments, resolved: ResolvedModel, pair: TokenizerPair) -> VocabularyGrowth | None:
    """Embeddings that the model needs for a tokenizer with more tokens; None when it has enough.

    Raises:
        UserError: The model's own tokenizer has more tokens than the model has embeddings.
    """
    from finetune.models.vocabulary import find_growth, is_other_tokenizer

    return find_growth(
        resolved.family.adapt_config(resolved.config).get("vocab_size"),
        len(pair.tokenizer),
        family=resolved.family,
        other_tokenizer=is_other_tokenizer(
            args.model.tokenizer_name_or_path, resolved.folder or resolved.name
        ),
    )


def vocabulary_notes(
    args: Arguments, resolved: ResolvedModel, pair: TokenizerPair, layout: Layout
) -> list[str]:
    """What the person should know of the tokenizer and of added embeddings; empty when that is nothing.

    Raises:
        UserError: See `plan_vocabulary`; or the larger vocabulary cannot be divided over the layout.
    """
    from finetune.models.vocabulary import describe

    growth, model = plan_vocabulary(args, resolved, pair), args.model
    if growth:
        check_topology(layout, resolved, args, vocab_size=growth.new)
    untrained = model.prefix_tuning or (model.lora and not (model.modules_to_save or model.lora_path))
    notes = [pair.note] if pair.note else []
    return notes + (describe(growth, untrained=untrained and args.training.do_train) if growth else [])


def load_base_model(
    args: Arguments, resolved: ResolvedModel, pair: TokenizerPair, groups: ProcessGroups
) -> Any:
    """Loads this process's part of the model's weights in the dtype of the run.

    Raises:
        UserError: The tokenizer has more pieces than the model has embeddings, or weights are
            missing, unknown or of another shape.
    """
    from finetune.models.family import import_object
    from finetune.models.loading import load_model
    from finetune.parallel.start import prepare_device
    from finetune.processor import keep_freed_memory
    from finetune.training.seeding import seed_everything

    phase("loading weights")
    prepare_device(args, groups.layout.world)
    if args.training.device == "cpu":
        keep_freed_memory()
        if resolved.family.cpu_layers:
            import_object(resolved.family.cpu_layers)()
    seed_everything(args.training.seed)
    # The cache of keys and values costs memory in training; `generate` asks for it by itself.
    overrides = args.model_config_kwargs(groups.layout, groups.rank) | {"use_cache": False}
    build = None
    if groups.pipeline.size > 1:
        from finetune.parallel.pipe.stage import StagePlan, build_stage

        plan = StagePlan(groups.pipeline.position, groups.pipeline.size, args.model.virtual_pp_degree)
        build = functools.partial(build_stage, family=resolved.family, plan=plan)
    model = load_model(
        resolved,
        dtype=parameter_dtype(args),
        config_overrides=overrides,
        tokenizer=pair.tokenizer,
        growth=plan_vocabulary(args, resolved, pair),
        build=build,
    )
    model.generation_config.use_cache = True
    return model


def parameter_dtype(args: Arguments) -> str:
    """Dtype of the weights: half precision is stored only at level O2, otherwise computed on the fly."""
    if args.training.fp16_opt_level != "O2":
        return "float32"
    return "float16" if args.training.fp16 else "bfloat16" if args.training.bf16 else "float32"


def adapt(model: Any, args: Arguments, resolved: ResolvedModel) -> Any:
    """Puts the adapter that the run asks for on the model, or returns it as it is."""
    from finetune.adapters.lora import add_lora, load_lora
    from finetune.adapters.prefix import add_prefix, load_prefix

    settings, dtype = args.model, parameter_dtype(args)
    if settings.lora and settings.lora_path:
        return load_lora(model, Path(settings.lora_path), modules_to_save=settings.modules_to_save)
    if settings.prefix_tuning and settings.prefix_path:
        return load_prefix(model, Path(settings.prefix_path), family=resolved.family)
    if settings.lora:
        return add_lora(model, settings, family=resolved.family, dtype=dtype, seed=args.training.seed)
    if settings.prefix_tuning:
        return add_prefix(model, settings, family=resolved.family, dtype=dtype, seed=args.training.seed)
    return model


def build_trainer(
    args: Arguments,
    run: RunDirectory,
    model: Any,
    data: RunData,
    pair: TokenizerPair,
    *,
    resolved: ResolvedModel,
    groups: ProcessGroups,
) -> FinetuneTrainer:
    """Puts model, data and records together into a trainer."""
    from finetune.adapters.checkpoint import base_model
    from finetune.parallel.pipe.stage import decoder_layers, stage_of
    from finetune.parallel.topology import sharding_stage
    from finetune.training.loss import LabelPositions
    from finetune.training.setup import build_training_arguments
    from finetune.training.trainer import FinetuneTrainer

    base = base_model(model)
    stage = stage_of(base)
    label_positions = None
    if stage is None or stage.plan.holds_last:
        label_positions = LabelPositions(
            find_layer(base, resolved.family.head_module),
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
        label_positions=label_positions,
        randomness=_build_randomness(args, base, resolved.family, groups),
        groups=groups,
        stage=stage,
        sharding_stage=sharding_stage(args),
        layers=stage.decoder_layers if stage else decoder_layers(base),
        unified=args.training.unified_checkpoint is not False or groups.model.size == 1,
        replica_check_steps=args.model.replica_check_steps,
        master_gradients=bool(args.training.amp_master_grad),
        max_skipped_steps=args.model.max_skipped_steps,
    )
    if groups.is_first:
        _add_records(args, run, trainer)
    return trainer


def _build_randomness(args: Arguments, base: Any, family: Family, groups: ProcessGroups) -> list[Any]:
    """What draws by sample in training: dropout, and NEFTune noise where the embedding is."""
    from finetune.adapters.neftune import EmbeddingNoise
    from finetune.parallel.pipe.stage import stage_of
    from finetune.training.dropout import KeyedDropout

    seed, stage = args.training.seed, stage_of(base)
    dropout = KeyedDropout(
        base,
        seed=seed,
        length_first=family.hidden_length_first,
        tensor_degree=groups.tensor.size,
        tensor_rank=groups.tensor.position,
    )
    if not args.model.neftune or (stage is not None and not stage.plan.holds_first):
        return [dropout]
    embedding = find_layer(base, family.embedding_module)
    return [dropout, EmbeddingNoise(embedding, alpha=args.model.neftune_noise_alpha, seed=seed)]


def _add_records(args: Arguments, run: RunDirectory, trainer: FinetuneTrainer) -> None:
    """What the first process shows and writes for all."""
    from finetune.training.progress import ProgressReporter
    from finetune.training.run_log import RunLog

    training = args.training.do_train
    total_steps = trainer.plan_steps() if training else 0
    bar = None if args.training.disable_tqdm is None else not args.training.disable_tqdm
    trainer.progress = ProgressReporter(total_steps, bar=bar, start_step=run.resume_step or 0)
    if training:
        trainer.run_log = RunLog(run.path / "train_log.jsonl", run.resume_step)


def _build_batches(
    args: Arguments, data: RunData, pair: TokenizerPair, resolved: ResolvedModel, groups: ProcessGroups
) -> BatchSource:
    """The batches of a data set in memory, or of a stream."""
    from finetune.data.sampler import GlobalOrder
    from finetune.training.batch_source import MapSource

    if data.stream:
        make_rows = make_row_builder(
            _padding(args, pair), _mask_kind(args, resolved) if args.data.zero_padding else None
        )
        folder = _tokenizer_folder(args)
        return build_stream_source(
            args,
            data.stream,
            resolved,
            tokenizer_folder=folder,
            layout=groups.layout,
            rank=groups.rank,
            make_rows=make_rows,
        )
    rows = _build_rows(args, data.train, pair, resolved)
    settings, layout = args.training, groups.layout
    micro_batch_size, world = settings.per_device_train_batch_size, layout.data_world
    order = GlobalOrder(
        len(rows),
        global_batch_size=micro_batch_size * settings.gradient_accumulation_steps * world,
        seed=settings.seed,
        drop_last=settings.dataloader_drop_last,
    )
    return MapSource(
        rows, order, micro_batch_size=micro_batch_size, rank=layout.data_rank(groups.rank), world=world
    )


def _padding(args: Arguments, pair: TokenizerPair) -> dict[str, Any]:
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
    from finetune.data.packing import PackedSamples, pack
    from finetune.training.rows import PackedRows, PaddedRows

    padding = _padding(args, pair)
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
    if not args.data.eval_with_do_generation:
        rows = _build_rows(args, data.dev, pair, resolved)
        return LossEvaluation(rows, batch_size=batch_size, label_positions=label_positions, groups=groups)
    generation = args.generation
    max_new_tokens = generation.max_new_tokens or args.data.max_length - args.data.src_length
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


def find_layer(model: Any, last_name: str) -> Any:
    """The one sublayer whose name ends in `last_name`.

    Raises:
        RuntimeError: There is none or more than one: the family's record is wrong.
    """
    found = [layer for name, layer in model.named_sublayers() if name.rpartition(".")[2] == last_name]
    if len(found) != 1:
        raise RuntimeError(f"{type(model).__name__} has {len(found)} layers called {last_name}, expected one")
    return found[0]
