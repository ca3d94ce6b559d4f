"""From text pieces to token ids and labels, cut to length.

The ids of a sample, before the shift (T of them, T <= max_length)::

    | prefix | source .......... | target ............ EOS |
      kept     cut on the left     cut on the right
    |<--- src_length at most --->|
    |<----------------- max_length at most --------------->|
                             |<-------- learned ------->|

Rules for one round:

1. The source is everything before the first learned piece. The encoder's prefix ids (such as BOS) frame
   it; they are not doubled when the template has written them already.
2. Prefix and source together get at most src_length tokens. The prefix stays; the source loses its
   oldest tokens. (A prefix longer than src_length stays whole and leaves no source.)
3. The target gets what remains of max_length, and loses its last tokens.
4. EOS closes a target that was not cut. An EOS that would not fit counts as cut: the sample ends with
   the last target token and the model is not taught to stop there. A template with an end mark of its
   own gets no EOS, and none is doubled.
5. The target and its EOS are learned, nothing else is. Text after the last learned token is left out,
   because no label depends on it.

Running text is a target without a source: all of it is learned, and loses its last tokens.

Rules for several rounds: each response is followed by EOS and learned. A conversation that fits in
max_length stays whole (src_length does not apply to it). Otherwise the oldest rounds are dropped, whole,
and the rest is rendered anew (so it begins as the template begins a conversation, system text included),
until it fits or one round is left, to which the rules above apply.

These are the rules of the truncation "left", the default. The others change them so:

- "right": the source is never cut, src_length does not apply; what is over max_length is lost at the end.
- "drop", "error": nothing is cut and no round is dropped; a sample over max_length raises `TooLongError`,
  for the caller to count or to tell.

With train_on "last" only the last response (or tool call) of what is kept is learned.

A sample without any learned token of a response is no sample: the builder returns None. That happens when
all responses are blank (EOS alone teaches silence) or when prefix and source leave no room.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finetune.data.conversation import Conversation
from finetune.data.piece_encoding import PieceEncoder, TextEncoder
from finetune.data.pieces import Piece, Template

IGNORE_INDEX = -100
TRUNCATIONS = ("left", "right", "drop", "error")
TRAIN_ON = ("all", "last")


class TooLongError(Exception):
    """An example that does not fit and must not be cut.

    Args:
        num_tokens: Its length.
        limit: The length allowed.
    """

    def __init__(self, num_tokens: int, limit: int):
        super().__init__(f"{num_tokens:,} tokens, allowed are {limit:,}")
        self.num_tokens = num_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One training example of T tokens, shifted by one.

    Attributes:
        input_ids: int32 [T-1], the tokens but the last.
        labels: int32 [T-1]; labels[i] is the token that follows input_ids[i], or `IGNORE_INDEX`.
        num_label_tokens: How many labels are not `IGNORE_INDEX`; at least 1.
        truncated_source: Whether the source lost tokens.
        truncated_target: Whether the target lost tokens, or its EOS.
        num_dropped_rounds: How many of the oldest rounds were dropped.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    num_label_tokens: int
    truncated_source: bool
    truncated_target: bool
    num_dropped_rounds: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One example for evaluation by generation.

    Attributes:
        input_ids: int32 [P], P <= src_length unless the prefix alone is longer; at least 1 token.
        source: The rendered text of the prompt, before any cut.
        target: The reference: the last response.
        truncated_source: Whether the prompt lost tokens.
        num_dropped_rounds: How many of the oldest rounds were dropped.
    """

    input_ids: np.ndarray
    source: str
    target: str
    truncated_source: bool = False
    num_dropped_rounds: int = 0


class SampleBuilder:
    """Encodes conversations by the rules in the module's docstring.

    Args:
        encoder: The tokenizer.
        template: Gives the pieces.
        src_length: Most tokens of prefix and source, for one round, and of a prompt.
        max_length: Most tokens of a whole sample, before the shift; prompts do not need it.
        truncation: One of `TRUNCATIONS`.
        train_on: One of `TRAIN_ON`.

    Raises:
        UserError: The tokenizer lacks special tokens of the template.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        template: Template,
        *,
        src_length: int,
        max_length: int = 0,
        truncation: str = "left",
        train_on: str = "all",
    ):
        if truncation not in TRUNCATIONS or train_on not in TRAIN_ON:
            raise ValueError(f"truncation {truncation!r} or train_on {train_on!r} is unknown")
        self._encoder, self._template = encoder, template
        self._pieces = PieceEncoder(encoder, template)
        self._src_length, self._max_length = src_length, max_length
        self._cuts = truncation in ("left", "right")
        self._cuts_source = truncation == "left"
        self._only_last = train_on == "last"

    def sample(self, conversation: Conversation) -> Sample | None:
        """Encode a conversation for training.

        Returns:
            The sample, or None when no token of a response is left to learn.

        Raises:
            TooLongError: It does not fit, and truncation is "drop" or "error".
        """
        prefix_ids, max_length = self._encoder.prefix_ids, self._max_length
        memory: dict[Piece, list[int]] = {}
        for kept in conversation.shortened():
            ids, learned = _drop_tail(*self._encode(kept, memory))
            if len(prefix_ids) + len(ids) <= max_length or not self._cuts:
                break
        if not has_response(kept, only_last=self._only_last) or True not in learned:
            return None
        if len(prefix_ids) + len(ids) > max_length and not self._cuts:
            raise TooLongError(len(prefix_ids) + len(ids), max_length)
        num_source_tokens = learned.index(True)
        source, target = ids[:num_source_tokens], ids[num_source_tokens:]
        framed = [*prefix_ids, *source]
        if self._cuts_source and kept.num_rounds == 1:
            framed = _truncate_left(source, prefix_ids, self._src_length)
        room = max(max_length - len(framed), 0)
        tokens = np.array(framed + target[:room], dtype=np.int32)
        flags = [False] * len(framed) + learned[num_source_tokens:][:room]
        labels = np.where(flags, tokens, IGNORE_INDEX).astype(np.int32)[1:]
        if not np.any((labels != IGNORE_INDEX) & (labels != self._encoder.eos_token_id)):
            return None
        return Sample(
            input_ids=tokens[:-1],
            labels=labels,
            num_label_tokens=int(np.count_nonzero(labels != IGNORE_INDEX)),
            truncated_source=len(framed) < len(prefix_ids) + len(source),
            truncated_target=len(target) > room,
            num_dropped_rounds=conversation.num_rounds - kept.num_rounds,
        )

    def prompt(self, conversation: Conversation) -> Prompt | None:
        """Encode what stands before the last response.

        The oldest rounds are dropped until the rest fits in src_length; a last prompt that is still too
        long is cut on the left. For one round these are the same tokens that a training sample begins with.

        Returns:
            The prompt, or None when it has no token at all (an empty prompt and no prefix).

        Raises:
            TooLongError: It does not fit, and truncation is "drop" or "error".
        """
        prefix_ids = self._encoder.prefix_ids
        memory: dict[Piece, list[int]] = {}
        for kept in conversation.shortened():
            ids, _ = self._pieces.encode(self._render_prompt(kept), memory=memory)
            if len(prefix_ids) + len(ids) <= self._src_length or not self._cuts:
                break
        if len(prefix_ids) + len(ids) > self._src_length and not self._cuts:
            raise TooLongError(len(prefix_ids) + len(ids), self._src_length)
        framed = _truncate_left(ids, prefix_ids, self._src_length)
        if not framed:
            return None
        return Prompt(
            input_ids=np.array(framed, dtype=np.int32),
            source="".join(piece.text for piece in self._render_prompt(conversation)),
            target=conversation.messages[-1].content,
            truncated_source=len(framed) < len(prefix_ids) + len(ids),
            num_dropped_rounds=conversation.num_rounds - kept.num_rounds,
        )

    def _encode(
        self, conversation: Conversation, memory: dict[Piece, list[int]]
    ) -> tuple[list[int], list[bool]]:
        if conversation.is_text:  # no template has a place for it
            text = conversation.messages[0].content
            return self._pieces.encode([Piece(text, learned=True)], appends_eos=True)
        pieces = self._template.render(conversation)
        return self._pieces.encode(pieces, only_last=self._only_last, memory=memory)

    def _render_prompt(self, conversation: Conversation) -> list[Piece]:
        return [] if conversation.is_text else self._template.render_prompt(conversation)


def build_sample(
    conversation: Conversation, encoder: TextEncoder, template: Template, *, src_length: int, max_length: int
) -> Sample | None:
    """Encode one conversation for training; see `SampleBuilder`, which is for many."""
    return SampleBuilder(encoder, template, src_length=src_length, max_length=max_length).sample(conversation)


def build_prompt(
    conversation: Conversation, encoder: TextEncoder, template: Template, *, src_length: int
) -> Prompt | None:
    """Encode one conversation for evaluation by generation; see `SampleBuilder`, which is for many."""
    return SampleBuilder(encoder, template, src_length=src_length).prompt(conversation)


def has_response(conversation: Conversation, *, only_last: bool = False) -> bool:
    """Whether any response that is learned is not blank."""
    turns = conversation.turns[-1:] if only_last else conversation.turns
    return any(turn.response.strip() for turn in turns)


def _drop_tail(ids: list[int], learned: list[bool]) -> tuple[list[int], list[bool]]:
    """Leave out what follows the last learned token."""
    end = len(learned) - learned[::-1].index(True) if True in learned else len(learned)
    return ids[:end], learned[:end]


def _truncate_left(source: list[int], prefix_ids: tuple[int, ...], length: int) -> list[int]:
    """Frame the newest tokens of the source by the prefix, `length` tokens together."""
    num_dropped = max(len(prefix_ids) + len(source) - length, 0)
    return [*prefix_ids, *source[num_dropped:]]
