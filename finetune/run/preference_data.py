"""The data of a run with a preference method, read and encoded, or taken from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.preference.dataset import load_preferences
from finetune.data.preference.sample import PreferenceSample, find_partners
from finetune.data.preference.store import PreferenceStore
from finetune.data.reading.records import FaultCollector
from finetune.data.reading.splits import read_splits
from finetune.data.samples.data_report import DataReport
from finetune.data.templates.template import load_template
from finetune.errors import UserError
from finetune.run.alignment import gives_rewards
from finetune.run.tokenizer import tokenizer_folder

if TYPE_CHECKING:
    from finetune.data.reading.mixing import DataSource
    from finetune.models.resolve import ResolvedModel
    from finetune.run.tokenizer import TokenizerPair
    from finetune.settings.arguments import Arguments
    from finetune.settings.data import DataArguments


@dataclass
class PreferenceData:
    """What is trained and evaluated; a split that the run does not need is empty.

    Attributes:
        train: To train on.
        dev: To evaluate on.
        reports: Counts of the lines read, kept and left out, by split.
    """

    train: Sequence[PreferenceSample]
    dev: Sequence[PreferenceSample]
    reports: dict[str, DataReport]


def read_preference_samples(
    args: Arguments, files: dict[str, list[DataSource]], pair: TokenizerPair, *, comparison: str
) -> PreferenceData:
    """Reads, renders and tokenizes the splits a run needs, or takes them from the cache.

    Args:
        args: The settings; ``max_length`` bounds a prompt with all its answers, ``src_length`` a prompt.
        files: The data sets by split, from `finetune.run.data.find_files`.
        pair: The tokenizer.
        comparison: "pairs", or "marked" for KTO.

    Raises:
        UserError: Faulty lines, all of them, or a split without a usable sample.
    """
    from finetune.run.data_cache import read_cached

    folder = tokenizer_folder(args)
    if not args.data.data_cache or not files or not folder.is_dir():
        return _encode(args, files, pair, comparison)
    found = read_cached(
        args,
        files,
        folder,
        lambda: vars(_encode(args, files, pair, comparison)),
        kind=PreferenceStore,
        comparison=f"{comparison} with ends" if gives_rewards(args) else comparison,
    )
    return PreferenceData(**{name: found[name] for name in ("train", "dev", "reports")})


def check_positions(
    data: PreferenceData, settings: DataArguments, resolved: ResolvedModel, *, reads_ends: bool = False
) -> None:
    """Every prompt with one of its answers must fit into the positions of the model.

    Args:
        data: The samples.
        settings: Where max_length is named.
        resolved: The model.
        reads_ends: Whether the last token of each answer enters the model.

    Raises:
        UserError: The longest has more tokens.
    """
    limit = resolved.family.position_limit(resolved.config)
    longest = max(map(_longest_text, filter(len, (data.train, data.dev))), default=0) + reads_ends
    if limit and longest > limit:
        raise UserError(
            f"prompts with an answer have up to {longest} tokens, but this model has positions for {limit} only: "
            f"set max_length (now {settings.max_length}) to {limit} or less, or use a model with more positions."
        )


def _longest_text(samples: Sequence[PreferenceSample]) -> int:
    """Most tokens of a prompt with one answer, or with that of its partner where answers are marked."""
    read = list(samples)
    prompts = np.array([len(sample.prompt_ids) - 1 for sample in read])
    answers = np.array([max(map(len, sample.answers)) for sample in read])
    if read[0].desirable is not None:
        answers = np.maximum(answers, answers[find_partners(read)])
    return int((prompts + answers).max())


def _encode(
    args: Arguments, files: dict[str, list[DataSource]], pair: TokenizerPair, comparison: str
) -> PreferenceData:
    settings, do_train, do_eval = args.data, args.training.do_train, args.training.do_eval
    template = load_template(
        settings.chat_template, tokenizer_folder(args), enable_thinking=settings.enable_thinking
    )
    splits = read_splits(
        settings, files, seed=args.training.seed, training=do_train, evaluating=do_eval, comparison=comparison
    )
    encoding: dict[str, Any] = {
        "src_length": settings.src_length,
        "max_length": settings.max_length,
        "truncation": settings.truncation,
        "system": settings.system,
        "reads_ends": gives_rewards(args),
    }
    data = PreferenceData(train=[], dev=[], reports={})
    for split, is_wanted, found in (("train", do_train, splits.train), ("dev", do_eval, splits.dev)):
        if not is_wanted:
            continue
        refused = FaultCollector(skip=settings.on_bad_line == "skip")
        samples, report = load_preferences(found, pair.encoder, template, faults=refused, **encoding)
        setattr(data, split, samples)
        for faults in filter(None, (splits.faults.get(split), refused)):
            report.add_faults(faults)
        data.reports[split] = report
    return data
