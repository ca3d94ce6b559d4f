"""Builds the stream of a run from its arguments, here and in the process that reads it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.reading.mixing import DataSource
from finetune.data.reading.splits import make_options
from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.samples.data_report import DataReport
from finetune.data.samples.piece_encoding import TextEncoder
from finetune.data.samples.tokenize import Sample
from finetune.data.stream.reader import check_streamable
from finetune.data.stream.settings import StreamSettings
from finetune.data.stream.stream import SampleStream
from finetune.data.stream.worker import StreamPlan, StreamProcess, shares_of
from finetune.data.templates.template import load_template
from finetune.data.templates.template_clock import fixed_day, set_day
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.data.batches.batch_source import StreamSource
    from finetune.data.batches.rows import Batch
    from finetune.data.packing.packing import Bin
    from finetune.families.family import Family
    from finetune.models.resolve import ResolvedModel
    from finetune.processes.layout import Layout
    from finetune.settings.arguments import Arguments

NUM_FIRST_SAMPLES = 64


class StreamReport(DataReport):
    """Counts of the first lines of a stream; the others are read while the model trains."""

    def describe(self) -> str:
        """One line for the log."""
        num_bytes = sum(Path(file).stat().st_size for file in self.files)
        return f"read while training, {num_bytes / 2**20:,.1f} MiB; its beginning: {super().describe()}"


def check_sources(args: Arguments, sources: Sequence[DataSource]) -> None:
    """Refuses what cannot be streamed, before anything expensive starts.

    Raises:
        UserError: A built-in data set, or files that can only be read as a whole.
    """
    if not sources:
        raise UserError(
            "lazy reads files, but dataset_name_or_path is the name of a built-in data set: run with --lazy false"
        )
    check_streamable(list(sources), make_options(args.data))


def read_first(
    args: Arguments, sources: Sequence[DataSource], encoder: TextEncoder, folder: Path
) -> tuple[list[Sample], DataReport]:
    """The first samples of a stream, so that faults of its beginning are told before the model is loaded.

    Args:
        args: The arguments of the run.
        sources: The training data.
        encoder: The tokenizer.
        folder: The tokenizer's.

    Raises:
        UserError: Faulty lines, or no usable sample.
    """
    template = load_template(args.data.chat_template, folder, enable_thinking=args.data.enable_thinking)
    builder = BulkBuilder(encoder, template, **_lengths(args))
    stream = SampleStream(sources, builder, _settings(args))
    samples = stream.read_first(max(args.data.preview or 0, NUM_FIRST_SAMPLES))
    return samples, StreamReport(**vars(stream.report))


def make_builder(
    tokenizer: str,
    family: str,
    chat_template: str | None,
    folder: Path,
    lengths: dict[str, Any],
    *,
    splits_special: bool = True,
    enable_thinking: bool | None = None,
    template_day: str | None = None,
) -> BulkBuilder:
    """Tokenizer and template of the process that reads; Paddle is loaded only where nothing else will do."""
    from finetune.families.family import get_family

    set_day(template_day)
    encoder = _load_encoder(tokenizer, get_family(family), splits_special=splits_special)
    template = load_template(chat_template, folder, enable_thinking=enable_thinking)
    return BulkBuilder(encoder, template, **lengths)


def build_stream_source(
    args: Arguments,
    sources: Sequence[DataSource],
    resolved: ResolvedModel,
    *,
    tokenizer_folder: Path,
    layout: Layout,
    rank: int,
    make_rows: Any,
) -> StreamSource:
    """The source of a training that reads its data as a stream.

    Args:
        args: The arguments of the run.
        sources: The training data.
        resolved: The model.
        tokenizer_folder: Where the tokenizer's files lie.
        layout: Degrees of the run.
        rank: Global rank of this process.
        make_rows: Bins to a batch.
    """
    from finetune.data.batches.batch_source import StreamSource, make_share

    micro_batch_size, world = args.training.per_device_train_batch_size, layout.data_world
    global_batch_size = micro_batch_size * args.training.gradient_accumulation_steps * world
    share = make_share(
        global_batch_size, micro_batch_size=micro_batch_size, rank=layout.data_rank(rank), world=world
    )
    name = str(args.model.tokenizer_name_or_path or resolved.folder or resolved.name)
    plan = StreamPlan(
        sources=tuple(sources),
        make_builder=functools.partial(
            make_builder,
            name,
            resolved.family.name,
            args.data.chat_template,
            tokenizer_folder,
            _lengths(args),
            splits_special=args.data.split_special_tokens,
            enable_thinking=args.data.enable_thinking,
            template_day=fixed_day(),
        ),
        settings=_settings(args),
        global_batch_size=global_batch_size,
        shares=shares_of(share),
    )
    return StreamSource(StreamProcess(plan), make_rows)


def make_row_builder(padding: dict[str, Any], mask: str | None) -> Any:
    """The function that puts bins together to a batch.

    Args:
        padding: Options of the rows.
        mask: Kind of the mask of packed rows; None for rows of one sample.
    """
    from finetune.data.batches.rows import PackedRows, PaddedRows

    def make_packed(bins: list[Bin]) -> Batch:
        rows: Any = bins
        return PackedRows(rows, mask=str(mask), **padding).batch(np.arange(len(bins)))

    def make_padded(bins: list[Bin]) -> Batch:
        numbers = np.concatenate([row.sample_indices for row in bins])
        by_number: Any = dict(zip(numbers.tolist(), bins, strict=True))
        return PaddedRows(by_number, **padding).batch(numbers)

    return make_padded if mask is None else make_packed


def _load_encoder(tokenizer: str, family: Family, *, splits_special: bool) -> TextEncoder:
    from finetune.tokenizers.fast_encoder import load_fast_encoder

    if Path(tokenizer).is_dir():
        encoder, _ = load_fast_encoder(tokenizer, family, splits_special=splits_special)
        if encoder is not None:
            return encoder
    from finetune.machine.quiet import silence_libraries
    from finetune.tokenizers.encoder import load_encoder

    silence_libraries(announces=False)
    return load_encoder(tokenizer, family, splits_special=splits_special)


def _lengths(args: Arguments) -> dict[str, Any]:
    names = ("src_length", "max_length", "truncation", "train_on", "split_texts")
    return {name: getattr(args.data, name) for name in names}


def _settings(args: Arguments) -> StreamSettings:
    data = args.data
    return StreamSettings(
        seed=args.training.seed,
        shuffle_buffer_size=data.shuffle_buffer_size,
        row_length=data.max_length if data.zero_padding else None,
        skip_bad_lines=data.on_bad_line == "skip",
        stop_at_too_long=data.truncation == "error",
        train_on=data.train_on,
        system=data.system,
        options=make_options(data),
    )
