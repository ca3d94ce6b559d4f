"""Gradient clipping by global norm."""

import math


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients are multiplied by so that their L2 norm is at most `max_norm`.

    Args:
        norm: Of all gradients together; where it is not finite, the factor is not either.
        max_norm: 0 or less only measures.
    """
    if not math.isfinite(norm):
        return math.nan
    return max_norm / norm if 0 < max_norm < norm else 1.0
