"""The evaluation of preference data: loss, rewards and their accuracy over a dev set."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.parallel.sharding.flat_slices import no_grad_no_autocast
from finetune.training.preference.objective import Divisors, PreferenceObjective

if TYPE_CHECKING:
    from finetune.parallel.parallel_model import ParallelModel
    from finetune.training.preference.passes import PreferencePasses
    from finetune.training.preference.reward_objective import RewardObjective


class PreferenceEvaluation:
    """Loss and rewards of a dev set; the same whatever the batch size and the packing.

    Args:
        passes: Over the dev set.
        objective: Its loss, with the reference of the dev set.
    """

    label = "Evaluating"

    def __init__(self, passes: PreferencePasses, objective: PreferenceObjective | RewardObjective):
        self.passes, self.objective = passes, objective
        num_rounds = 2 if objective.settings.estimates_divergence else 1
        self.num_batches = passes.num_batches * num_rounds

    def run(self, parallel: ParallelModel, advance: Callable[[], None]) -> dict[str, float]:
        """Returns `loss` and what `PreferenceObjective.metrics` names."""
        import paddle

        objective, rows = self.objective, self.passes.rows
        units = np.arange(len(rows))
        divisors = Divisors(rows.count_groups(units), rows.count_learned_tokens(units))
        divergences: Any = None
        if objective.settings.estimates_divergence:
            divergences = self._estimate(parallel, advance, divisors.num_groups)
        sums = paddle.zeros([1 + objective.num_sums], dtype="float64")  # read once, at the end
        for batch, logits, label_ids in self.passes.run(parallel):
            if logits is not None and batch.weight:
                with no_grad_no_autocast():
                    share, figures = objective.share(
                        batch,
                        logits,
                        label_ids,
                        parallel.logits_group,
                        divisors=divisors,
                        divergences=divergences,
                    )
                    sums = sums + paddle.concat([share.astype("float64").reshape([1]), figures])
            advance()
        loss, *others = parallel.total(sums)
        return {"loss": loss} | objective.metrics(others, divisors.num_groups)

    def _estimate(self, parallel: ParallelModel, advance: Callable[[], None], num_groups: int) -> Any:
        import paddle

        assert isinstance(self.objective, PreferenceObjective)
        sums = paddle.zeros([2], dtype="float64")
        for batch, logits, label_ids in self.passes.run(parallel):
            if logits is not None and batch.weight:
                sums = sums + self.objective.estimate(batch, logits, label_ids, parallel.logits_group)
            advance()
        return self.objective.divergences(parallel.sum_samples(sums), num_groups)
