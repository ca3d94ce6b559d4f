"""How the angles of rotary positions are stretched for texts longer than those of pretraining. NumPy only.

| kind | what becomes of the radians per position w of a pair | paper |
|---|---|---|
| linear | w / factor | Chen et al., "Extending Context Window ... via Positional Interpolation" (2023) |
| llama3 | as linear where w is slow, w where it is fast, a mixture between | Llama 3.1 (2024) |
| yarn | the same with a ramp over the pairs; cos and sin times a factor | Peng et al., "YaRN" (2023) |
| longrope | w / (a factor of each pair); cos and sin times a factor | Ding et al., "LongRoPE" (2024) |

longrope has a second list of factors for texts longer than those of pretraining, for which keys that are cached
would have to be turned anew: such texts are refused (`rotary_config`), so that the first list is always the right one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def inverse_frequencies(base: float, dim: int) -> NDArray[Any]:
    """Radians per position of `dim` / 2 pairs, Su et al. 2021: base^(-2i / dim), float32."""
    return (1.0 / base ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))).astype(np.float32)


@dataclass(frozen=True)
class RotaryScaling:
    """Settings of one kind; see the module's text.

    Attributes:
        kind: "linear", "llama3", "yarn" or "longrope".
        factor: Texts become this many times longer.
        original_length: Tokens of the texts of pretraining.
        low: Of llama3, turns within the original length below which a pair is slow; of yarn, beta_slow.
        high: Of llama3, those above which it is fast; of yarn, beta_fast.
        rounded: Whether the ends of yarn's ramp are whole pairs.
        pair_factors: Of longrope, one for each pair.
        amplitude: What cos and sin are multiplied with.
    """

    kind: str
    factor: float = 1.0
    original_length: int = 0
    low: float = 1.0
    high: float = 1.0
    rounded: bool = True
    pair_factors: tuple[float, ...] = ()
    amplitude: float = 1.0

    def frequencies(self, base: float, dim: int) -> NDArray[Any]:
        """Radians per position of `dim` / 2 pairs, float32."""
        plain = inverse_frequencies(base, dim)
        if self.kind == "linear":
            return self._slowed(plain)
        if self.kind == "llama3":
            return self._mixed_by_turns(plain)
        if self.kind == "yarn":
            return self._mixed_by_ramp(plain, base, dim)
        slowed: NDArray[Any] = plain / np.array(self.pair_factors, np.float32)
        return slowed

    def _slowed(self, plain: NDArray[Any]) -> NDArray[Any]:
        slowed: NDArray[Any] = plain / np.float32(self.factor)
        return slowed

    def _mixed_by_turns(self, plain: NDArray[Any]) -> NDArray[Any]:
        turns = np.float32(self.original_length) * plain / np.float32(2 * math.pi)
        share = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0).astype(np.float32)
        return self._mixed(plain, share)

    def _mixed_by_ramp(self, plain: NDArray[Any], base: float, dim: int) -> NDArray[Any]:
        first, last = (self._pair_of(turns, base, dim) for turns in (self.high, self.low))
        if self.rounded:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        width = last - first or 0.001
        ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - first) / width, 0.0, 1.0)
        share = 1 - ramp.astype(np.float32)
        return self._mixed(plain, share)

    def _mixed(self, plain: NDArray[Any], share: NDArray[Any]) -> NDArray[Any]:
        mixed: NDArray[Any] = (1 - share) * self._slowed(plain) + share * plain
        return mixed

    def _pair_of(self, turns: float, base: float, dim: int) -> float:
        """The pair, as a real number, that makes so many turns within the original length."""
        return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))


def yarn_amplitude(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies cos and sin with: 0.1 weight ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope_amplitude(factor: float, original_length: int) -> float:
    """What LongRoPE multiplies cos and sin with: sqrt(1 + ln(factor) / ln(original length))."""
    return math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0
