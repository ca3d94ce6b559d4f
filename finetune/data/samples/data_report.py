"""The counts of a data set: lines, samples and tokens, what was cut, what was left out and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from finetune.data.reading.conversation import TOOL, Conversation
from finetune.data.reading.notes import (
    ANSWERS_APART,
    LATER_ANSWERS_TOO_LONG,
    REASONING_LEFT_OUT,
    REASONING_WRITTEN,
    TEXT_DIVIDED,
    TOOL_NAMES_LEFT_OUT,
    ReadingNotes,
)
from finetune.data.reading.records import FaultCollector
from finetune.data.samples.bulk_encoding import DropCause
from finetune.data.samples.drop_reasons import (
    EMPTY_RESPONSE,
    EMPTY_TEXT,
    NO_ROOM,
    NOT_LEARNED,
    TOO_LONG,
    describe_reasons,
)
from finetune.data.samples.piece_encoding import TextEncoder
from finetune.data.samples.sample_store import CUT_SOURCE, CUT_TARGET, SampleStore
from finetune.data.samples.tokenize import TooLongError, has_response
from finetune.data.templates.pieces import Template, chosen_template


@dataclass
class DataReport:
    """Counts of the lines of a split: read, kept, left out.

    Attributes:
        files: Where the examples come from.
        num_lines: Lines that hold an example; blank lines do not count.
        num_samples: Examples kept; duplicates are kept too.
        num_tokens: Tokens of these that enter the model, all together.
        num_label_tokens: Tokens that carry a label; 0 for prompts.
        num_truncated_source: Samples whose source lost tokens.
        num_truncated_target: Samples whose target lost tokens, or its EOS.
        num_dropped_rounds: Rounds of long conversations dropped from samples that were kept.
        num_dropped: Examples dropped, by reason.
        num_faulty_lines: Lines that could not be read and were skipped, as `on_bad_line` says.
        first_fault: The first of these, with its file and line.
        notes: What was read by a rule, and which fields were not used.
        num_in_own_template: Examples that the model's own template writes because no other was named.
        num_naming_special: Examples whose texts spell names of special tokens.
        num_without_template: Conversations written as plain text because the model's folder has no template.
    """

    files: tuple[str, ...] = ()
    num_lines: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_label_tokens: int = 0
    num_truncated_source: int = 0
    num_truncated_target: int = 0
    num_dropped_rounds: int = 0
    num_dropped: Counter[str] = field(default_factory=Counter)
    num_faulty_lines: int = 0
    first_fault: str = ""
    notes: ReadingNotes = field(default_factory=ReadingNotes)
    num_in_own_template: int = 0
    num_naming_special: int = 0
    num_without_template: int = 0

    def add_faults(self, faults: FaultCollector) -> None:
        """Notes what was skipped in reading, and what was read by a rule."""
        self.num_faulty_lines += faults.num_faults
        self.first_fault = self.first_fault or (faults.messages or [""])[0]
        self.notes.rules.update(faults.notes.rules)
        self.notes.unused_fields.update(faults.notes.unused_fields)

    def add_texts(self, conversation: Conversation, encoder: TextEncoder, template: Template) -> None:
        """Notes what template and tokenizer make of texts that nobody may expect."""
        uses_own = getattr(template, "uses_own", None)
        names_special = getattr(encoder, "names_special", None)
        self.num_in_own_template += bool(uses_own and uses_own(conversation))
        is_bare = conversation.is_text or conversation.is_pair
        self.num_without_template += getattr(template, "is_for_want_of_another", False) and not is_bare
        if thoughts := sum(bool(message.reasoning) for message in conversation.messages):
            takes = getattr(chosen_template(template, conversation), "takes_reasoning", False)
            self.notes.add(REASONING_WRITTEN if takes else REASONING_LEFT_OUT, thoughts)
        named = sum(
            message.role == TOOL and bool(message.tool or message.call_id)
            for message in conversation.messages
        )
        if named and not getattr(chosen_template(template, conversation), "takes_tool_names", False):
            self.notes.add(TOOL_NAMES_LEFT_OUT, named)
        self.num_naming_special += bool(
            names_special and any(names_special(message.content) for message in conversation.messages)
        )

    def add_dropped(self, conversation: Conversation, error: DropCause, *, only_last: bool = False) -> str:
        """Notes an example that gave no sample, and says why: it is too long, or nothing is left to learn."""
        answers = conversation.answers[-1:] if only_last else conversation.answers
        if error:
            reason = TOO_LONG
        elif has_response(conversation, only_last=only_last):
            reason = NO_ROOM
        else:
            is_written = any(each.content.strip() for each in answers)
            reason = NOT_LEARNED if is_written else EMPTY_TEXT if conversation.is_text else EMPTY_RESPONSE
        self.num_dropped[reason] += 1
        return reason

    def add_made(self, conversation: Conversation, num_samples: int, too_long: TooLongError | None) -> None:
        """Notes how many samples a conversation gave, several where it was divided, and what is too long."""
        if num_samples > 1:
            self.notes.add(TEXT_DIVIDED if conversation.is_text else ANSWERS_APART)
        if too_long is not None:
            self.notes.add(LATER_ANSWERS_TOO_LONG)

    def count_samples(self, samples: SampleStore) -> None:
        """Notes what was kept, and what of it was cut."""
        self.num_samples = len(samples)
        self.num_tokens = int(samples.lengths.sum())
        self.num_label_tokens = samples.num_label_tokens
        self.num_truncated_source = int(np.count_nonzero(samples.cuts & CUT_SOURCE))
        self.num_truncated_target = int(np.count_nonzero(samples.cuts & CUT_TARGET))
        self.num_dropped_rounds = int(samples.dropped_rounds.sum())

    def describe(self) -> str:
        """One line for the log."""
        lines = f"{_plural(self.num_lines, 'line')} of {_plural(len(self.files), 'file')}"
        parts = [f"{_plural(self.num_samples, 'sample')} from {lines}"]
        tokens = f"{self.num_tokens:,} tokens"
        if self.num_label_tokens:
            tokens += f", {self.num_label_tokens:,} of them learned"
            tokens += f" ({self.num_label_tokens / max(self.num_tokens, 1):.1%})"
        parts.append(tokens)
        if cut := self._describe_cuts():
            parts.append(cut)
        parts += self._describe_texts()
        if self.num_dropped:
            parts.append(f"dropped: {describe_reasons(self.num_dropped)}")
        if self.num_faulty_lines:
            lines = _plural(self.num_faulty_lines, "faulty line")
            parts.append(f"skipped: {lines}, the first: {self.first_fault}")
        parts += self.notes.describe()
        return "; ".join(parts) + "."

    def _describe_texts(self) -> list[str]:
        parts = []
        if self.num_in_own_template:
            count = _plural(self.num_in_own_template, "example")
            parts.append(
                f"written by the model's own chat template (chat_template none for plain text): {count}"
            )
        if self.num_without_template:
            count = _plural(self.num_without_template, "conversation")
            parts.append(
                f"written as plain text, prompts and answers end to end, for want of a chat template in the model's "
                f"folder (set chat_template, to chatml for example; none asks for plain text): {count}"
            )
        if self.num_naming_special:
            count = _plural(self.num_naming_special, "example")
            parts.append(f"names of special tokens in the texts (see split_special_tokens): {count}")
        return parts

    def _describe_cuts(self) -> str:
        counts = {
            "source": self.num_truncated_source,
            "target": self.num_truncated_target,
        }
        cuts = [_plural(count, name) for name, count in counts.items() if count]
        text = f"truncated: {', '.join(cuts)}" if cuts else ""
        if self.num_dropped_rounds:
            text += f"{'; ' if text else ''}old rounds left out: {self.num_dropped_rounds:,}"
        return text


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
