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

Rules for several rounds: each response is followed by EOS and learned. A conversation that fits in
max_length stays whole (src_length does not apply to it). Otherwise the oldest rounds are dropped, whole,
and the rest is rendered anew (so it begins as the template begins a conversation, system text included),
until it fits or one round is left, to which the rules above apply.

A sample without any learned token of a response is no sample: the builder returns None. That happens when
all responses are blank (EOS alone teaches silence) or when prefix and source leave no room.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from finetune.data.formats import Conversation
from finetune.data.template import Piece, Template

IGNORE_INDEX = -100


class TextEncoder(Protocol):
    """What a tokenizer has to offer here.

    Attributes:
        eos_token_id: Closes a response.
        pad_token_id: Fills up a row of a batch.
        prefix_ids: The ids that frame a prompt, such as ``(bos,)``; may be empty.
    """

    eos_token_id: int
    pad_token_id: int
    prefix_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """The ids of a text: no special token added, and none recognised, since text is data."""
        ...

    def encode_special(self, text: str) -> list[int]:
        """The same, but names of special tokens in the text give these tokens (asked of templates only)."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        ...


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


def build_sample(
    conversation: Conversation, encoder: TextEncoder, template: Template, *, src_length: int, max_length: int
) -> Sample | None:
    """Encode a conversation for training by the rules in the module's docstring.

    Args:
        conversation: At least one round.
        encoder: The tokenizer.
        template: Gives the pieces.
        src_length: Most tokens of prefix and source, for one round.
        max_length: Most tokens of the whole sample, before the shift.

    Returns:
        The sample, or None when no token of a response is left to learn.
    """
    encode = _cached_encode(encoder)
    prefix_ids = encoder.prefix_ids
    for kept in _drop_oldest(conversation):
        pieces = template.render(kept)
        ids, learned = _drop_tail(*_encode_pieces(pieces, encode, encoder, appends_eos=template.appends_eos))
        if len(kept.turns) == 1 or len(prefix_ids) + len(ids) <= max_length:
            break
    if not has_response(kept) or True not in learned:
        return None
    num_source_tokens = learned.index(True)
    source, target = ids[:num_source_tokens], ids[num_source_tokens:]
    framed = [*prefix_ids, *source]
    if len(kept.turns) == 1:
        framed = _truncate_left(source, prefix_ids, src_length)
    room = max(max_length - len(framed), 0)
    tokens = np.array(framed + target[:room], dtype=np.int32)
    flags = [False] * len(framed) + learned[num_source_tokens:][:room]
    labels = np.where(flags, tokens, IGNORE_INDEX).astype(np.int32)[1:]
    if not np.any((labels != IGNORE_INDEX) & (labels != encoder.eos_token_id)):
        return None
    return Sample(
        input_ids=tokens[:-1],
        labels=labels,
        num_label_tokens=int(np.count_nonzero(labels != IGNORE_INDEX)),
        truncated_source=len(framed) < len(prefix_ids) + len(source),
        truncated_target=len(target) > room,
        num_dropped_rounds=len(conversation.turns) - len(kept.turns),
    )


def build_prompt(
    conversation: Conversation, encoder: TextEncoder, template: Template, *, src_length: int
) -> Prompt | None:
    """Encode what stands before the last response.

    The oldest rounds are dropped until the rest fits in src_length; a last prompt that is still too long
    is cut on the left. For one round these are the same tokens that a training sample begins with.

    Returns:
        The prompt, or None when it has no token at all (an empty prompt and no prefix).
    """
    encode = _cached_encode(encoder)
    prefix_ids = encoder.prefix_ids
    for kept in _drop_oldest(conversation):
        pieces = template.render_prompt(kept)
        ids, _ = _encode_pieces(pieces, encode, encoder, appends_eos=template.appends_eos)
        if len(prefix_ids) + len(ids) <= src_length:
            break
    framed = _truncate_left(ids, prefix_ids, src_length)
    if not framed:
        return None
    return Prompt(
        input_ids=np.array(framed, dtype=np.int32),
        source="".join(piece.text for piece in template.render_prompt(conversation)),
        target=conversation.turns[-1].response,
        truncated_source=len(framed) < len(prefix_ids) + len(ids),
        num_dropped_rounds=len(conversation.turns) - len(kept.turns),
    )


def has_response(conversation: Conversation) -> bool:
    """Whether any round has a response that is not blank."""
    return any(turn.response.strip() for turn in conversation.turns)


def _drop_oldest(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation with 0, 1, ... of its oldest rounds dropped; the last one stays."""
    yield conversation
    for num_dropped in range(1, len(conversation.turns)):
        yield replace(conversation, turns=conversation.turns[num_dropped:])


def _cached_encode(encoder: TextEncoder) -> Callable[[Piece], list[int]]:
    """Encode pieces, each once: a shorter rendering of a conversation repeats most of them."""

    @functools.cache
    def encode(piece: Piece) -> list[int]:
        if not piece.special:
            return encoder.encode(piece.text)
        data = piece.data.strip()  # templates often trim it
        literal = encoder.encode(data)
        if literal == encoder.encode_special(data):
            return encoder.encode_special(piece.text)  # in one go: some tokenizers mark the start of a text
        before, found, after = piece.text.partition(data)
        if not found:  # the template has altered the data
            return encoder.encode(piece.text)
        return encoder.encode_special(before) + literal + encoder.encode_special(after)

    return encode


def _encode_pieces(
    pieces: Sequence[Piece], encode: Callable[[Piece], list[int]], encoder: TextEncoder, *, appends_eos: bool
) -> tuple[list[int], list[bool]]:
    """The ids of the pieces and whether each is learned; no prefix, but EOS after each learned run."""
    ids: list[int] = []
    learned: list[bool] = []
    for position, piece in enumerate(pieces):
        piece_ids = encode(piece)
        ids += piece_ids
        ends_run = piece.learned and (position + 1 == len(pieces) or not pieces[position + 1].learned)
        if ends_run and appends_eos and piece_ids[-1:] != [encoder.eos_token_id]:
            ids.append(encoder.eos_token_id)
        learned += [piece.learned] * (len(ids) - len(learned))
    num_prefix = len(encoder.prefix_ids)
    if tuple(ids[:num_prefix]) == tuple(encoder.prefix_ids) and True not in learned[:num_prefix]:
        return ids[num_prefix:], learned[num_prefix:]
    return ids, learned


def _drop_tail(ids: list[int], learned: list[bool]) -> tuple[list[int], list[bool]]:
    """Leave out what follows the last learned token."""
    end = len(learned) - learned[::-1].index(True) if True in learned else len(learned)
    return ids[:end], learned[:end]


def _truncate_left(source: list[int], prefix_ids: tuple[int, ...], length: int) -> list[int]:
    """Frame the newest tokens of the source by the prefix, `length` tokens together."""
    num_dropped = max(len(prefix_ids) + len(source) - length, 0)
    return [*prefix_ids, *source[num_dropped:]]
