"""What a stream of samples depends on besides its files and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.data.reading.read_options import DEFAULT_OPTIONS, ReadOptions

DEFAULT_BUFFER_SIZE = 10_000


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """The settings of a stream.

    Attributes:
        seed: Not negative.
        shuffle_buffer_size: Samples that the next one is drawn from; 1 keeps the order of the files.
        row_length: Tokens of a packed row; None gives rows of one sample.
        skip_bad_lines: Faulty lines are counted instead of raised.
        stop_at_too_long: Samples that do not fit raise instead of being counted.
        train_on: "all", "last" or "each" of the responses, for the reason of what is dropped.
        system: System text of conversations that have none; None leaves that to the template.
        options: Format of the files.
    """

    seed: int
    shuffle_buffer_size: int = DEFAULT_BUFFER_SIZE
    row_length: int | None = None
    skip_bad_lines: bool = False
    stop_at_too_long: bool = False
    train_on: str = "all"
    system: str | None = None
    options: ReadOptions = DEFAULT_OPTIONS
