"""Control tokens of Gemma's SentencePiece model, by the names of SentencePiece's trainer."""

from __future__ import annotations

GEMMA_PIECES = {
    **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
    **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"},
}
