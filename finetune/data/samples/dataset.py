"""From files to the samples of a run, with a report of what was cut and dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.data.reading.conversation import Conversation
from finetune.data.reading.formats import read_conversations
from finetune.data.reading.no_examples import describe_no_example
from finetune.data.reading.records import FaultCollector
from finetune.data.samples.bulk_encoding import BulkBuilder, DropCause, OnDropped, OnMade
from finetune.data.samples.data_report import DataReport
from finetune.data.samples.drop_reasons import (
    EMPTY_PROMPT,
    REFUSED,
    describe_reasons,
    describe_remedies,
)
from finetune.data.samples.piece_encoding import TextEncoder
from finetune.data.samples.sample_store import SampleStore
from finetune.data.samples.tokenize import Prompt, SampleBuilder, TooLongError, has_response
from finetune.data.templates.pieces import RefusedConversationError, Template
from finetune.errors import UserError


def load_samples(
    source: Sequence[str | Path] | Sequence[Conversation],
    encoder: TextEncoder,
    template: Template,
    *,
    src_length: int,
    max_length: int,
    truncation: str = "left",
    train_on: str = "all",
    split_texts: bool = False,
    system: str | None = None,
    faults: FaultCollector | None = None,
) -> tuple[SampleStore, DataReport]:
    """Reads and encodes examples for training, or for evaluation by loss.

    Args:
        source: The files of one split, from `finetune.data.reading.source.find_split`, or conversations.
        encoder: The tokenizer.
        template: How rounds are written down.
        src_length: Most tokens of a source, see `finetune.data.samples.tokenize`.
        max_length: Most tokens of a sample.
        truncation: What happens to longer ones, see `finetune.data.samples.tokenize`.
        train_on: "all" or "last" of the responses, or "each" in a sample of its own.
        split_texts: Whether running text that is too long becomes several samples.
        system: The system text of conversations that have none; None leaves that to the template.
        faults: Where those go that the template cannot write; one that skips counts them.

    Returns:
        The samples in file order, and the report.

    Raises:
        UserError: Faulty lines (all of them), or no sample is left.
    """
    conversations, report = _read_source(source, system)
    for conversation in conversations:
        report.add_texts(conversation, encoder, template)
    lengths: dict[str, Any] = {"src_length": src_length, "max_length": max_length, "truncation": truncation}
    builder = BulkBuilder(encoder, template, train_on=train_on, split_texts=split_texts, **lengths)
    too_long = FaultCollector()
    refused = FaultCollector() if faults is None else faults

    counters = _counters(report, too_long, refused, only_last=train_on == "last")
    samples = builder.build(conversations, *counters)
    refused.raise_if_any()
    if truncation == "error":
        too_long.raise_if_any()
    if not len(samples):
        raise UserError(
            _describe_nothing(report, refused, f"src_length {src_length}, max_length {max_length}")
        )
    report.count_samples(samples)
    return samples, report


def _counters(
    report: DataReport, too_long: FaultCollector, refused: FaultCollector, *, only_last: bool
) -> tuple[OnDropped, OnMade]:
    """What is told of conversations that give no sample, and of those that give some."""

    def count_dropped(conversation: Conversation, cause: DropCause) -> None:
        if isinstance(cause, RefusedConversationError):
            refused.add(cause.describe(conversation.place))
            return
        report.add_dropped(conversation, cause, only_last=only_last)
        if cause is not None:
            too_long.add(f"{conversation.place}: {cause}")

    def count_made(conversation: Conversation, count: int, cause: TooLongError | None) -> None:
        report.add_made(conversation, count, cause)
        if cause is not None:
            too_long.add(f"{conversation.place}: {cause}")

    return count_dropped, count_made


def load_prompts(
    source: Sequence[str | Path] | Sequence[Conversation],
    encoder: TextEncoder,
    template: Template,
    *,
    src_length: int,
    truncation: str = "left",
    system: str | None = None,
    faults: FaultCollector | None = None,
) -> tuple[list[Prompt], DataReport]:
    """Reads and encodes examples for evaluation by generation.

    An example whose last response is blank is dropped: there is nothing to compare with.

    Raises:
        UserError: Faulty lines (all of them), or no prompt is left.
    """
    conversations, report = _read_source(source, system)
    for conversation in conversations:
        report.add_texts(conversation, encoder, template)
    builder = SampleBuilder(encoder, template, src_length=src_length, truncation=truncation)
    prompts = []
    too_long = FaultCollector()
    refused = FaultCollector() if faults is None else faults
    for conversation in conversations:
        try:
            prompt = builder.prompt(conversation)
        except TooLongError as error:
            report.add_dropped(conversation, error)
            too_long.add(f"{conversation.place}: {error}")
            continue
        except RefusedConversationError as error:
            refused.add(error.describe(conversation.place))
            continue
        if prompt is None:
            report.num_dropped[EMPTY_PROMPT] += 1
        elif not has_response(conversation, only_last=True):
            report.add_dropped(conversation, None, only_last=True)
        else:
            prompts.append(prompt)
    refused.raise_if_any()
    if truncation == "error":
        too_long.raise_if_any()
    if not prompts:
        raise UserError(_describe_nothing(report, refused, f"src_length {src_length}"))
    report.num_samples = len(prompts)
    report.num_tokens = sum(len(prompt.input_ids) for prompt in prompts)
    report.num_truncated_source = sum(prompt.truncated_source for prompt in prompts)
    report.num_dropped_rounds = sum(prompt.num_dropped_rounds for prompt in prompts)
    return prompts, report


def _read_source(
    source: Sequence[str | Path] | Sequence[Conversation], system: str | None
) -> tuple[Sequence[Conversation], DataReport]:
    paths = [item for item in source if not isinstance(item, Conversation)]
    conversations = [item for item in source if isinstance(item, Conversation)]
    if not conversations:
        conversations = read_conversations(paths)
        files = tuple(map(str, paths))
    else:
        files = tuple(dict.fromkeys(str(conversation.file) for conversation in conversations))
    report = DataReport(files=files, num_lines=len(conversations))
    return with_system(conversations, system), report


def with_system(conversations: Sequence[Conversation], system: str | None) -> Sequence[Conversation]:
    """The conversations, those without a system text with this one; None changes nothing."""
    if system is None:
        return conversations
    return [
        replace(each, system=system) if each.system is None and not each.is_text else each
        for each in conversations
    ]


def _describe_nothing(report: DataReport, refused: FaultCollector, lengths: str) -> str:
    files = ", ".join(report.files) or "the data set"
    if not report.num_lines:
        return describe_no_example(files, FaultCollector())
    dropped = report.num_dropped + Counter({REFUSED: refused.num_faults})
    first = f" The first that was refused: {refused.messages[0]}" if refused.messages else ""
    return (
        f"{files}: none of the {report.num_lines:,} examples can be used with {lengths} "
        f"(dropped: {describe_reasons(dropped)}). {describe_remedies(dropped)}{first}"
    )
