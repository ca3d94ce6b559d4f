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
    """

    def __init__(self, head: Any):
        self._rows: paddle.Tensor | None = None
        head.register_forward_pre_hook(self._gather)

    def _gather(self, _layer: Any, inputs: tuple) -> tuple | None:
        if self._rows is None:
            return None
        hidden = inputs[0].reshape([-1, inputs[0].shape[-1]])
        return (hidden.gather(self._rows), *inputs[1:])

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
