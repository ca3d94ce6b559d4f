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

Running text is a target without a source: all of it is learned. Where texts are split, one that is too long
becomes several samples, and each token but the first of all is learned exactly once: a sample begins with the
token that the one before it ends with, and prefix and EOS stand at the two ends of the text only::

    | prefix t0 t1 t2 | t2 t3 t4 t5 | t5 t6 EOS |        max_length 4

Where they are not split, it loses its last tokens.

Rules for several rounds: each response is followed by EOS and learned. A conversation that fits in
max_length stays whole (src_length does not apply to it). Otherwise the oldest rounds are dropped, whole,
and the rest is rendered anew (so it begins as the template begins a conversation, system text included),
until it fits or one round is left, to which the rules above apply.

These are the rules of the truncation "left", the default. The others change them so:

- "right": the source is never cut, src_length does not apply; what is over max_length is lost at the end.
- "drop", "error": nothing is cut and no round is dropped; a sample over max_length raises `TooLongError`,
  for the caller to count or to tell.

With train_on "last" only the last response (or tool call) of what is kept is learned. A response that is marked
as not to be learned stays in its place and carries no labels.

Some models have tokens between a prompt and its answer (ChatGLM-6B: [gMASK] <sop>). They stand between source and
target, count with the source and are never cut. Such a sequence has one answer, the last; earlier ones are source, of
which all is one text, and are learned in samples of their own. Running text begins with these tokens, in every sample.

A sample without any learned token of a response is no sample: `SampleBuilder.cut` returns none. That happens when
all responses are blank (EOS alone teaches silence) or when prefix and source leave no room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from finetune.data.reading.conversation import Conversation
from finetune.data.samples.cutting import CutSample, cut_parts, split_parts, trains_on_text
from finetune.data.samples.parts import Part, as_ids, count_tokens, join_ids
from finetune.data.samples.piece_encoding import KnownIds, PieceEncoder, TextEncoder, opens_answers
from finetune.data.templates.pieces import Piece, Template, chosen_template, join_context

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
        super().__init__(
            f"{num_tokens:,} tokens, allowed are {limit:,}: "
            "raise the length, or set truncation to left, right or drop"
        )


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

    input_ids: NDArray[Any]
    labels: NDArray[Any]
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

    input_ids: NDArray[Any]
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
        split_texts: Whether running text that is too long becomes several samples.

    Attributes:
        encoder: The tokenizer.
        template: The template.

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
        split_texts: bool = False,
    ):
        if truncation not in TRUNCATIONS or train_on not in TRAIN_ON:
            raise ValueError(f"truncation {truncation!r} or train_on {train_on!r} is unknown")
        self.encoder, self.template = encoder, template
        self._pieces = PieceEncoder(encoder, template)
        self._frame: list[Part] = [(as_ids(encoder.prefix_ids), False)] if encoder.prefix_ids else []
        opening = tuple(getattr(encoder, "answer_prefix_ids", ()))
        self._opening: list[Part] = [(as_ids(opening), False)] if opening else []
        self._src_length, self._max_length = src_length, max_length
        self._cuts = truncation in ("left", "right")
        self._cuts_source = truncation == "left"
        self._only_last = train_on == "last" or opens_answers(encoder)
        self._splits_texts = split_texts

    def render(self, conversation: Conversation) -> list[Piece]:
        """The pieces of a conversation, for `cut`."""
        if conversation.is_text:  # no template has a place for it
            return [Piece(conversation.messages[0].content, learned=True)]
        render_last = getattr(chosen_template(self.template, conversation), "render_last", None)
        render = render_last if self._only_last and render_last else self.template.render
        pieces = self._settle(conversation, render(conversation))
        return join_context(pieces, has_answer=True) if self._opening else pieces

    def cut(
        self, conversation: Conversation, pieces: Sequence[Piece], known: KnownIds | None = None
    ) -> list[CutSample]:
        """Encodes a conversation for training and cuts it to length.

        Args:
            conversation: The conversation.
            pieces: What `render` gives for it.
            known: Ids of texts that are encoded already.

        Returns:
            What stays of it: one sample, or several of running text that is split; none when no token of a
            response is left to learn.

        Raises:
            TooLongError: It does not fit, and truncation is "drop" or "error".
            RefusedConversationError: The template cannot write it.
        """
        known = {} if known is None else known

        def encode(kept: Conversation) -> list[Part]:
            return self._encode_conversation(
                kept, pieces if kept is conversation else self.render(kept), known
            )

        if not has_response(conversation, only_last=self._only_last):
            return []
        if conversation.is_text and self._splits_texts:
            parts = [*self._frame, *encode(conversation)]
            return split_parts(parts, self._max_length, opening=self._opening)
        kept, parts = self._shorten(conversation, encode, self._max_length)
        num_dropped_rounds = 0
        if kept is not conversation:
            num_dropped_rounds = conversation.num_rounds - kept.num_rounds
            if not has_response(kept, only_last=self._only_last):
                return []
        source_length = self._src_length if self._cuts_source and kept.num_rounds == 1 else None
        cut = cut_parts(
            self._frame,
            parts,
            opening=self._opening,
            source_length=source_length,
            max_length=self._max_length,
        )
        if not trains_on_text(cut[0], self.encoder.eos_token_id):
            return []
        return [CutSample(*cut, num_dropped_rounds)]

    def _encode_conversation(
        self, conversation: Conversation, pieces: Sequence[Piece], known: KnownIds
    ) -> list[Part]:
        """The ids of a conversation up to the last one that is learned, without the prefix."""
        answers = conversation.answers
        parts = self._pieces.encode(
            pieces,
            known,
            appends_eos=conversation.is_text or chosen_template(self.template, conversation).appends_eos,
            only_last=self._only_last,
            answers=() if self._opening or all(message.learned for message in answers) else answers,
        )
        while parts and not parts[-1][1]:  # no label depends on what follows the last learned token
            parts.pop()
        return parts

    def prompt(self, conversation: Conversation) -> Prompt | None:
        """Encodes what stands before the last response.

        The oldest rounds are dropped until the rest fits in src_length; a last prompt that is still too
        long is cut on the left. For one round these are the same tokens that a training sample begins with.

        Returns:
            The prompt, or None when it has no token at all (an empty prompt and no prefix).

        Raises:
            TooLongError: It does not fit, and truncation is "drop" or "error".
        """
        known: KnownIds = {}

        def encode(kept: Conversation) -> list[Part]:
            pieces = self._render_prompt(kept)
            parts = self._pieces.encode(
                pieces, known, appends_eos=chosen_template(self.template, kept).appends_eos
            )
            return [(ids, False) for ids, _ in parts]  # earlier answers are source as well

        length = self._src_length
        kept, parts = self._shorten(conversation, encode, length)
        framed, is_cut, _ = cut_parts(
            self._frame, parts, opening=self._opening, source_length=length, max_length=length
        )
        if not framed:
            return None
        return Prompt(
            input_ids=join_ids([ids for ids, _ in framed]),
            source="".join(piece.text for piece in self._render_prompt(conversation)),
            target=conversation.messages[-1].content,
            truncated_source=is_cut,
            num_dropped_rounds=conversation.num_rounds - kept.num_rounds,
        )

    def _shorten(
        self, conversation: Conversation, encode: Callable[[Conversation], list[Part]], length: int
    ) -> tuple[Conversation, list[Part]]:
        """Drops the oldest rounds until the rest fits in `length` with its prefix, or one round is left."""
        for kept in conversation.shortened():
            parts = encode(kept)
            num_tokens = count_tokens([*self._frame, *self._opening, *parts])
            if num_tokens <= length:
                break
            if not self._cuts:
                raise TooLongError(num_tokens, length)
        return kept, parts

    def _render_prompt(self, conversation: Conversation) -> list[Piece]:
        if conversation.is_text:
            return []
        pieces = self._settle(conversation, self.template.render_prompt(conversation))
        return join_context(pieces, has_answer=False) if self._opening else pieces

    def _settle(self, conversation: Conversation, pieces: list[Piece]) -> list[Piece]:
        is_mixed = getattr(chosen_template(self.template, conversation), "mixes_text", False)
        return self._pieces.settle(pieces, is_mixed=is_mixed)


def has_response(conversation: Conversation, *, only_last: bool = False) -> bool:
    """Whether any response that is learned is not blank."""
    answers = conversation.answers
    return any(
        message.learned and message.content.strip() for message in (answers[-1:] if only_last else answers)
    )
