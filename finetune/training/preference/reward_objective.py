"""The loss of a reward model over a global batch of pairs.

    pref_loss_ratio x sum of (-log s(c - r - m) + k (c + r)^2) over all pairs / number of pairs

c and r are the values at the last tokens of the chosen and the rejected answer, s the logistic function (Bradley and
Terry 1952), m the margin that the data give a pair (Touvron et al., "Llama 2", 2023; 0 where they give none), k
`center_rewards_coefficient` (Eisenstein et al., "Helping or Herding?", 2023). Definitions are those of TRL 0.24's
RewardTrainer, with sums over the global batch, so that every layout and accumulation has one curve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.training.preference.losses import LossSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from finetune.data.batches.preference_rows import PreferenceBatch
    from finetune.processes.groups import Group
    from finetune.training.preference.objective import Divisors

SUMS = ("chosen", "rejected", "num_right")
"""What a step sums beside its loss, in this order: values of both answers, and pairs told apart."""


def answer_rewards(batch: PreferenceBatch, values: Any) -> Any:
    """The value of each answer, float32 [answers], by its number.

    Args:
        batch: Which label belongs to which answer; each has one.
        values: [labels, 1].
    """
    import paddle

    order = np.argsort(batch.answer_of_label, kind="stable")
    return values.astype("float32").reshape([-1]).gather(paddle.to_tensor(order))


def reward_losses(chosen: Any, rejected: Any, margins: Any, *, center: float = 0.0) -> Any:
    """The loss of each pair, float32 [pairs].

    Args:
        chosen: float32 [pairs], values of the chosen answers.
        rejected: float32 [pairs], of the rejected ones.
        margins: float32 [pairs].
        center: Weight of the square of their sum.
    """
    import paddle.nn.functional as F

    losses = -F.log_sigmoid(chosen - rejected - margins)
    return losses + center * (chosen + rejected).square() if center else losses


class RewardObjective:
    """Computes the loss of batches; takes the place of `finetune.training.preference.objective.PreferenceObjective`.

    Args:
        settings: With `center_rewards_coefficient` and `pref_loss_ratio`.

    Attributes:
        reference: None: there is no reference model.
    """

    num_sums = len(SUMS)

    def __init__(self, settings: LossSettings):
        self.settings = settings
        self.reference: NDArray[Any] | None = None

    def share(
        self,
        batch: PreferenceBatch,
        logits: Any,
        label_ids: Any,
        tensor_group: Group | None,
        *,
        divisors: Divisors,
        divergences: Any = None,
    ) -> tuple[Any, Any]:
        """This batch's part of the loss, and of the sums named `SUMS`.

        Args:
            batch: The batch.
            logits: [labels, 1], the values.
            label_ids: Not used.
            tensor_group: Not used: every rank has the whole values.
            divisors: Of the global batch.
            divergences: Not used.

        Returns:
            A float32 scalar, and float64 [sums] without a gradient.
        """
        import paddle

        with paddle.amp.auto_cast(enable=False):
            pairs = answer_rewards(batch, logits).reshape([-1, 2])  # [pairs, chosen and rejected]
            losses = reward_losses(
                pairs[:, 0],
                pairs[:, 1],
                paddle.to_tensor(batch.margins),
                center=self.settings.center_rewards_coefficient or 0.0,
            )
            share = losses.sum() * (self.settings.pref_loss_ratio * batch.weight / divisors.num_groups)
            with paddle.no_grad():
                values = pairs.astype("float64")
                num_right = (values[:, 0] > values[:, 1]).astype("float64").sum().reshape([1])
                sums = paddle.concat([values.sum(axis=0), num_right])
            return share, sums * batch.weight

    def metrics(self, sums: list[float], num_groups: int) -> dict[str, float]:
        """What is reported of a global batch, or a dev set.

        Args:
            sums: Over all its pairs, named `SUMS`.
            num_groups: How many it has.

        Returns:
            Means: `rewards_chosen`, `rewards_rejected`, `rewards_margin`, and `rewards_accuracy`, the share of pairs
            whose chosen answer has the larger value.
        """
        chosen, rejected, num_right = (each / num_groups for each in sums)
        return {
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "rewards_margin": chosen - rejected,
            "rewards_accuracy": num_right,
        }
