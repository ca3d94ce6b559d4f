"""Fleet's transfers between stages, with the shapes that both ends know in the place of messages about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle
from paddle.distributed.fleet.meta_parallel.pp_utils.p2p_communication import P2pHelper
from paddle.distributed.fleet.meta_parallel.pp_utils.utils import PADDLE_TO_NUMBER

from finetune.parallel.pipe.hidden_states import HiddenStates

Pass = tuple[int, int]
"""The part of the model that is computed, and the micro-batch."""


class Transfers(P2pHelper):  # type: ignore[misc]
    """Fleet's calls that hand hidden states and their gradients on.

    What a rank sends and receives follows the order of its passes, which tells the micro-batch of each transfer.
    """

    def __init__(self, hidden: HiddenStates):
        super().__init__(use_cache=True)
        self._hidden = hidden

    def begin(
        self, shapes: Sequence[tuple[int, ...]], forward: Sequence[Pass], backward: Sequence[Pass]
    ) -> None:
        """Takes up a step.

        Args:
            shapes: Rows and tokens of each micro-batch.
            forward: This rank's forward passes in order.
            backward: Its backward passes.
        """
        last = self._hidden.stage.plan.num_parts - 1
        # The part whose hidden states, or gradient of them, each transfer holds.
        self._sent = iter([(part + 1, shapes[number]) for part, number in forward if part < last])
        self._received = iter([(part, shapes[number]) for part, number in forward if part > 0])
        self._gradients = iter([(part + 1, shapes[number]) for part, number in backward if part < last])

    def _send_meta(self, output_tensor: Any, *_: Any, **__: Any) -> None:
        part, shape = next(self._sent)
        self._hidden.announce(output_tensor, part, of="training", batch_shape=shape)

    def _recv_meta(self, *_: Any, **__: Any) -> None:
        meta = self._send_recv_meta
        meta.recv_shape_message, meta.recv_dtype_message = self._form(*next(self._received))
        meta.recv_stop_gradient = False

    def recv_backward(self, pp_last_stage: bool, *args: Any, **options: Any) -> Any:
        self._expect_gradient(not pp_last_stage)
        return super().recv_backward(pp_last_stage, *args, **options)

    def send_backward_recv_backward(self, input_tensor_grad: Any, recv_next: bool, **options: Any) -> Any:
        self._expect_gradient(recv_next)
        return super().send_backward_recv_backward(input_tensor_grad, recv_next, **options)

    def _expect_gradient(self, is_received: bool) -> None:
        if is_received:
            meta = self._send_recv_meta
            meta.send_shape_message, meta.send_dtype_message = self._form(*next(self._gradients))

    def _form(self, part: int, batch_shape: tuple[int, ...]) -> tuple[list[int], int]:
        """Shape and Fleet's number for the dtype."""
        dtype = getattr(paddle, self._hidden.dtype(part, of="training"))
        return self._hidden.stage.hidden_shape(batch_shape), int(PADDLE_TO_NUMBER[dtype])
