"""Numbers that are none: float32 and bfloat16 runs stop at the first, float16 runs skip a few steps.

In float16 the loss is multiplied by a scale, so that small gradients do not vanish; where the scale is too large they
overflow. The step is then skipped and the scale halved (Micikevicius et al., "Mixed Precision Training", 2018).
Paddle's GradScaler does the scaling. What it cannot know is done here: the gradient norm is that of all processes, so
all skip the same steps and keep the same scale, those without gradients of their own too.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping
from typing import Any

from finetune.errors import RunError


def check_finite(loss: float, norm: float, step: int) -> None:
    """Stops before numbers that are none reach the weights.

    Args:
        loss: Of the step.
        norm: L2 norm of its gradients.
        step: Counted from 0.

    Raises:
        RunError: One of them is infinite or no number.
    """
    name, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm)
    if not math.isfinite(value):
        raise RunError(
            f"the {name} of step {step + 1} is {value}: the weights of the last checkpoint are still good. "
            "Lower learning_rate, raise warmup_steps, or look for broken samples in this step's batch"
        )


class OverflowGuard:
    """Decides which float16 steps are skipped.

    Args:
        scaler: Paddle's GradScaler.
        max_skipped_steps: Steps skipped in a row after which training stops.

    Attributes:
        scale: What the loss of the next step is multiplied by; the scaler's, known without asking the device.
        num_skipped: Steps skipped in the whole training.
    """

    def __init__(self, scaler: Any, max_skipped_steps: int):
        self.scaler, self._max_skipped_steps = scaler, max_skipped_steps
        self._skipped_in_a_row = 0
        self.num_skipped = 0
        self.scale = 1.0
        self.read_scale()

    def read_scale(self) -> None:
        """Asks the scaler for its scale, after its state was loaded."""
        self.scale = float(self.scaler._scale)

    def check(self, loss: float, norm: float, step: int) -> dict[str, Any]:
        """What the log says of a step: `loss_scale`, and `skipped` where its numbers are none.

        Args:
            loss: Of the step, over all processes.
            norm: L2 norm of its gradients, over all processes.
            step: Counted from 0.

        Raises:
            RunError: Too many steps in a row were skipped.
        """
        facts: dict[str, Any] = {"loss_scale": self.scale}
        if math.isfinite(loss) and math.isfinite(norm):
            self._skipped_in_a_row = 0
            return facts
        self._skipped_in_a_row += 1
        self.num_skipped += 1
        if self._skipped_in_a_row >= self._max_skipped_steps:
            what = "gradients overflowed" if math.isfinite(loss) else "loss was no finite number"
            raise RunError(
                f"{self._skipped_in_a_row} float16 steps in a row were skipped, the last one step {step + 1}: the {what} "
                f"at a loss scale of {self.scale:g}. The weights of the last checkpoint are still good. Train in bf16 "
                "where the card can, lower learning_rate, or raise max_skipped_steps"
            )
        return facts | {"skipped": True}

    def counts(self) -> dict[str, int]:
        """What a checkpoint keeps, so that a run that is started again and again cannot skip steps for ever."""
        return {"in_a_row": self._skipped_in_a_row, "in_all": self.num_skipped}

    def restore(self, counts: Mapping[str, int]) -> None:
        """Continues from the counts of a checkpoint; earlier ones have none."""
        self._skipped_in_a_row, self.num_skipped = counts.get("in_a_row", 0), counts.get("in_all", 0)
        self.read_scale()

    def describe_end(self, num_steps: int) -> str | None:
        """What is to be said when a training has ended; None where no step was skipped."""
        if not self.num_skipped:
            return None
        if self.num_skipped < num_steps:
            return f"{self.num_skipped} of {num_steps} steps were skipped, because float16 overflowed"
        return (
            f"warning: nothing was learned: all {num_steps} steps were skipped, because float16 overflowed. Train in "
            "bf16 where the card can, lower scale_loss or learning_rate, or train for more steps"
        )

    def step(self, optimizer: Any, *, skips: bool) -> None:
        """Unscales the gradients and lets the optimizer step, unless this step is skipped; adapts the scale."""
        import paddle

        scaler = self.scaler
        scaler.unscale_(optimizer)
        # What other processes found counts, too.
        scaler._found_inf = paddle.to_tensor([skips])
        scaler.step(optimizer)
        with contextlib.redirect_stdout(io.StringIO()):  # Paddle prints a line about every smaller scale
            scaler.update()
        self.read_scale()
