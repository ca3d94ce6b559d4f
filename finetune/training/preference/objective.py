"""The loss of a global batch of preference groups.

    pref_loss_ratio x sum of the losses of all groups / number of groups
    + sft_loss_ratio x sum of -log p of all tokens of chosen answers / number of these tokens

Both divisors are those of the global batch, so micro-batches contribute sums and every layout and accumulation gives
one curve. Losses that compare with an estimate of the divergence from the reference (`kto`, `kto_pair`) take it over
the whole global batch too, in a forward pass before: TRL and PaddleNLP take the mean of a micro-batch, which depends on
how the batch is cut. No gradient passes through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.training.preference.log_probabilities import answer_log_probabilities, learned_labels
from finetune.training.preference.losses import LossSettings, kto_losses, pair_losses

if TYPE_CHECKING:
    from finetune.data.batches.preference_rows import PreferenceBatch
    from finetune.processes.groups import Group

SUMS = (
    "chosen",
    "rejected",
    "logps_chosen",
    "logps_rejected",
    "num_right",
    "num_chosen",
    "num_rejected",
    "divergence",
)
"""What a step sums beside its loss, in this order: rewards and log-probabilities, pairs told apart, how many there were
of each kind, and the divergence that KTO compares with."""


@dataclass(frozen=True)
class Divisors:
    """What sums over a global batch, or a dev set, are divided by.

    Attributes:
        num_groups: Pairs, or single answers.
        num_learned_tokens: Tokens of chosen answers, with those of prompts where they are learned.
    """

    num_groups: int
    num_learned_tokens: int


class PreferenceObjective:
    """Computes the loss of batches of one data set.

    Args:
        settings: Which loss.
        reference: float32 [samples, answers of a group], log-probabilities of the answers under the reference model,
            summed; None where there is no reference.

    Attributes:
        reference: The same; may be given after the model was built.
    """

    num_sums = len(SUMS)

    def __init__(self, settings: LossSettings, reference: NDArray[Any] | None = None):
        self.settings, self.reference = settings, reference

    def estimate(
        self, batch: PreferenceBatch, logits: Any, label_ids: Any, tensor_group: Group | None
    ) -> Any:
        """This batch's part of the sums that the divergence is the mean of, float64 [2] without a gradient."""
        import paddle

        with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
            ratios, _, _ = self._ratios(batch, logits, label_ids, tensor_group)
            return ratios.astype("float64").sum(axis=0) * batch.weight

    def divergences(self, sums: Any, num_groups: int) -> Any:
        """The estimates, float32 [2] at least 0, on the device.

        For pairs from the chosen and from the rejected answers; for single answers the second is of answers to other
        prompts.

        Args:
            sums: float64 [2], over the global batch.
            num_groups: Of the global batch.
        """
        import paddle

        return paddle.clip(sums / num_groups, min=0).astype("float32")

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
            logits: [labels, vocabulary], under tensor parallelism this rank's part of the vocabulary.
            label_ids: int64 [labels].
            tensor_group: Ranks that hold the other parts of the vocabulary.
            divisors: Of the global batch.
            divergences: See `divergences`, for losses that take them.

        Returns:
            A float32 scalar, and float64 [sums] without a gradient.
        """
        import paddle

        settings = self.settings
        with paddle.amp.auto_cast(enable=False):
            ratios, policy, losses = self._ratios(batch, logits, label_ids, tensor_group)
            is_single = batch.desirable is not None
            if is_single:
                good = paddle.to_tensor(batch.desirable.astype(np.float32))  # type: ignore[union-attr]
                each = kto_losses(ratios[:, 0], good, settings, divergences[1])
                sums = self._sums_of_single(ratios, policy, good, divergences[1])
            else:
                each = pair_losses(ratios[:, 0], ratios[:, 1], settings, divergences)
                sums = self._sums_of_pairs(ratios, policy)
            share = each.sum() * (settings.pref_loss_ratio * batch.weight / divisors.num_groups)
            if settings.sft_loss_ratio:
                learned = losses.gather(paddle.to_tensor(learned_labels(batch)))
                factor = settings.sft_loss_ratio * batch.weight / divisors.num_learned_tokens
                share = share + learned.sum() * factor
            return share, sums * batch.weight

    def _ratios(
        self, batch: PreferenceBatch, logits: Any, label_ids: Any, tensor_group: Group | None
    ) -> tuple[Any, Any, Any]:
        """Log ratios and log-probabilities, float32 [groups, answers of a group], and the losses of the tokens."""
        import paddle

        averages = self.settings.averages
        of_answers, losses = answer_log_probabilities(
            batch, logits, label_ids, tensor_group, averages=averages
        )
        # Answers are numbered in the order of their groups.
        policy = of_answers.reshape([len(batch.groups), -1])
        if self.reference is None:
            return policy, policy, losses
        reference = self.reference[batch.sample_indices]
        if averages:
            reference = reference / batch.answer_lengths.reshape(reference.shape)
        return policy - paddle.to_tensor(reference.astype(np.float32)), policy, losses

    def _sums_of_pairs(self, ratios: Any, policy: Any) -> Any:
        import paddle

        with paddle.no_grad():
            rewards, logps = ratios.astype("float64") * self.settings.beta, policy.astype("float64")
            num_pairs = paddle.full([1], ratios.shape[0], dtype="float64")
            num_right = (rewards[:, 0] > rewards[:, 1]).astype("float64").sum().reshape([1])
            none = paddle.zeros([1], dtype="float64")
            return paddle.concat(
                [rewards.sum(axis=0), logps.sum(axis=0), num_right, num_pairs, num_pairs, none]
            )

    def _sums_of_single(self, ratios: Any, policy: Any, good: Any, divergence: Any) -> Any:
        import paddle

        with paddle.no_grad():
            rewards, logps = (
                ratios[:, 0].astype("float64") * self.settings.beta,
                policy[:, 0].astype("float64"),
            )
            kinds = good.astype("float64")
            divergence = divergence.astype("float64") * self.settings.beta
            is_right = ((rewards > divergence).astype("float64") == kinds).astype("float64")
            figures = [
                (rewards * kinds).sum(),
                (rewards * (1 - kinds)).sum(),
                (logps * kinds).sum(),
                (logps * (1 - kinds)).sum(),
                is_right.sum(),
                kinds.sum(),
                (1 - kinds).sum(),
                divergence * rewards.shape[0],
            ]
            return paddle.concat([figure.reshape([1]) for figure in figures])

    def metrics(self, sums: list[float], num_groups: int) -> dict[str, float]:
        """What is reported of a global batch, or a dev set.

        Args:
            sums: Over all its groups, named `SUMS`.
            num_groups: How many it has.

        Returns:
            Means: `rewards_chosen`, `rewards_rejected`, `rewards_margin`, `rewards_accuracy` (share of pairs whose
            chosen answer has the larger reward; of single answers those on the right side of the divergence),
            `logps_chosen`, `logps_rejected`; for single answers also `divergence`, and nothing of a kind that is absent.
        """
        named = dict(zip(SUMS, sums, strict=True))
        found: dict[str, float] = {}
        for kind in ("chosen", "rejected"):
            if count := named[f"num_{kind}"]:
                found[f"rewards_{kind}"] = named[kind] / count
                found[f"logps_{kind}"] = named[f"logps_{kind}"] / count
        if "rewards_chosen" in found and "rewards_rejected" in found:
            found["rewards_margin"] = found["rewards_chosen"] - found["rewards_rejected"]
        found["rewards_accuracy"] = named["num_right"] / num_groups
        if self.settings.loss_type == "kto":
            found["divergence"] = named["divergence"] / num_groups
        return found
