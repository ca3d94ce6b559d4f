import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.data.reading.conversation import Conversation, make_conversation
from finetune.data.reading.readers import read_file
from finetune.data.reading.records import FaultCollector, Record
from finetune.data.samples.sample_store import SampleStore
from finetune.data.samples.tokenize import Sample, SampleBuilder

SPECIAL_IDS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<sep>": 3}
FIRST_CHARACTER_ID = 10


@dataclass
class CharacterEncoder:
    """A tokenizer small enough to read: one token per character, and four special ones."""

    prefix_ids: tuple[int, ...] = (1,)
    eos_token_id: int = 2
    pad_token_id: int = 0

    def encode(self, text: str) -> list[int]:
        return [FIRST_CHARACTER_ID + ord(character) for character in text]

    def encode_special(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split("(" + "|".join(SPECIAL_IDS) + ")", text):
            ids += [SPECIAL_IDS[part]] if part in SPECIAL_IDS else self.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        names = {index: name for name, index in SPECIAL_IDS.items()}
        return "".join(names.get(int(i)) or chr(int(i) - FIRST_CHARACTER_ID) for i in ids)


def read_records(*files: Path) -> list[Record]:
    """All records of some files; faults are raised together."""
    faults = FaultCollector()
    records = [record for file in files for record in read_file(file, faults)]
    faults.raise_if_any()
    return records


def build_sample(conversation: Conversation, encoder, template, **limits) -> Sample | None:
    """One conversation by itself: its texts go to the tokenizer one by one."""
    builder = SampleBuilder(encoder, template, **limits)
    samples = builder.cut(conversation, builder.render(conversation))
    return SampleStore.from_cut(samples)[0] if samples else None


@pytest.fixture(scope="session")
def encoder() -> CharacterEncoder:
    return CharacterEncoder()


@pytest.fixture(scope="session")
def make_encoder() -> type[CharacterEncoder]:
    return CharacterEncoder


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes objects as JSON lines, and bytes as they are."""

    def write(*lines: object, name: str = "train.json") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        encoded = [x if isinstance(x, bytes) else json.dumps(x, ensure_ascii=False).encode() for x in lines]
        file.write_bytes(b"".join(line + b"\n" for line in encoded))
        return file

    return write


@pytest.fixture(scope="session")
def conversation() -> Callable[..., Conversation]:
    """Builds a conversation from (prompt, response) pairs."""

    def build(*turns: tuple[str, str], system: str | None = None) -> Conversation:
        return make_conversation(turns, system, Path("train.json"), 7)

    return build
