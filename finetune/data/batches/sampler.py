"""The one global order of samples: which of them optimizer step k consumes, whatever the layout.

Every epoch is a permutation that depends on (seed, epoch) alone; step k takes the k-th slice of
`global_batch_size` of it. No state but the step number: after a resume, or on any rank, the answer for a
step is the same. Cost: one permutation per epoch (8 bytes a sample, cached for the epoch in use), then a
slice per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError


class GlobalOrder:
    """The order of samples of a run.

    Args:
        num_samples: Size of the data set.
        global_batch_size: Samples per optimizer step: per-device batch x accumulation x data ranks.
        seed: Not negative.
        drop_last: Whether the last, smaller batch of an epoch is left out.

    Raises:
        UserError: There is not one batch in an epoch.
    """

    def __init__(self, num_samples: int, *, global_batch_size: int, seed: int, drop_last: bool = False):
        if global_batch_size < 1:
            raise UserError(f"the global batch size is {global_batch_size}, it must be at least 1.")
        if seed < 0:
            raise UserError(f"seed is {seed}, it must not be negative.")
        if num_samples < (global_batch_size if drop_last else 1):
            raise UserError(
                f"the data set has {num_samples} samples, "
                f"fewer than one global batch of {global_batch_size}. Give more data, lower "
                "per_device_train_batch_size or gradient_accumulation_steps, or leave dataloader_drop_last off."
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.drop_last = drop_last
        self._cached_epoch = -1
        self._cached_permutation = np.empty(0, dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, at least 1."""
        num_full, num_rest = divmod(self.num_samples, self.global_batch_size)
        return num_full + (num_rest > 0 and not self.drop_last)

    def permutation(self, epoch: int) -> NDArray[Any]:
        """The order of one epoch: int64 [num_samples], read-only."""
        if epoch != self._cached_epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._cached_permutation = generator.permutation(self.num_samples)
            self._cached_permutation.flags.writeable = False
            self._cached_epoch = epoch
        return self._cached_permutation

    def batch(self, step: int) -> tuple[int, NDArray[Any]]:
        """The global batch of an optimizer step.

        Args:
            step: Counted from 0 over the whole run.

        Returns:
            The epoch, and the sample indices: int64 [global_batch_size], fewer at the end of an epoch.
        """
        if step < 0:
            raise ValueError(f"step is {step}, expected 0 or more")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch_size
        return epoch, self.permutation(epoch)[start : start + self.global_batch_size]

    def position(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps: the next step to run, and what the order depends on."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return {"step": step, "epoch": epoch, "step_in_epoch": step_in_epoch, **self._identity()}

    def restore(self, position: Mapping[str, Any]) -> int:
        """The next step to run, from what `position` gave.

        Raises:
            UserError: The checkpoint belongs to another order: it would repeat and skip samples.
        """
        faults = [
            f"the checkpoint was written with {name} {position.get(name)}, this run has {value}: "
            "the order of samples would not continue. Use the same data and settings, or start anew."
            for name, value in self._identity().items()
            if position.get(name) != value
        ]
        if faults:
            raise UserError(faults)
        return int(position["step"])

    def _identity(self) -> dict[str, Any]:
        names = ("num_samples", "global_batch_size", "seed", "drop_last")
        return {name: getattr(self, name) for name in names}


class LongestFirst(GlobalOrder):
    """The order of a trial: the longest rows first, and those of the first step once more in the second.

    Only from the second step on there is optimizer state, and so the most of everything at once.

    Args:
        lengths: int64 [rows], tokens of each.
        **options: As `GlobalOrder` has them.
    """

    def __init__(self, lengths: NDArray[Any], **options: Any):
        super().__init__(len(lengths), **options)
        self._order = np.argsort(-lengths, kind="stable")

    def permutation(self, epoch: int) -> NDArray[Any]:
        """Rows by their length: int64 [num_samples]."""
        return self._order

    def batch(self, step: int) -> tuple[int, NDArray[Any]]:
        """See `GlobalOrder.batch`."""
        return super().batch(max(step - 1, 0))


def split(
    indices: NDArray[Any],
    micro_batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
) -> list[NDArray[Any]]:
    """The micro-batches of one rank within a global batch.

    The batch is cut into `world` contiguous shares that differ by one sample at most, and each share into
    contiguous micro-batches::

        8 samples, world 2, micro_batch_size 2:   rank 0: [0 1] [2 3]   rank 1: [4 5] [6 7]

    All ranks together hold each sample once, and all ranks get the same number of micro-batches, since
    each of them takes part in the same collectives; at the end of an epoch some may be empty.

    Args:
        indices: The global batch, [B].
        micro_batch_size: Most samples of a micro-batch; their number follows.
        rank: Of the data-parallel ranks.
        world: Number of data-parallel ranks.

    Returns:
        Slices of `indices`.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, expected 0 to {world - 1}")
    share = np.array_split(indices, world)[rank]
    largest_share = -(-len(indices) // world)
    num_steps = -(-largest_share // micro_batch_size)
    return [share[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(num_steps)]
