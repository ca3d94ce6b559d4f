"""Builders that a worker of a test can import."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.templates.template import PlainTemplate

CHARACTERS_PER_TOKEN = 16


class CoarseEncoder:
    """One token for every few characters, so that a large file is read fast."""

    eos_token_id = 2
    pad_token_id = 0
    prefix_ids: tuple[int, ...] = (1,)

    def encode(self, text: str) -> list[int]:
        return [3 + ord(character) for character in text[::CHARACTERS_PER_TOKEN]]

    def encode_special(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError


def make_coarse_builder() -> BulkBuilder:
    return BulkBuilder(CoarseEncoder(), PlainTemplate(), src_length=1000, max_length=4000)


def fail_to_build() -> BulkBuilder:
    raise ZeroDivisionError("the tokenizer fell over")
