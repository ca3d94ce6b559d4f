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

from finetune.data.tokenize import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Iterator

    import paddle


def logits_of(outputs: Any) -> paddle.Tensor:
    """The logits [batch, length, vocabulary] of a causal model's outputs, tuple or not."""
    return outputs[0] if isinstance(outputs, list | tuple) else getattr(outputs, "logits", outputs)


def token_loss_sum(logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    """Cross-entropy summed over label tokens, in float32.

    Args:
        logits: [..., vocabulary], any float dtype.
        labels: [...], int64; positions that hold IGNORE_INDEX count nothing.

    Returns:
        A float32 scalar in nats.
    """
    import paddle
    import paddle.nn.functional as F

    with paddle.amp.auto_cast(enable=False):
        return F.cross_entropy(
            logits.astype("float32").reshape([-1, logits.shape[-1]]),
            labels.reshape([-1]),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )


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
    """

    def __init__(self, head: Any, *, length_first: bool = False):
        self._rows: paddle.Tensor | None = None
        self._length_first = length_first
        head.register_forward_pre_hook(self._gather)
        head.register_forward_post_hook(self._flatten)

    def _gather(self, _layer: Any, inputs: tuple) -> tuple | None:
        if self._rows is None:
            return None
        hidden = inputs[0].transpose([1, 0, 2]) if self._length_first else inputs[0]
        kept = hidden.reshape([-1, hidden.shape[-1]]).gather(self._rows)
        return (kept.unsqueeze(1) if self._length_first else kept, *inputs[1:])

    def _flatten(self, _layer: Any, _inputs: tuple, logits: Any) -> Any:
        if self._rows is None or not self._length_first:
            return None
        return logits.reshape([-1, logits.shape[-1]])

    @contextmanager
    def only(self, labels: paddle.Tensor) -> Iterator[paddle.Tensor]:
        """Within the block, logits are [labels, vocabulary]; yields the labels in that order.

        Args:
            labels: [batch, length], int64.
        """
        import paddle

        flat = labels.reshape([-1])
        self._rows = paddle.nonzero(flat != IGNORE_INDEX).reshape([-1])
        try:
            yield flat.gather(self._rows)
        finally:
            self._rows = None
