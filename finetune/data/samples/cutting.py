"""Which tokens of a sample stay, by the rules in `finetune.data.samples.tokenize`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from finetune.data.samples.parts import Part, count_tokens, drop_first, take_first


class CutSample(NamedTuple):
    """The tokens of a sample before the shift, in parts.

    Attributes:
        parts: The prefix, the source, the target and its EOS, as far as they stay.
        truncated_source: Whether the source lost tokens.
        truncated_target: Whether the target lost tokens, or its EOS.
        num_dropped_rounds: How many of the oldest rounds were dropped.
    """

    parts: list[Part]
    truncated_source: bool
    truncated_target: bool
    num_dropped_rounds: int


def cut_parts(
    frame: Sequence[Part],
    parts: Sequence[Part],
    *,
    opening: Sequence[Part] = (),
    source_length: int | None,
    max_length: int,
) -> tuple[list[Part], bool, bool]:
    """Decides which tokens of a sample stay.

    Args:
        frame: The prefix.
        parts: The rest, up to the last learned token.
        opening: What stands between source and target, counted with the source but never cut.
        source_length: Most tokens of prefix, source and opening; None where the source is not cut.
        max_length: Most tokens of all.

    Returns:
        What stays, and whether the source and the target lost tokens.
    """
    num_source_parts = next((place for place, (_, learned) in enumerate(parts) if learned), len(parts))
    source, target = parts[:num_source_parts], parts[num_source_parts:]
    num_frame = count_tokens(frame) + count_tokens(opening)
    num_source, num_target = count_tokens(source), count_tokens(target)
    num_lost = 0
    if source_length is not None and num_frame + num_source > source_length:
        num_lost = min(num_frame + num_source - source_length, num_source)
        source = drop_first(source, num_lost)
    room = max(max_length - num_frame - num_source + num_lost, 0)
    if num_target > room:
        target = take_first(target, room)
    return [*frame, *source, *opening, *target], num_lost > 0, num_target > room


def split_parts(parts: Sequence[Part], max_length: int, *, opening: Sequence[Part] = ()) -> list[CutSample]:
    """Divides a text into samples of at most `max_length` tokens, each of which begins with the last one's end.

    Args:
        parts: All tokens of the text, with its prefix and EOS.
        max_length: At least 2 more than the opening has.
        opening: What opens every sample.
    """
    samples = []
    rest, room = list(parts), max(max_length - count_tokens(opening), 2)
    while count_tokens(rest) > 1:
        samples.append(CutSample([*opening, *take_first(rest, room)], False, False, 0))
        if count_tokens(rest) <= room:
            break
        rest = drop_first(rest, room - 1)
    return samples


def trains_on_text(parts: Sequence[Part], eos: int) -> bool:
    """Whether a token is learned that is no EOS; the first of all follows no other, and is not learned."""
    for place, (ids, learned) in enumerate(parts):
        if learned:
            ids = ids if place else ids[1:]
            # The last one decides nearly always.
            if len(ids) and (ids[-1] != eos or any(index != eos for index in ids)):
                return True
    return False
