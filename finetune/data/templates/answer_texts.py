"""Whether a template writes the answers that it is given, word for word."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from finetune.data.templates.message_slots import Slots

_START_OF_THOUGHTS, _END_OF_THOUGHTS = "<think>", "</think>"


class AlteredError(Exception):
    """The learned text of an answer has other words than the answer.

    Args:
        answer: The answer.
        written: What is learned, without blanks.
    """

    def __init__(self, answer: str, written: str):
        thoughts, end, said = answer.partition(_END_OF_THOUGHTS)
        if end and _without_blanks(thoughts) not in written and _without_blanks(said) in written:
            super().__init__(
                f"it leaves the thoughts before {_END_OF_THOUGHTS} out of answers. Take them out of the data, or give "
                "chat_template another name or file."
            )
        else:
            super().__init__(
                "it changes the text of an answer, so that a model would learn another one. Give chat_template "
                "another name or file."
            )


def check_answers(slots: Slots, answers: Sequence[str]) -> None:
    """Refuses answers of which other words are learned than they have; blanks are the template's.

    Where the text that asks for an answer opens its thoughts, the answer's own opening is that one.
    """
    runs = [
        (is_learned, _without_blanks("".join(slot.value for slot, _ in run)))
        for is_learned, run in itertools.groupby(slots, key=lambda each: each[1])
    ]
    opened = [text.endswith(_START_OF_THOUGHTS) for _, text in runs]
    learned = "".join(
        _START_OF_THOUGHTS * (number > 0 and opened[number - 1]) + text
        for number, (is_learned, text) in enumerate(runs)
        if is_learned
    )
    for answer in answers:
        if _without_blanks(answer) not in learned:
            raise AlteredError(answer, learned)


def _without_blanks(text: str) -> str:
    return "".join(text.split())
