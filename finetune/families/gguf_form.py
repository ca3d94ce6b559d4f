"""How the format GGUF has a family, as llama.cpp computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GgufForm:
    """What an export to GGUF needs to know beside Hugging Face's names and fields.

    Attributes:
        architecture: llama.cpp's name.
        epsilon: Field of config.json with the epsilon of the norms.
        is_rms: Whether norms are by root mean square, or also take the mean away.
        has_rotary: Whether positions are rotary; else distances are added to the scores.
        interleaved: Whether the two numbers that are turned together are neighbours there, so that rows of queries
            and keys, whose halves are turned together here, change their order.
        joined_heads: Whether query, key and value are one layer, one head after the other, which is
            all queries, all keys, all values there.
        required: Fields of config.json -> the value that llama.cpp computes, where others exist.
    """

    architecture: str
    epsilon: str = "rms_norm_eps"
    is_rms: bool = True
    has_rotary: bool = True
    interleaved: bool = False
    joined_heads: bool = False
    required: Mapping[str, Any] = field(default_factory=dict)
