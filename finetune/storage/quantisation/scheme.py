"""How a base is quantised: the settings of it that matter for its values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finetune.errors import UserError

FOUR_BIT = ("nf4", "fp4")
EIGHT_BIT = ("weight_only_int8", "llm.int8")
ALGORITHMS = (*FOUR_BIT, *EIGHT_BIT)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, kw_only=True)
class QuantisationScheme:
    """One way of holding the weights of linear layers.

    Attributes:
        algorithm: One of `ALGORITHMS`.
        block_size: Elements that share a scale, in 4 bits.
        double_quant: Whether the scales of 4-bit blocks are themselves held in 8 bits.
        double_quant_block_size: Scales that share a scale of their own.
    """

    algorithm: str
    block_size: int = 64
    double_quant: bool = False
    double_quant_block_size: int = 256

    @property
    def is_four_bit(self) -> bool:
        """Whether two weights share a byte; otherwise each has one of its own."""
        return self.algorithm in FOUR_BIT

    @property
    def label(self) -> str:
        """For a person: the algorithm and what differs from the usual."""
        if not self.is_four_bit:
            return self.algorithm
        double = ", scales in 8 bits" if self.double_quant else ""
        return f"{self.algorithm} in blocks of {self.block_size}{double}"

    @property
    def bytes_per_weight(self) -> float:
        """Of a large matrix, scales included."""
        if not self.is_four_bit:
            return 1.0
        scale = 1 + 4 / self.double_quant_block_size if self.double_quant else 4
        return 0.5 + scale / self.block_size

    def to_json(self) -> dict[str, Any]:
        """For files that say how a base was quantised."""
        return asdict(self)


def scheme_from_json(fields: Mapping[str, Any], origin: str) -> QuantisationScheme:
    """What `to_json` wrote.

    Args:
        fields: The record.
        origin: The file, for messages.

    Raises:
        UserError: It is not such a record.
    """
    try:
        scheme = QuantisationScheme(**fields)
    except TypeError:
        scheme = None
    if (
        scheme is None
        or scheme.algorithm not in ALGORITHMS
        or scheme.block_size not in BLOCK_SIZES
        or scheme.double_quant_block_size not in BLOCK_SIZES
        or not isinstance(scheme.double_quant, bool)
    ):
        raise UserError(
            f"{origin}: the record of how the base was quantised cannot be read: {dict(fields)!r}. "
            "Copy the file again"
        )
    return scheme
