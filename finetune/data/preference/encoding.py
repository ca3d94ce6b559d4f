"""From conversations with a comparison to token ids, cut to length.

The ids of a sample (P of the prompt; A of each answer with the end that the template teaches)::

    | prefix | prompt ........... | chosen ....... end |
                                  | rejected .... end |
      kept     cut on the left      cut on the right

Rules:

1. A sample has P - 1 + A tokens of all answers together, as many as its row: the answers share their prompt, and the
   last token of an answer is only predicted. At most max_length are allowed, whether rows are shared or not.
2. A sample that does not fit loses the oldest rounds of its prompt, whole, until it fits or one round is left.
3. Of the last round prefix and prompt together get src_length tokens; the prefix stays, the prompt loses its oldest
   tokens.
4. The answers get what remains, and the longer one loses its last tokens first, until both are equally long: a short
   answer is not cut because the other is long. An answer that was cut has no end: it does not teach to stop there.

These are the rules of the truncation "left". With "right" the prompt is never cut, rule 3 does not apply; with "drop"
and "error" nothing is cut and no round dropped, and a sample that does not fit raises `TooLongError`. What was cut is
kept with the sample and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune.data.preference.sample import PreferenceSample
from finetune.data.reading.conversation import Comparison, Conversation, Message
from finetune.data.samples.parts import Part, as_ids, join_ids
from finetune.data.samples.piece_encoding import KnownIds, PlainText, TextEncoder
from finetune.data.samples.tokenize import SampleBuilder, TooLongError
from finetune.data.templates.pieces import Piece, RefusedConversationError, Template

EMPTY_ANSWER = "empty answer"
EMPTY_PROMPT = "empty prompt"
NO_ROOM = "no token of an answer left within the length"
NO_DIFFERENCE = "answers equal within the length"
CHUNK = 256
"""Conversations whose texts go to the tokenizer together."""


class Dropped(NamedTuple):
    """A conversation that gives no sample.

    Attributes:
        conversation: The conversation.
        reason: What to count it under; "" where `error` says it.
        error: It is too long, or the template cannot write it.
    """

    conversation: Conversation
    reason: str
    error: TooLongError | RefusedConversationError | None = None


class _Texts(NamedTuple):
    """The ids of a prompt, without its prefix, and of its answers."""

    prompt: NDArray[np.int32]
    answers: list[NDArray[np.int32]]


class PreferenceBuilder:
    """Encodes conversations by the rules in the module's docstring.

    Args:
        encoder: The tokenizer.
        template: Gives the pieces.
        src_length: Most tokens of prefix and prompt where something has to be cut.
        max_length: Most tokens of a sample.
        reads_ends: Whether the last token of each answer enters the model, as where a reward is read there.
        truncation: One of `finetune.data.samples.tokenize.TRUNCATIONS`.

    Raises:
        UserError: The tokenizer lacks special tokens of the template.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        template: Template,
        *,
        src_length: int,
        max_length: int,
        truncation: str = "left",
        reads_ends: bool = False,
    ):
        self._texts = _AnswerTexts(
            encoder, template, src_length=src_length, truncation=truncation, train_on="last"
        )
        self._prefix = as_ids(encoder.prefix_ids)
        self._opening = as_ids(getattr(encoder, "answer_prefix_ids", ()))
        # A prompt's last token begins each answer; where answers' ends are read, it stands in the trunk besides.
        self._src_length, self._max_length = src_length, max_length - reads_ends
        self._num_ends = int(reads_ends)
        self._cuts, self._cuts_prompt = truncation in ("left", "right"), truncation == "left"

    def build(self, conversations: Iterable[Conversation]) -> Iterator[PreferenceSample | Dropped]:
        """A sample of each conversation, or why there is none, in order.

        Args:
            conversations: Each with a comparison.
        """
        stream = iter(conversations)
        while chunk := list(islice(stream, CHUNK)):
            known = self._texts.encode_ahead(chunk)
            for conversation in chunk:
                try:
                    yield self._build(conversation, known)
                except (TooLongError, RefusedConversationError) as error:
                    yield Dropped(conversation, "", error)

    def _build(self, conversation: Conversation, known: KnownIds) -> PreferenceSample | Dropped:
        if any(not text.content.strip() for text in answers_of(conversation)):
            return Dropped(conversation, EMPTY_ANSWER)
        for kept in conversation.shortened():
            texts = self._texts.encode(kept, known)
            num_prompt = len(self._prefix) + len(texts.prompt) + len(self._opening)
            num_tokens = num_prompt - 1 + sum(map(len, texts.answers))
            if num_tokens <= self._max_length:
                break
            if not self._cuts:
                raise TooLongError(num_tokens + self._num_ends, self._max_length + self._num_ends)
        if not num_prompt:
            return Dropped(conversation, EMPTY_PROMPT)
        num_lost = 0
        if num_tokens > self._max_length and self._cuts_prompt:
            num_lost = min(max(num_prompt - self._src_length, 0), len(texts.prompt))
        prompt = np.concatenate([self._prefix, texts.prompt[num_lost:], self._opening])
        answers = share_room(texts.answers, self._max_length - (len(prompt) - 1))
        if not len(prompt) or not all(map(len, answers)):
            return Dropped(conversation, NO_ROOM)
        if len(answers) > 1 and np.array_equal(answers[0], answers[1]):
            return Dropped(conversation, NO_DIFFERENCE)
        comparison = comparison_of(conversation)
        return PreferenceSample(
            prompt,
            tuple(answers),
            comparison.desirable,
            comparison.margin,
            num_cut_prompt=num_lost,
            num_cut_answer=sum(map(len, texts.answers)) - sum(map(len, answers)),
            num_dropped_rounds=conversation.num_rounds - kept.num_rounds,
        )


def comparison_of(conversation: Conversation) -> Comparison:
    """What the last answer is compared with.

    Raises:
        ValueError: The conversation is not from data of a preference method.
    """
    if conversation.comparison is None:
        raise ValueError(f"{conversation.place}: there is nothing to compare the answer with")
    return conversation.comparison


def answers_of(conversation: Conversation) -> list[Message]:
    """The chosen answer and the rejected one, or the single answer."""
    rejected = comparison_of(conversation).rejected
    return [conversation.messages[-1]] + ([] if rejected is None else [rejected])


def share_room(answers: Sequence[NDArray[np.int32]], room: int) -> list[NDArray[np.int32]]:
    """Answers of at most `room` tokens together; the longest lose their last tokens first."""
    lengths = [len(answer) for answer in answers]
    kept = list(lengths)
    while sum(kept) > max(room, 0):
        longest = max(kept)
        places = [place for place, length in enumerate(kept) if length == longest]
        below = max((length for length in kept if length < longest), default=0)
        over = sum(kept) - max(room, 0)
        step, rest = divmod(min(over, (longest - below) * len(places)), len(places))
        for number, place in enumerate(reversed(places)):  # of equals the last is cut first
            kept[place] -= step + (number < rest)
    return [answer[:length] for answer, length in zip(answers, kept, strict=True)]


class _AnswerTexts(SampleBuilder):
    """Encodes a prompt once, and each of its answers."""

    def encode_ahead(self, conversations: Iterable[Conversation]) -> KnownIds:
        """The ids of all texts of some conversations, found together."""
        texts: dict[PlainText, None] = {}
        for conversation in conversations:
            for single in _single_answers(conversation):
                try:
                    pieces = self.render(single)
                except RefusedConversationError:
                    continue  # is raised again where the conversation is encoded
                texts |= {self._pieces.plain_text(piece): None for piece in pieces if not piece.special}
        return self._pieces.encode_texts(texts)

    def encode(self, conversation: Conversation, known: KnownIds) -> _Texts:
        """The ids of the prompt and of the answers.

        Raises:
            RefusedConversationError: The template cannot write it, or not both answers behind one prompt.
        """
        prompts: list[NDArray[np.int32]] = []
        answers: list[NDArray[np.int32]] = []
        for single in _single_answers(conversation):
            pieces: list[Piece] = self.render(single)
            parts: list[Part] = self._encode_conversation(single, pieces, known)
            start = len(parts)
            while start and parts[start - 1][1]:
                start -= 1
            prompts.append(join_ids([ids for ids, _ in parts[:start]]))
            answers.append(join_ids([ids for ids, _ in parts[start:]]))
        if not all(np.array_equal(prompt, prompts[0]) for prompt in prompts):
            raise RefusedConversationError(
                "the chat template writes the prompt otherwise in front of the rejected answer than in front of the "
                "chosen one, so that the two cannot be compared: choose another chat_template"
            )
        return _Texts(prompts[0], answers)


def _single_answers(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation with each of its answers, of which the last alone is learned."""
    before = [message._replace(learned=True) for message in conversation.messages[:-1]]
    for answer in answers_of(conversation):
        yield replace(conversation, messages=(*before, answer._replace(learned=True)))
