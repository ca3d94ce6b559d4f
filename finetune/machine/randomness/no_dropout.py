"""No dropout at all, whatever a model's configuration and its adapter say.

TRL and PaddleNLP train on preferences without dropout: the loss compares log-probabilities with those of a reference,
which has none, and a mask of a step would count as a difference between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from finetune.machine.stand_ins import replaced


class NoDropout:
    """Makes dropouts hand on what they get, only inside `active`; the saved configuration stays as it is.

    Args:
        model: The model without its adapter's wrapper.
    """

    def __init__(self, model: Any):
        self._config = getattr(model, "config", None)

    @contextmanager
    def active(self, step: int, rows: Sequence[Sequence[tuple[int, int]]]) -> Iterator[None]:
        """Without dropout in the block; its arguments are those of other sources of randomness and not used."""
        from paddle.nn import functional

        probabilities = self._probabilities()
        for name in probabilities:  # kernels that drop by themselves are told the probability
            setattr(self._config, name, 0.0)
        try:
            with replaced(functional, "dropout", _hand_on):
                yield
        finally:
            for name, value in probabilities.items():
                setattr(self._config, name, value)

    def _probabilities(self) -> dict[str, float]:
        values = self._config.to_dict() if self._config is not None else {}
        return {
            name: value
            for name, value in values.items()
            if "dropout" in name and isinstance(value, float) and value > 0
        }


def _hand_on(x: Any, *_arguments: Any, **_options: Any) -> Any:
    """Stands in for `paddle.nn.functional.dropout`."""
    return x
