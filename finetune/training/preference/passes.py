"""Forward passes over a preference data set without gradients, shared out among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.parallel.sharding.flat_slices import no_grad_no_autocast
from finetune.processes.groups import ProcessGroups
from finetune.training.evaluation import batches_by_length, share_of
from finetune.training.loss import LabelPositions, logits_of
from finetune.training.preference.log_probabilities import answer_log_probabilities

if TYPE_CHECKING:
    from finetune.data.batches.preference_rows import PreferenceBatch, PreferenceRows
    from finetune.parallel.parallel_model import ParallelModel


class PreferencePasses:
    """The batches of a data set, by length, this rank's share of them.

    Args:
        rows: The data set.
        batch_size: Rows per forward pass.
        label_positions: Restricts logits to labelled positions; None on a pipeline's earlier stages.
        groups: Share out the batches.
    """

    def __init__(
        self,
        rows: PreferenceRows,
        *,
        batch_size: int,
        label_positions: LabelPositions | None,
        groups: ProcessGroups | None = None,
    ):
        self.rows, self._label_positions = rows, label_positions
        self._batches = share_of(batches_by_length(rows.lengths, batch_size), groups or ProcessGroups())
        self.num_batches = len(self._batches)

    def run(self, parallel: ParallelModel) -> Iterator[tuple[PreferenceBatch, Any, Any]]:
        """Batch, logits [labels, vocabulary] and label ids of each pass.

        Logits are None on ranks that compute none; a rank that is out of samples passes idle batches.
        """
        for indices in self._batches:
            own = self.rows.batch(indices) if len(indices) else self.rows.batch(np.zeros(1, np.int64)).idle()
            chosen = self._label_positions.only(own.labels) if self._label_positions else nullcontext()
            with chosen as label_ids:
                outputs = parallel.forward(own.tensors())
            yield own, None if outputs is None else logits_of(outputs), label_ids


def reference_log_probabilities(
    passes: PreferencePasses, parallel: ParallelModel, advance: Callable[[], None] = lambda: None
) -> NDArray[Any]:
    """Log-probabilities of all answers under the weights as they are; the model is in evaluation mode.

    Args:
        passes: Over the data set.
        parallel: The model.
        advance: Called after each batch.

    Returns:
        float32 [samples, answers of a group], sums over the tokens of each answer; the same on all ranks.
    """
    import paddle

    table: NDArray[Any] | None = None  # [samples, answers of a group]
    for batch, logits, label_ids in passes.run(parallel):
        if table is None:
            table = np.zeros((len(passes.rows.samples), len(batch.groups[0])), np.float64)
        if logits is not None and batch.weight:
            with no_grad_no_autocast():
                sums, _ = answer_log_probabilities(batch, logits, label_ids, parallel.logits_group)
            table[batch.sample_indices] = sums.numpy().reshape([len(batch.groups), -1])
        advance()
    assert table is not None, "a data set has samples"
    whole: NDArray[Any] = parallel.sum_samples(paddle.to_tensor(table)).numpy().astype(np.float32)
    return whole
