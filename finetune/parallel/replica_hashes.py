"""Do all ranks still hold the same weights where they must? Compared by hash, so that it costs next to nothing.

Ranks along the data axis hold the same tensors; ranks of a tensor-parallel group hold the same norms, biases of
row-parallel layers and LoRA matrices that are not split. A rank that drifts away (a faulty card, an update that was
left out, a seed that differs) spoils a run without any error; here it ends it with the name of the tensor. Every
tensor is hashed to 64 bits where it lies, and only the hashes travel: 8 bytes per tensor and rank.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.processes.groups import Group, ProcessGroups

_BLOCK_WORDS = 1 << 13
_MULTIPLIER = 6364136223846793005  # odd, from Knuth's linear congruential generator
_MASK = (1 << 64) - 1
_NAMED = 10


class ReplicasDiverged(RuntimeError):
    """Ranks hold different values where they must hold the same."""


def tensor_hash(tensor: Any) -> int:
    """A 64-bit hash, as a signed integer, of a tensor's bits; it finds faults, it is no defence against malice.

    The bits are read as 64-bit words x, in blocks of `_BLOCK_WORDS`. A block's hash is the sum of w[i] * mix(x[i])
    modulo 2**64, with fixed random odd weights w, so that a change of any one word changes it for certain; the blocks
    are chained by a multiplication (Dietzfelbinger's multiply-shift family, as a dot product: 4 GB/s on one core).

    Args:
        tensor: Paddle tensor of any shape and dtype, on any device; one that is on a card is copied
            to the host, one after another.
    """
    state = int(tensor.size)
    if state:  # NumPy gets bfloat16 as its bits, in uint16
        state = _fold(state, tensor.detach().contiguous().numpy().reshape(-1))
    return (state & _MASK) - (1 << 64) * ((state & _MASK) >> 63)


def _fold(state: int, values: npt.NDArray[Any]) -> int:
    """Takes an array [n] of any dtype into a hash."""
    data = values.view(np.uint8)
    words = data[: data.size // 8 * 8].view(np.uint64)
    rest = int.from_bytes(data[words.size * 8 :].tobytes(), "little")
    weights = _weights()
    for start in range(0, words.size, _BLOCK_WORDS):
        block = words[start : start + _BLOCK_WORDS]
        # Without mixing, two changes of the highest bit, such as two signs, would cancel.
        mixed = block ^ (block >> np.uint64(29))
        state = (state * _MULTIPLIER + int(np.dot(mixed, weights[: mixed.size]))) & _MASK
    return (state * _MULTIPLIER + rest) & _MASK


@functools.cache
def _weights() -> npt.NDArray[np.uint64]:
    """Fixed odd numbers, uint64 [_BLOCK_WORDS]."""
    drawn = np.random.Generator(np.random.PCG64(2026)).integers(0, 1 << 63, _BLOCK_WORDS, dtype=np.uint64)
    return drawn * np.uint64(2) + np.uint64(1)


def check_replicas(
    named_tensors: Mapping[str, Any],
    groups: ProcessGroups,
    what: str,
    *,
    same_over_tensor: Collection[str] = (),
    is_sliced_over_sharding: bool = False,
) -> None:
    """Compares the tensors that ranks must agree on; must be called on every rank at the same point.

    Args:
        named_tensors: This rank's tensors by name. All ranks of a data group have the same names.
        groups: Of this run.
        what: When this is, for the message: "at the start", "after step 12".
        same_over_tensor: Names of those that tensor-parallel ranks hold whole, and so must agree on too.
        is_sliced_over_sharding: Whether each sharding rank holds its own slices (stage 3): these are then compared
            between replicas only.

    Raises:
        ReplicasDiverged: On every rank, with the names and the ranks whose values stand out.
    """
    if groups.world.size == 1:
        return
    over_data = groups.replicas if is_sliced_over_sharding else groups.data
    names = sorted(named_tensors)
    shared = [name for name in names if name in same_over_tensor]
    needed = names if over_data.size > 1 else shared if groups.tensor.size > 1 else []
    hashes = {name: tensor_hash(named_tensors[name]) for name in needed}
    found = _compare(over_data, names, hashes) | _compare(groups.tensor, shared, hashes)
    if groups.world.all_reduce_numbers([float(len(found))], "max")[0] == 0:
        return
    everywhere: dict[str, set[int]] = {}
    for findings in groups.world.gather_objects([(name, sorted(ranks)) for name, ranks in found.items()]):
        for name, ranks in findings:
            everywhere.setdefault(name, set()).update(ranks)
    raise ReplicasDiverged(_message(everywhere, what))


def _compare(group: Group, names: Sequence[str], hashes: Mapping[str, int]) -> dict[str, set[int]]:
    """Which of the names differ within a group, with the ranks that do not hold what most of them hold."""
    if group.size == 1 or not names:
        return {}
    import paddle

    mine = paddle.to_tensor([hashes[name] for name in names], dtype="int64")
    columns = zip(*(part.tolist() for part in group.all_gather(mine)), strict=True)
    found = {}
    for name, values in zip(names, columns, strict=True):
        if len(set(values)) > 1:
            usual = Counter(values).most_common(1)[0][0]  # of equals, the first rank's
            found[name] = {rank for rank, value in zip(group.ranks, values, strict=True) if value != usual}
    return found


def _message(found: Mapping[str, Collection[int]], what: str) -> str:
    named = [f"{name} (rank {', '.join(map(str, sorted(found[name])))})" for name in sorted(found)[:_NAMED]]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return (
        f"ranks hold different values {what} where they must hold the same: {', '.join(named)}{more}. In brackets: "
        "the ranks whose value stands out. Continue from a checkpoint written before; should the same rank stand out "
        "again, suspect its card or memory."
    )
