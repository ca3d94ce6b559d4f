"""A process group for CPU, in place of Paddle's ProcessGroupGloo, whose limits training cannot live with.

- Its groups share rendezvous keys, so that the second group of a job is refused or waits for ever.
- A collective, or a receive, fails when the ranks come to it more than 30 s apart (saving, evaluation, a slow
  stage), and Paddle offers no way to set that.
- It numbers all calls of a rank in one sequence, so that point-to-point messages in a group of more than two ranks
  wait for each other for ever.
- It has no reduce-scatter, and no calls "on the calculation stream".

This one works on NumPy arrays over `cpu_links.Links`. Sums are taken in the order of the ranks, so a result does not
depend on timing and is the same, to the last bit, on every rank, whether the caller waits for it (`sync_op`) or goes
on meanwhile (`background.py`). Half-precision numbers are added in float32 and
rounded after each rank's, as NCCL does; NumPy does so for float16, and has bfloat16 as bits in uint16.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.processes.cpu.background import BackgroundThread, Exchange, Pending
from finetune.processes.cpu.links import Links
from finetune.storage.dtypes import as_float32, rounded

# Up to here every rank sends its whole tensor to every other (one round); above, each rank reduces one slice and
# hands it round (two rounds, but only 2 (n - 1) / n of the tensor per rank).
_ONE_ROUND_BYTES = 64 * 1024

_Reduction = Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]


class Finished:
    """The task that Paddle's callers wait for, of a call that is done when it returns."""

    def wait(self, *_: Any) -> bool:
        """Returns at once."""
        return True

    is_completed = synchronize = wait


_FINISHED = Finished()
Task = Finished | Pending


class Arrival:
    """The task of a receive that has begun: the message is taken when somebody waits for it.

    Messages of one sender come in order, so that those for earlier receives are taken first.

    Args:
        begun: Receives from this sender that nobody has waited for yet; this one is added.
        take: Takes the next message.
    """

    def __init__(self, begun: deque[Arrival], take: Callable[[], None]):
        self._begun, self._take, self._is_here = begun, take, False
        begun.append(self)

    def wait(self, *_: Any) -> bool:
        """Returns when the tensor holds what was sent."""
        while not self._is_here:
            earliest = self._begun.popleft()
            earliest._take()
            earliest._is_here = True
        return True

    synchronize = wait


class CpuProcessGroup:
    """Collectives and messages among some ranks, with the methods of Paddle's `ProcessGroup` that Python calls.

    Args:
        links: This process's connections.
        ranks: Global ranks of the group, in order.
        group_id: Paddle's number of the group, the same on all its ranks.
    """

    def __init__(self, links: Links, ranks: Sequence[int], group_id: int):
        self._links = links
        self._ranks = tuple(ranks)
        self._position = self._ranks.index(links.rank)
        # Collectives and messages of a group do not wait for one another.
        self._collectives, self._messages = 2 * group_id, 2 * group_id + 1
        self._begun: dict[int, deque[Arrival]] = defaultdict(deque)
        self._background = BackgroundThread(f"group-{group_id}")

    def rank(self) -> int:
        """This process's place in the group."""
        return self._position

    def size(self) -> int:
        """Number of ranks."""
        return len(self._ranks)

    def name(self) -> str:
        """What Paddle shows as the backend."""
        return "CPU"

    def all_reduce(self, tensor: Any, op: Any = None, sync_op: bool = True) -> Task:
        """Reduces a tensor in place."""
        array, operation = tensor.numpy(), _reduction(op, tensor)
        return self._exchange(lambda: self._reduced(array, operation), tensor, sync_op)

    allreduce = all_reduce

    def all_gather(self, first: Any, second: Any, sync_op: bool | None = None) -> Task:
        """Gathers tensors; with `sync_op` (outputs, tensor), without it (tensor, output), as Paddle has both."""
        if sync_op is None:
            return self.all_gather_into_tensor(second, first)
        self._background.finish_earlier()
        for output, part in zip(first, self._gathered(second.numpy()), strict=True):
            _write(output, part)
        return _FINISHED

    def all_gather_into_tensor(self, output: Any, tensor: Any, sync_op: bool = True) -> Task:
        """Joins the tensors of all ranks along the first dim."""
        array = tensor.numpy()

        def exchange() -> NDArray[Any]:
            return np.concatenate([part.reshape(-1) for part in self._gathered(array)])

        return self._exchange(exchange, output, sync_op)

    def reduce(self, tensor: Any, dst: int, op: Any = None, sync_op: bool = True) -> Task:
        """Reduces a tensor in place on the rank at position `dst`; the others keep theirs."""
        array: NDArray[Any] = tensor.numpy()
        operation = _reduction(op, tensor)

        def exchange() -> NDArray[Any]:
            if dst != self._position:
                self._send(dst, array)
                return array
            parts = (array if peer == dst else self._receive(peer, array) for peer in range(self.size()))
            total: NDArray[Any] = reduce(operation, parts)
            return total

        return self._exchange(exchange, tensor, sync_op)

    def reduce_scatter_tensor(self, output: Any, tensor: Any, op: Any = None, sync_op: bool = True) -> Task:
        """Reduces a tensor [n * d, ...] and keeps this rank's part [d, ...]."""
        parts = np.split(tensor.numpy().reshape(-1), self.size())
        operation = _reduction(op, tensor)
        return self._exchange(lambda: self._reduced_part(parts, operation), output, sync_op)

    def reduce_scatter(
        self, output: Any, tensors: Sequence[Any], op: Any = None, sync_op: bool = True
    ) -> Task:
        """Reduces one tensor for each rank and keeps this rank's."""
        arrays, operation = [tensor.numpy() for tensor in tensors], _reduction(op, tensors[0])
        return self._exchange(lambda: self._reduced_part(arrays, operation), output, sync_op)

    def broadcast(self, tensor: Any, src: int, sync_op: bool = True) -> Task:
        """Sets a tensor to what the rank at position `src` holds."""
        array = tensor.numpy() if src == self._position else _array_like(tensor)

        def exchange() -> NDArray[Any]:
            if src != self._position:
                return self._receive(src, array)
            for peer in self._others():
                self._send(peer, array)
            return array

        return self._exchange(exchange, tensor, sync_op)

    def send(self, tensor: Any, dst: int, sync_op: bool = True) -> Finished:
        """Sends a tensor to the rank at position `dst`."""
        self._send(dst, tensor.numpy(), message=True)
        return _FINISHED

    def recv(self, tensor: Any, src: int, sync_op: bool = True) -> Arrival:
        """Fills a tensor with the next one that the rank at position `src` sends; without `sync_op` when waited for."""
        arrival = Arrival(self._begun[src], lambda: self._receive_into(tensor, src))
        if sync_op:
            arrival.wait()
        return arrival

    def send_partial_on_calc_stream(self, tensor: Any, dst: int, num_parts: int, part: int) -> Finished:
        """Sends one of the equal parts of a tensor's flat form."""
        self._send(dst, np.split(tensor.numpy().reshape(-1), num_parts)[part], message=True)
        return _FINISHED

    def recv_partial_on_calc_stream(self, tensor: Any, src: int, num_parts: int, part: int) -> Finished:
        """Fills one of the equal parts of a tensor's flat form with what is sent; the others are left as they are."""
        parts = np.split(tensor.numpy().reshape(-1), num_parts)
        parts[part] = self._receive(src, parts[part], message=True)
        _write(tensor, np.concatenate(parts))
        return _FINISHED

    def all_gather_partial_on_calc_stream(
        self, output: Any, tensor: Any, num_parts: int, part: int
    ) -> Finished:
        """Fills the equal parts of a tensor's flat form with those of the group's ranks, one each."""
        self._background.finish_earlier()
        own = np.split(tensor.numpy().reshape(-1), num_parts)[part]
        _write(output, np.concatenate(self._gathered(own)))
        return _FINISHED

    def _start_coalescing(self) -> None:
        """Sends and receives that follow belong together: a send does not wait for its receiver, so nothing is needed."""

    def _end_coalescing(self, tasks: Any = None) -> None:
        """The end of what `_start_coalescing` began."""

    def barrier(self, device_id: int = -1) -> Finished:
        """Returns when every rank has come here."""
        self._background.finish_earlier()
        self._gathered(np.zeros(1, dtype="int8"))
        return _FINISHED

    all_reduce_on_calc_stream = all_reduce
    all_gather_into_tensor_on_calc_stream = all_gather_into_tensor
    reduce_on_calc_stream = reduce
    reduce_scatter_tensor_on_calc_stream = reduce_scatter_tensor
    reduce_scatter_on_calc_stream = reduce_scatter
    broadcast_on_calc_stream = broadcast
    send_on_calc_stream = send
    recv_on_calc_stream = recv

    def all_gather_on_calc_stream(self, outputs: Sequence[Any], tensor: Any) -> Task:
        """`all_gather` with the outputs first."""
        return self.all_gather(outputs, tensor, True)

    def _exchange(self, exchange: Exchange, output: Any, sync_op: bool) -> Task:
        """Runs a collective, at once or in the background, and writes its result into a tensor."""
        if not sync_op:
            return self._background.begin(Pending(exchange, lambda array: _write(output, array)))
        self._background.finish_earlier()
        _write(output, exchange())
        return _FINISHED

    def _others(self) -> list[int]:
        """The other positions, each rank beginning with its neighbour so that not all send to the same one."""
        return [(self._position + step) % self.size() for step in range(1, self.size())]

    def _gathered(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        for peer in self._others():
            self._send(peer, array)
        return [
            array if peer == self._position else self._receive(peer, array) for peer in range(self.size())
        ]

    def _reduced(self, array: NDArray[Any], operation: _Reduction) -> NDArray[Any]:
        if array.nbytes <= _ONE_ROUND_BYTES:
            return reduce(operation, self._gathered(array))
        parts = np.array_split(array.reshape(-1), self.size())
        own = self._reduced_part(parts, operation)
        for peer in self._others():
            self._send(peer, own)
        done: list[NDArray[Any]] = [
            own if peer == self._position else self._receive(peer, part) for peer, part in enumerate(parts)
        ]
        whole: NDArray[Any] = np.concatenate(done).reshape(array.shape)
        return whole

    def _reduced_part(self, parts: Sequence[NDArray[Any]], operation: _Reduction) -> NDArray[Any]:
        """The reduction of this rank's part; `parts` are one for each rank."""
        for peer in self._others():
            self._send(peer, parts[peer])
        own = parts[self._position]
        return reduce(
            operation,
            (own if peer == self._position else self._receive(peer, own) for peer in range(self.size())),
        )

    def _send(self, position: int, array: NDArray[Any], *, message: bool = False) -> None:
        channel = self._messages if message else self._collectives
        self._links.send(self._ranks[position], channel, _bytes(array).data)

    def _receive_into(self, tensor: Any, position: int) -> None:
        _write(tensor, self._receive(position, _array_like(tensor), message=True))

    def _receive(self, position: int, like: NDArray[Any], *, message: bool = False) -> NDArray[Any]:
        channel = self._messages if message else self._collectives
        data = self._links.receive(self._ranks[position], channel, like.nbytes)
        return np.frombuffer(data, dtype=like.dtype).reshape(like.shape)


def _bytes(array: NDArray[Any]) -> NDArray[Any]:
    """The memory of an array, flat (a memoryview of an empty or 0-d array cannot be cast)."""
    return np.ascontiguousarray(array).reshape(-1).view("uint8")


def _array_like(tensor: Any) -> NDArray[Any]:
    """An array of a tensor's shape and dtype, for its size only."""
    import paddle

    return np.broadcast_to(paddle.zeros([], dtype=tensor.dtype).numpy(), tensor.shape)


def _write(tensor: Any, array: NDArray[Any]) -> None:
    """Sets a tensor in place, a leaf that takes gradients too, and a view as well as a whole."""
    import paddle

    array = np.ascontiguousarray(array).reshape(tensor.shape)
    with paddle.no_grad():
        if tensor.is_contiguous():
            tensor.set_value(array)
        else:  # set_value writes past the end of each row of a view
            tensor.copy_(paddle.to_tensor(array), True)


def _reduction(op: Any, tensor: Any) -> _Reduction:
    """NumPy's function for Paddle's reduction of tensors of a type."""
    import paddle
    from paddle.base import core

    kinds = core.ReduceOp
    functions: dict[Any, _Reduction] = {
        kinds.SUM: np.add,
        kinds.MAX: np.maximum,
        kinds.MIN: np.minimum,
        kinds.PRODUCT: np.multiply,
    }
    function = functions[kinds.SUM if op is None else op]
    if tensor.dtype != paddle.bfloat16:
        return function
    return lambda first, second: rounded(function(as_float32(first), as_float32(second)), first.dtype)
