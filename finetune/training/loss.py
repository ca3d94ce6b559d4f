"""Token losses whose sums do not depend on how a global batch is cut.

The loss of an optimizer step is

    sum of -log p(label) over every label token of the global batch
    ---------------------------------------------------------------
             number of label tokens of the global batch

so micro-batches contribute sums, never means, and the division happens once.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from finetune.data.samples.tokenize import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterator

    import paddle

    from finetune.processes.groups import Group


def logits_of(outputs: Any) -> paddle.Tensor:
    """The logits [batch, length, vocabulary] of a causal model's outputs, tuple or not."""
    return outputs[0] if isinstance(outputs, list | tuple) else getattr(outputs, "logits", outputs)


def token_loss_sum(
    logits: paddle.Tensor, labels: paddle.Tensor, tensor_group: Group | None = None
) -> paddle.Tensor:
    """Cross-entropy summed over label tokens, in float32.

    Args:
        logits: [..., vocabulary], any float dtype; under tensor parallelism [..., this rank's vocabulary].
        labels: [...], int64; positions that hold IGNORE_INDEX count nothing.
        tensor_group: Ranks that hold the other parts of the vocabulary.

    Returns:
        A float32 scalar in nats, the same on all ranks of the group.
    """
    import paddle
    import paddle.nn.functional as F

    with paddle.amp.auto_cast(enable=False):
        rows = logits.astype("float32").reshape([-1, logits.shape[-1]])
        if tensor_group is None or tensor_group.size == 1:
            return F.cross_entropy(rows, labels.reshape([-1]), ignore_index=IGNORE_INDEX, reduction="sum")
        from paddle.distributed.fleet.meta_parallel import ParallelCrossEntropy

        # Padding of the labels is dealt with by LabelPositions: every label is a token here.
        return ParallelCrossEntropy(ignore_index=IGNORE_INDEX)(rows, labels.reshape([-1, 1])).sum()


def token_losses(
    logits: paddle.Tensor, labels: paddle.Tensor, tensor_group: Group | None = None
) -> paddle.Tensor:
    """Cross-entropy of each label, float32 [labels].

    Args:
        logits: [labels, vocabulary], any float dtype; under tensor parallelism this rank's part of the vocabulary.
        labels: [labels], int64, all of them tokens.
        tensor_group: Ranks that hold the other parts of the vocabulary.
    """
    import paddle
    import paddle.nn.functional as F

    with paddle.amp.auto_cast(enable=False):
        rows = logits.astype("float32").reshape([-1, logits.shape[-1]])
        if tensor_group is None or tensor_group.size == 1:
            return F.cross_entropy(rows, labels.reshape([-1]), reduction="none").reshape([-1])
        from paddle.distributed.fleet.meta_parallel import ParallelCrossEntropy

        return ParallelCrossEntropy(ignore_index=IGNORE_INDEX)(rows, labels.reshape([-1, 1])).reshape([-1])


def best_tokens(logits: paddle.Tensor, tensor_group: Group) -> paddle.Tensor:
    """The most likely token of each position, int64 [...]; of equals the first one.

    Args:
        logits: [..., vocabulary] or, under tensor parallelism, [..., this rank's vocabulary].
        tensor_group: Ranks that hold the other parts of the vocabulary.
    """
    import paddle

    best = logits.argmax(axis=-1)
    if tensor_group.size == 1:
        return best
    values = paddle.stack(tensor_group.all_gather(logits.max(axis=-1).astype("float32")))
    places = paddle.stack(tensor_group.all_gather(best + tensor_group.position * logits.shape[-1]))
    winner = values.argmax(axis=0, keepdim=True)
    return paddle.take_along_axis(places, winner, axis=0).squeeze(0)


class LabelPositions:
    """Lets the output projection see only the positions that carry a label.

    The projection onto the vocabulary is the largest single product of a small model and
    its logits the largest tensor; prompts and padding need neither. A pre-hook gathers the
    label rows of the hidden states, so the logits come out as [labels, vocabulary].

    Args:
        head: The output projection of the model, called once per forward pass with hidden
            states [batch, length, hidden] (or [batch * length, hidden]).
        length_first: Whether it is called with [length, batch, hidden] instead, and swaps the first
            two axes itself.
        rows_divided: Whether it is called with this rank's part of the hidden states and puts the rows together
            itself (sequence parallelism). Then all logits are computed and the label rows are taken from them.
    """

    def __init__(self, head: Any, *, length_first: bool = False, rows_divided: bool = False):
        self._rows: paddle.Tensor | None = None
        self._length_first = length_first
        if rows_divided:
            head.register_forward_post_hook(self._pick)
        else:
            head.register_forward_pre_hook(self._gather)
            head.register_forward_post_hook(self._flatten)

    def _gather(self, layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._rows is None or _is_resting(layer):
            return None
        hidden = inputs[0].transpose([1, 0, 2]) if self._length_first else inputs[0]
        kept = hidden.reshape([-1, hidden.shape[-1]]).gather(self._rows)
        return (kept.unsqueeze(1) if self._length_first else kept, *inputs[1:])

    def _pick(self, layer: Any, _inputs: tuple[Any, ...], logits: Any) -> Any:
        if self._rows is None or _is_resting(layer):
            return None
        return logits.reshape([-1, logits.shape[-1]]).gather(self._rows)  # [batch, length, vocabulary] by now

    def _flatten(self, layer: Any, _inputs: tuple[Any, ...], logits: Any) -> Any:
        if self._rows is None or not self._length_first or _is_resting(layer):
            return None
        return logits.reshape([-1, logits.shape[-1]])

    @contextmanager
    def only(self, labels: npt.NDArray[np.int64]) -> Iterator[paddle.Tensor]:
        """Within the block, logits are [labels, vocabulary]; yields the labels in that order, int64.

        The rows are found on the host: to find them on a GPU, the host would have to wait until it has counted them.

        Args:
            labels: [batch, length], int64.
        """
        import paddle

        flat = labels.reshape(-1)
        rows = np.flatnonzero(flat != IGNORE_INDEX)
        self._rows = paddle.to_tensor(rows.astype(np.int64, copy=False))
        try:
            yield paddle.to_tensor(flat[rows])
        finally:
            self._rows = None


def _is_resting(head: Any) -> bool:
    """Whether the head computes no logits, because a pipeline's earlier part is computed on this rank."""
    return getattr(head.forward, "is_resting", False)
