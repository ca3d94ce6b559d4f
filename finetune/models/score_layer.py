"""The head of a reward model."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.distributed.fleet.utils.sequence_parallel_utils import GatherOp

from finetune.machine.randomness.seeding import derive_seed
from finetune.models.parameters import assign

_DEVIATION = 0.02  # transformers' where config.json has no initializer_range


class RewardHead(nn.Layer):  # type: ignore[misc]
    """One value for each position, in float32 whatever the type of the model.

    Under tensor parallelism every rank has the whole weight and computes every value, so that the gradient that it
    hands back is whole, too.

    Args:
        width: Of the hidden states.
        config: PaddleNLP's configuration of the model.
    """

    def __init__(self, width: int, config: Any):
        super().__init__()
        self._rows_divided = bool(getattr(config, "sequence_parallel", False))
        self.weight = self.create_parameter(
            [width, 1], dtype=paddle.get_default_dtype(), default_initializer=nn.initializer.Constant(0.0)
        )

    def forward(self, hidden: paddle.Tensor, *_unused: Any, **_more: Any) -> paddle.Tensor:
        """[..., hidden] -> float32 [..., 1]; of rows divided over ranks [tokens / ranks, hidden] -> [tokens, 1]."""
        if self._rows_divided:
            hidden = GatherOp.apply(hidden)
        # In bfloat16 rewards near 4 would be 1/64 apart, more than many a margin.
        with paddle.amp.auto_cast(enable=False):
            return paddle.matmul(hidden.astype("float32"), self.weight.astype("float32"))

    def draw(self, config: Any, seed: int) -> None:
        """Sets the weight to a draw from a normal distribution, the same on all ranks.

        Args:
            config: Of the model, with the deviation.
            seed: Of the run.
        """
        deviation = getattr(config, "initializer_range", None) or _DEVIATION
        random = np.random.default_rng(derive_seed(seed, "reward head"))
        assign(self.weight, random.normal(0, deviation, self.weight.shape).astype(np.float32))
