"""Which degrees of parallelism fit the sizes of a model, and what to say where one does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Layers are split over the cards of one or two machines.
_LARGEST_DEGREE = 16


@dataclass(frozen=True)
class ParallelLimits:
    """Which sizes of the config a degree must divide.

    Attributes:
        tensor_divides: Fields of config.json that the tensor-parallel degree must divide.
        tensor_divides_half: The same for fields that hold two equal parts, each of which is split.
    """

    tensor_divides: tuple[str, ...] = ()
    tensor_divides_half: tuple[str, ...] = ()

    def tensor_faults(
        self, size_of: Callable[[str], int | None], degree: int, vocab_size: int | None
    ) -> list[str]:
        """Reasons why a tensor-parallel degree does not fit.

        Args:
            size_of: The size that the model's configuration has under a name; None where it has none.
            degree: Ranks that hold slices of every layer.
            vocab_size: Rows of the embeddings where they grow beyond those of the config.
        """
        faults: list[str] = []
        parts = dict.fromkeys(self.tensor_divides, 1) | dict.fromkeys(self.tensor_divides_half, 2)
        for name, num_parts in parts.items():
            grown = vocab_size if name == "vocab_size" else None
            size = grown or size_of(name)
            if degree == 1 or size is None or size % (num_parts * degree) == 0:
                continue
            faults.append(
                f"tensor_parallel_degree is {degree} but must divide {'half of ' * (num_parts - 1)}{name}, "
                f"which is {size} in this model{' with its added tokens' if grown else ''}: "
                f"choose {_divisors_as_text(size // num_parts)}"
            )
        return faults


def stage_faults(num_layers: int, pipeline_degree: int, virtual_degree: int) -> list[str]:
    """Why the layers do not suffice for the stages and their chunks; empty when they do."""
    if pipeline_degree * virtual_degree <= num_layers:
        return []
    product = f" x virtual_pp_degree {virtual_degree}" if virtual_degree > 1 else ""
    remedy = f"a product of {num_layers}" if virtual_degree > 1 else f"{num_layers}"
    return [
        f"pipeline_parallel_degree is {pipeline_degree}{product} but this model has {num_layers} layers: "
        f"choose {remedy} or less"
    ]


def _divisors_as_text(size: int) -> str:
    """The divisors that a tensor-parallel degree may have in practice."""
    divisors = [str(degree) for degree in range(1, min(size, _LARGEST_DEGREE) + 1) if size % degree == 0]
    return divisors[0] if len(divisors) == 1 else f"{', '.join(divisors[:-1])} or {divisors[-1]}"
