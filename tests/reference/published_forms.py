"""How published folders hold models that transformers computes as a Llama: other names, joined layers.

Families that transformers has no code of are compared with its Llama, where the weights of one are those of the
other, put in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]


def _as_they_are(weights: Mapping[str, np.ndarray], _config: Mapping[str, Any]) -> Weights:
    return dict(weights)


@dataclass(frozen=True)
class PublishedForm:
    """What a published folder has in place of what transformers writes.

    Attributes:
        config: Fields of config.json that differ.
        rearrange: (weights by the names of transformers' Llama, its config.json) -> those of the folder.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    rearrange: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], Weights] = _as_they_are

    @property
    def is_custom(self) -> bool:
        """Whether transformers cannot read the folder."""
        return bool(self.config)

    def config_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the folder from that of transformers' model; a value of None takes a field away."""
        changed = {**config, **self.config}
        return {name: value for name, value in changed.items() if self.config.get(name, name) is not None}


XVERSE = PublishedForm({"model_type": "xverse", "architectures": ["XverseForCausalLM"]})
