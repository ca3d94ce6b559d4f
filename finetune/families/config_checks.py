"""Checks of a config.json that several families need: names of one size, the smallest addend of layer norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError

_LARGEST_EPSILON = 1e-3  # Paddle's layer norm refuses more


def check_norm_epsilon(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError where Paddle's layer norm does not take the addend in field `name`."""
    epsilon = config.get(name)
    if epsilon is not None and not 0 <= epsilon <= _LARGEST_EPSILON:
        raise UserError(
            f"config.json has {name} {epsilon}, but Paddle's layer norm takes 0 to {_LARGEST_EPSILON}. "
            "Use other weights"
        )


def check_names_agree(config: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Compares fields that are two names of one.

    Args:
        config: As found.
        names: Name -> its other name.

    Raises:
        UserError: Both are there with different values.
    """
    for name, other in names.items():
        ours, theirs = config.get(name), config.get(other)
        if ours is not None and theirs is not None and ours != theirs:
            raise UserError(
                f"config.json has {name} {ours!r} and {other} {theirs!r}, which are two names of one field: delete the wrong "
                "one, or copy it again"
            )
