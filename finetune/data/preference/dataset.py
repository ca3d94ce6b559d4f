"""From conversations with a comparison to the samples of a split, with a report of what was cut and dropped."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from finetune.data.preference.encoding import Dropped, PreferenceBuilder, answers_of
from finetune.data.preference.sample import PreferenceSample
from finetune.data.preference.store import PreferenceStore
from finetune.data.reading.conversation import Conversation
from finetune.data.reading.records import FaultCollector
from finetune.data.samples.data_report import DataReport
from finetune.data.samples.dataset import with_system
from finetune.data.samples.drop_reasons import TOO_LONG, describe_reasons
from finetune.data.samples.piece_encoding import TextEncoder
from finetune.data.samples.tokenize import TooLongError
from finetune.data.templates.pieces import RefusedConversationError, Template
from finetune.errors import UserError


def load_preferences(
    conversations: Sequence[Conversation],
    encoder: TextEncoder,
    template: Template,
    *,
    src_length: int,
    max_length: int,
    truncation: str = "left",
    system: str | None = None,
    faults: FaultCollector | None = None,
    reads_ends: bool = False,
) -> tuple[PreferenceStore, DataReport]:
    """Encodes examples of a preference method.

    Args:
        conversations: Each with a comparison, all pairs or all marked answers.
        encoder: The tokenizer.
        template: How rounds are written down.
        src_length: Most tokens of a prompt, see `finetune.data.preference.encoding`.
        max_length: Most tokens of a sample, all its answers together.
        truncation: What happens to longer ones.
        system: The system text of conversations that have none; None leaves that to the template.
        faults: Where those go that the template cannot write; one that skips counts them.
        reads_ends: Whether the last token of each answer enters the model, as where a reward is read there.

    Returns:
        The samples in order, and the report.

    Raises:
        UserError: Examples that cannot be written or are too long, all of them, or no sample is left.
    """
    report = _new_report(conversations)
    conversations = with_system(conversations, system)
    builder = PreferenceBuilder(
        encoder,
        template,
        src_length=src_length,
        max_length=max_length,
        truncation=truncation,
        reads_ends=reads_ends,
    )
    too_long = FaultCollector()
    refused = FaultCollector() if faults is None else faults
    samples: list[PreferenceSample] = []
    for conversation, made in zip(conversations, builder.build(conversations), strict=True):
        everything = (*conversation.messages[:-1], *answers_of(conversation))
        report.add_texts(replace(conversation, messages=everything), encoder, template)
        if isinstance(made, PreferenceSample):
            samples.append(made)
        else:
            _count_dropped(made, report, too_long, refused)
    refused.raise_if_any()
    if truncation == "error":
        too_long.raise_if_any()
    if not samples:
        raise _nothing_left(report, f"src_length {src_length}, max_length {max_length}")
    _count_samples(samples, report)
    report.num_tokens += reads_ends * len(samples)
    return PreferenceStore.of(samples), report


def _new_report(conversations: Sequence[Conversation]) -> DataReport:
    return DataReport(
        files=tuple(dict.fromkeys(str(each.file) for each in conversations)),
        # A record gives several examples in a row: a pair its two marked answers, a ranked list its pairs.
        num_lines=sum(1 for _ in itertools.groupby(conversations, lambda each: each.origin)),
    )


def _nothing_left(report: DataReport, lengths: str) -> UserError:
    return UserError(
        f"{', '.join(report.files) or 'the data set'}: none of the {report.num_lines:,} examples can be used with "
        f"{lengths} (dropped: {describe_reasons(report.num_dropped)}). Leave more room: a larger max_length, which holds a "
        "prompt and all its answers, or a smaller src_length."
    )


def _count_samples(samples: Sequence[PreferenceSample], report: DataReport) -> None:
    report.num_samples = len(samples)
    report.num_tokens = sum(sample.num_tokens for sample in samples)
    report.num_label_tokens = sum(len(answer) for sample in samples for answer in sample.answers)
    report.num_truncated_source = sum(sample.num_cut_prompt > 0 for sample in samples)
    report.num_truncated_target = sum(sample.num_cut_answer > 0 for sample in samples)
    report.num_dropped_rounds = sum(sample.num_dropped_rounds for sample in samples)


def _count_dropped(
    dropped: Dropped, report: DataReport, too_long: FaultCollector, refused: FaultCollector
) -> None:
    error, place = dropped.error, dropped.conversation.place
    if isinstance(error, RefusedConversationError):
        refused.add(error.describe(place))
        return
    report.num_dropped[TOO_LONG if isinstance(error, TooLongError) else dropped.reason] += 1
    if error is not None:
        too_long.add(f"{place}: {error}")
