"""SentencePiece models that have pieces for blanks and line breaks, and whose ids begin behind those of images.

ChatGLM-6B's `ice_text.model`: a line break is the piece <n>, a tab <|tab|>, and a run of 2 to 80 blanks <|blank_N|>; the
first `num_image_tokens` ids of the vocabulary are those of CogView's images, which later files no longer have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from finetune.families.sentencepiece_names import take_names
from finetune.families.text_backends import Ids, UnsupportedTokenizerError
from finetune.storage.files import read_json_or_empty

CHATGLM_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
"""Pieces of the vocabulary that are names of tokens."""
CHATGLM_ROLES = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "[MASK]",
}
_MOST_BLANKS = 80
_MOST_IMAGES = 20000  # what the published class takes where the folder says nothing
_RUN = re.compile(" {2,}")
_WRITTEN = re.compile(r"<n>|<\|tab\|>|<\|blank_(\d+)\|>")


class BlankPieceBackend:
    """Plain text to ids and back.

    Args:
        path: The model file; tokenizer_config.json beside it says how many ids stand in front.
        num_threads: Threads that texts are spread over.

    Attributes:
        special_ids: Ids of the pieces that no text is spelled with.

    Raises:
        UnsupportedTokenizerError: The file is no such model.
    """

    def __init__(self, path: Path, num_threads: int):
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            content, names = take_names(path.read_bytes(), CHATGLM_TOKENS)
            self.processor.LoadFromSerializedProto(content)
        except (RuntimeError, OSError, ValueError):
            raise UnsupportedTokenizerError(f"{path.name} is no SentencePiece model") from None
        said = read_json_or_empty(path.with_name("tokenizer_config.json")).get("num_image_tokens")
        self.offset = _MOST_IMAGES if said is None else int(said)
        self._num_threads = num_threads
        self.num_pieces = self.offset + int(self.processor.get_piece_size())
        for name in ("<unk>", "<pad>"):
            index = int(self.processor.piece_to_id(name))
            if str(self.processor.id_to_piece(index)) == name:
                names[name] = index
        self.special_ids = {name: index + self.offset for name, index in names.items()}

    def encode_many(self, texts: Sequence[str], *, inner: bool = False) -> list[Ids]:
        """The ids of each text, with a blank in front of all of them."""
        written = [_with_pieces(text) for text in texts]
        found = self.processor.encode(written, out_type=int, num_threads=self._num_threads)
        return [[index + self.offset for index in ids] for ids in found]

    def id_of(self, token: str) -> int | None:
        """The id of a piece by its text."""
        if token in self.special_ids:
            return self.special_ids[token]
        index = int(self.processor.piece_to_id(token))
        return None if index == self.processor.unk_id() else index + self.offset

    def decode(self, ids: Sequence[int], *, inner: bool = False) -> str:
        """The text of ids; those of images have none."""
        pieces = [int(index) - self.offset for index in ids]
        text = self.processor.decode([piece for piece in pieces if piece >= 0])
        return _WRITTEN.sub(_blanks, str(text))

    def piece(self, index: int) -> str:
        """One token, for people to read."""
        if index < self.offset:
            return f"<image_{index}>"
        return str(self.processor.id_to_piece(index - self.offset))


def open_chatglm(path: Path, num_threads: int) -> tuple[BlankPieceBackend, dict[str, int]]:
    """The backend of a file, and the ids of its special tokens."""
    backend = BlankPieceBackend(path, num_threads)
    return backend, backend.special_ids


def _with_pieces(text: str) -> str:
    """A text in which pieces stand for line breaks, tabs and runs of blanks, the longest first."""
    return _RUN.sub(_run_of_blanks, text.replace("\n", "<n>").replace("\t", "<|tab|>"))


def _run_of_blanks(found: re.Match[str]) -> str:
    whole, rest = divmod(len(found.group()), _MOST_BLANKS)
    tail = " " if rest == 1 else f"<|blank_{rest}|>" if rest else ""
    return f"<|blank_{_MOST_BLANKS}|>" * whole + tail


def _blanks(found: re.Match[str]) -> str:
    if found.group(1):
        count = int(found.group(1))
        return " " * count if 2 <= count <= _MOST_BLANKS else found.group()
    return "\n" if found.group() == "<n>" else "\t"
