"""The data of a run, read and encoded, or taken from the cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.data.reading.records import FaultCollector
from finetune.data.reading.splits import find_sources, read_splits
from finetune.data.samples.data_report import DataReport
from finetune.data.samples.dataset import load_prompts, load_samples
from finetune.data.samples.tokenize import Prompt
from finetune.data.templates.template import load_template
from finetune.errors import UserError
from finetune.run.alignment import comparison_of
from finetune.run.preference_data import PreferenceData, read_preference_samples
from finetune.run.preference_data import check_positions as check_preference_positions
from finetune.run.stream import check_sources, read_first
from finetune.run.tokenizer import tokenizer_folder

if TYPE_CHECKING:
    from finetune.data.reading.mixing import DataSource
    from finetune.models.resolve import ResolvedModel
    from finetune.run.tokenizer import TokenizerPair
    from finetune.settings.arguments import Arguments
    from finetune.settings.data import DataArguments


@dataclass
class RunData:
    """What is trained and evaluated; a part that the run does not need is empty.

    Attributes:
        train: To train on: `Sample`, or `PreferenceSample` where answers are compared; of a stream, the first ones.
        dev: To evaluate on by loss, of the same kind.
        prompts: To evaluate on by generation.
        reports: Counts of the lines read, kept and left out, by split.
        stream: What to train on where it is read as a stream.
    """

    train: Sequence[Any]
    dev: Sequence[Any]
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
        check_sources(args, files.get("train", ()))
    return files


def check_positions(
    data: RunData,
    settings: DataArguments,
    resolved: ResolvedModel,
    comparison: str | None = None,
    *,
    reads_ends: bool = False,
) -> None:
    """Every sample must fit into the positions of the model.

    Args:
        data: The samples.
        settings: Where max_length is named.
        resolved: The model.
        comparison: What a preference method compares; None: the samples are those of supervised fine-tuning.
        reads_ends: Whether the last token of each answer enters the model, as in a reward model.

    Raises:
        UserError: The longest sample, or in a stream the longest that may come, has more tokens.
    """
    if comparison is not None:
        compared = PreferenceData(data.train, data.dev, data.reports)
        check_preference_positions(compared, settings, resolved, reads_ends=reads_ends)
        return
    limit = resolved.family.position_limit(resolved.config)
    examples: Iterable[Any] = itertools.chain(data.train, data.dev, data.prompts)
    longest = max((len(example.input_ids) for example in examples), default=0)
    if settings.lazy:  # nobody has seen all samples of a stream
        longest = max(longest, settings.max_length)
    if limit and longest > limit:
        raise UserError(
            f"samples have up to {longest} tokens, but this model has positions for {limit} only: "
            f"set max_length (now {settings.max_length}) to {limit} or less, or use a model with more positions."
        )


def read_data(args: Arguments, files: dict[str, list[DataSource]], pair: TokenizerPair) -> RunData:
    """Reads, renders and tokenizes the splits a run needs, or takes them from the cache.

    Raises:
        UserError: Faulty lines, all of them, or a split without a usable sample.
    """
    from finetune.run.data_cache import read_cached

    if (comparison := comparison_of(args)) is not None:
        found = read_preference_samples(args, files, pair, comparison=comparison)
        return RunData(train=found.train, dev=found.dev, prompts=[], reports=found.reports)
    folder = tokenizer_folder(args)
    # A stream is read while training, and a built-in data set has no files to know it by.
    if not args.data.data_cache or args.data.lazy or not files or not folder.is_dir():
        return _encode_data(args, files, pair)
    return RunData(**read_cached(args, files, folder, lambda: vars(_encode_data(args, files, pair))))


def _encode_data(args: Arguments, files: dict[str, list[DataSource]], pair: TokenizerPair) -> RunData:
    settings, do_train, do_eval = args.data, args.training.do_train, args.training.do_eval
    template = load_template(
        settings.chat_template, tokenizer_folder(args), enable_thinking=settings.enable_thinking
    )
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
    encoding = {**common, "split_texts": settings.split_texts}
    encoding |= {"max_length": settings.max_length, "train_on": settings.train_on}
    refused = {split: FaultCollector(skip=settings.on_bad_line == "skip") for split in ("train", "dev")}
    if is_stream:
        data.stream = tuple(files["train"])
        folder = tokenizer_folder(args)
        data.train, data.reports["train"] = read_first(args, data.stream, pair.encoder, folder)
    elif do_train:
        data.train, data.reports["train"] = load_samples(
            splits.train, pair.encoder, template, faults=refused["train"], **encoding
        )
    if do_eval and settings.eval_with_do_generation:
        data.prompts, data.reports["dev"] = load_prompts(
            splits.dev, pair.encoder, template, faults=refused["dev"], **common
        )
    elif do_eval:
        data.dev, data.reports["dev"] = load_samples(
            splits.dev, pair.encoder, template, faults=refused["dev"], **encoding
        )
    for split, report in data.reports.items():
        for faults in filter(None, (splits.faults.get(split), refused[split])):
            report.add_faults(faults)
    return data
