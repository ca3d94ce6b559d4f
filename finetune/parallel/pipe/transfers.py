"""Fleet's transfers between stages, with what both ends know in the place of messages about shapes.

The shape of hidden states follows from the batch, which every stage has. The dtype depends on what mixed precision makes
of the layers before: it is told once, with the first tensor for a part, and read from the device then. Gradients have
the form of the hidden states that they belong to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import paddle
from paddle.distributed.fleet.meta_parallel.pp_utils.p2p_communication import P2pHelper
from paddle.distributed.fleet.meta_parallel.pp_utils.utils import number_2_dtype, paddle_2_number

from finetune.parallel.pipe.stage import Stage
from finetune.processes.groups import Group

Pass = tuple[int, int]
"""The part of the model that is computed, and the micro-batch."""


class Transfers(P2pHelper):  # type: ignore[misc]
    """Fleet's calls that hand hidden states and their gradients on.

    What a rank sends and receives follows the order of its passes, which tells the micro-batch of each transfer.

    Args:
        stage: What this rank computes.
        group: The ranks of the pipeline, first stage first.
    """

    def __init__(self, stage: Stage, group: Group):
        super().__init__(use_cache=True)
        self.stage, self.group = stage, group
        self._of = ""
        self._dtypes: dict[tuple[str, int], int] = {}

    def begin(
        self,
        of: str,
        shapes: Sequence[tuple[int, ...]],
        *,
        forward: Sequence[Pass],
        backward: Sequence[Pass] = (),
    ) -> None:
        """Takes up a step, or a batch that is evaluated.

        Args:
            of: "training" or "evaluation", which may compute in different dtypes.
            shapes: Rows and tokens of each micro-batch.
            forward: This rank's forward passes in order.
            backward: Its backward passes.
        """
        last = self.stage.plan.num_parts - 1

        # The part whose hidden states, or their gradient, each transfer holds.
        def forms(passes: Sequence[Pass], step: int) -> Iterator[tuple[int, tuple[int, ...]]]:
            return iter([(part + step, shapes[number]) for part, number in passes if 0 < part + step <= last])

        self._of = of
        self._sent, self._received, self._gradients = forms(forward, 1), forms(forward, 0), forms(backward, 1)

    def dtype(self, part: int) -> int:
        """Fleet's number for the dtype of a part's hidden states; waits for it where another rank computes them."""
        if (self._of, part) not in self._dtypes:
            number = paddle.zeros([1], dtype="int64")
            self.group.receive(number, (part - 1) % self.group.size)
            self._dtypes[self._of, part] = int(number.tolist()[0])
        return self._dtypes[self._of, part]

    def _send_meta(self, output_tensor: Any, *_: Any, **__: Any) -> None:
        """Tells the next part's rank the dtype, the first time.

        Raises:
            RuntimeError: The receiver expects another dtype or shape.
        """
        part, batch_shape = next(self._sent)
        number = paddle_2_number(output_tensor.dtype)
        if (self._of, part) not in self._dtypes:
            self._dtypes[self._of, part] = number
            self.group.send(paddle.to_tensor([number], dtype="int64"), part % self.group.size)
        expected = self.stage.hidden_shape(batch_shape), self.dtype(part)
        if expected != (output_tensor.shape, number):
            raise RuntimeError(
                f"hidden states for part {part} are {output_tensor.dtype} {output_tensor.shape}, "
                f"expected are {number_2_dtype(expected[1])} {expected[0]}"
            )

    def _recv_meta(self, *_: Any, **__: Any) -> None:
        meta = self._send_recv_meta
        meta.recv_shape_message, meta.recv_dtype_message = self._form(*next(self._received))
        meta.recv_stop_gradient = False

    def recv_backward(self, pp_last_stage: bool, *args: Any, **options: Any) -> Any:
        """Fleet's, for a gradient in the form of its hidden states."""
        self._expect_gradient(not pp_last_stage)
        return super().recv_backward(pp_last_stage, *args, **options)

    def send_backward_recv_backward(self, input_tensor_grad: Any, recv_next: bool, **options: Any) -> Any:
        """Fleet's, for a gradient in the form of its hidden states."""
        self._expect_gradient(recv_next)
        return super().send_backward_recv_backward(input_tensor_grad, recv_next, **options)

    def _expect_gradient(self, is_received: bool) -> None:
        if is_received:
            meta = self._send_recv_meta
            meta.send_shape_message, meta.send_dtype_message = self._form(*next(self._gradients))

    def _form(self, part: int, batch_shape: tuple[int, ...]) -> tuple[list[int], int]:
        return self.stage.hidden_shape(batch_shape), self.dtype(part)
