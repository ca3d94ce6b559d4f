"""Hidden states on their way from stage to stage: what both ends know of them, and how they are handed on.

The shape follows from the batch, which every stage has. The dtype depends on what mixed precision makes of the layers
before: it is told once, with the first tensor for a part, and read from the device then; gradients have it, too.
"""

from __future__ import annotations

from typing import Any

import paddle

from finetune.parallel.pipe.stage import Stage
from finetune.processes.groups import Group

_DTYPES = ("float32", "bfloat16", "float16", "float64")


class HiddenStates:
    """Hands hidden states and their gradients on.

    Args:
        stage: What this rank computes.
        group: The ranks of the pipeline, first stage first.
    """

    def __init__(self, stage: Stage, group: Group):
        self.stage, self.group = stage, group
        self._dtypes: dict[tuple[str, int], str] = {}

    def announce(self, tensor: Any, part: int, *, of: str, batch_shape: tuple[int, ...]) -> None:
        """Tells the rank that computes a part the dtype of its hidden states, the first time; call before sending.

        Args:
            tensor: The hidden states.
            part: That computes them next.
            of: "training" or "evaluation", which may compute in different dtypes.
            batch_shape: Rows of the micro-batch and tokens of each.

        Raises:
            RuntimeError: The receiver expects another dtype or shape.
        """
        dtype = str(tensor.dtype).rpartition(".")[2]
        if (of, part) not in self._dtypes:
            self._dtypes[of, part] = dtype
            number = paddle.to_tensor([_DTYPES.index(dtype)], dtype="int64")
            self.group.send(number, part % self.group.size)
        expected = self._dtypes[of, part], self.stage.hidden_shape(batch_shape)
        if expected != (dtype, list(tensor.shape)):
            raise RuntimeError(
                f"hidden states for part {part} are {dtype} {list(tensor.shape)}, expected are {expected[0]} {expected[1]}"
            )

    def dtype(self, part: int, *, of: str) -> str:
        """The dtype of a part's hidden states; waits for the announcement where they come from another rank."""
        if (of, part) not in self._dtypes:
            number = paddle.zeros([1], dtype="int64")
            self.group.receive(number, (part - 1) % self.group.size)
            self._dtypes[of, part] = _DTYPES[number.tolist()[0]]
        return self._dtypes[of, part]

    def empty(self, part: int, *, of: str, batch_shape: tuple[int, ...]) -> Any:
        """A tensor to receive a part's hidden states or their gradient in."""
        return paddle.empty(self.stage.hidden_shape(batch_shape), dtype=self.dtype(part, of=of))
