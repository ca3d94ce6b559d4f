"""The end of a step: sums over ranks, the wish to stop, and data that differ."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from finetune.data.batches.batch_source import StepBatch
from finetune.data.batches.rows import Batch
from finetune.errors import RunError
from finetune.training.step import end_step


@dataclass
class FakeParallel:
    """Sums of this rank and of another one that counts the same and was not told to stop."""

    is_first: bool = True
    told_elsewhere: float = 0.0

    @property
    def groups(self):
        return SimpleNamespace(model=SimpleNamespace(is_first=self.is_first))

    def sum_gradients(self, loss, counts, figures=None):
        num_label_tokens, stop = counts
        return loss, 2.0, [num_label_tokens + 5, stop + self.told_elsewhere]


def make_batch(num_label_tokens: int) -> StepBatch:
    micro_batch = Batch({}, np.zeros((1, 4), np.int64), [], num_tokens=4, num_label_tokens=2)
    idle = replace(micro_batch, num_label_tokens=3).idle()
    return StepBatch([micro_batch, micro_batch, idle], 12, num_label_tokens)


@pytest.mark.parametrize(
    ("own", "elsewhere", "stops"), [(False, 0.0, False), (True, 0.0, True), (False, 1.0, True)]
)
def test_all_stop_where_one_was_told_to(own, elsewhere, stops):
    parallel = FakeParallel(told_elsewhere=elsewhere)
    assert end_step(parallel, make_batch(9), 0.5, stop=own) == (0.5, 2.0, stops, [])


def test_one_rank_of_a_model_counts_its_labels():
    assert end_step(FakeParallel(is_first=False), make_batch(5), 0.5, stop=False) == (0.5, 2.0, False, [])


def test_processes_with_different_data_end_the_run():
    with pytest.raises(
        RunError, match="trained on 9 label tokens together, but the global batch has 12 here"
    ):
        end_step(FakeParallel(), make_batch(12), 0.5, stop=False)
