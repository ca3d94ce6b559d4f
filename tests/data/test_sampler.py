import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches.sampler import GlobalOrder, split
from finetune.errors import UserError

SIZES = st.integers(1, 50)
# Written down once with numpy 1.26: another order would break the resuming of old checkpoints.
GOLDEN_EPOCH_0 = [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]
GOLDEN_EPOCH_1 = [0, 8, 7, 4, 3, 1, 2, 9, 6, 5]


def test_order_is_the_documented_one():
    order = GlobalOrder(10, global_batch_size=4, seed=42)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([42, 3])))
    assert order.permutation(3).tolist() == generator.permutation(10).tolist()


def test_order_does_not_change_between_releases():
    order = GlobalOrder(10, global_batch_size=4, seed=42)
    assert order.permutation(0).tolist() == GOLDEN_EPOCH_0
    assert order.permutation(1).tolist() == GOLDEN_EPOCH_1


def test_steps_per_epoch():
    assert GlobalOrder(10, global_batch_size=4, seed=0).steps_per_epoch == 3
    assert GlobalOrder(10, global_batch_size=4, seed=0, drop_last=True).steps_per_epoch == 2
    assert GlobalOrder(8, global_batch_size=4, seed=0).steps_per_epoch == 2
    assert GlobalOrder(3, global_batch_size=4, seed=0).steps_per_epoch == 1


@given(num_samples=SIZES, batch_size=SIZES, seed=st.integers(0, 2**32), epoch=st.integers(0, 5))
def test_every_epoch_uses_each_sample_once(num_samples, batch_size, seed, epoch):
    order = GlobalOrder(num_samples, global_batch_size=batch_size, seed=seed)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    epochs, batches = zip(*(order.batch(step) for step in steps), strict=True)
    assert set(epochs) == {epoch}
    assert sorted(np.concatenate(batches).tolist()) == list(range(num_samples))
    assert all(len(batch) == batch_size for batch in batches[:-1])


@given(num_samples=SIZES, batch_size=SIZES)
def test_drop_last_gives_full_batches_only(num_samples, batch_size):
    if num_samples < batch_size:
        with pytest.raises(UserError):
            GlobalOrder(num_samples, global_batch_size=batch_size, seed=0, drop_last=True)
        return
    order = GlobalOrder(num_samples, global_batch_size=batch_size, seed=0, drop_last=True)
    assert {len(order.batch(step)[1]) for step in range(2 * order.steps_per_epoch)} == {batch_size}


@given(steps=st.lists(st.integers(0, 1000), min_size=1, max_size=10))
def test_batch_does_not_depend_on_what_was_asked_before(steps):
    used = GlobalOrder(23, global_batch_size=5, seed=7)
    for step in steps:
        fresh = GlobalOrder(23, global_batch_size=5, seed=7)
        assert used.batch(step)[0] == fresh.batch(step)[0]
        assert np.array_equal(used.batch(step)[1], fresh.batch(step)[1])


def test_epochs_and_seeds_differ():
    orders = [
        GlobalOrder(50, global_batch_size=5, seed=seed).permutation(e).tolist()
        for seed in (0, 1)
        for e in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_permutation_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        GlobalOrder(5, global_batch_size=5, seed=0).batch(0)[1][0] = 3


def test_position_restores():
    order = GlobalOrder(10, global_batch_size=4, seed=42)
    position = order.position(7)
    assert (position["step"], position["epoch"], position["step_in_epoch"]) == (7, 2, 1)
    assert GlobalOrder(10, global_batch_size=4, seed=42).restore(position) == 7


def test_position_of_another_order_is_refused():
    position = GlobalOrder(10, global_batch_size=4, seed=42).position(7)
    with pytest.raises(UserError) as caught:
        GlobalOrder(11, global_batch_size=2, seed=42).restore(position)
    assert "written with num_samples 10, this run has 11" in caught.value.faults[0]
    assert "written with global_batch_size 4, this run has 2" in caught.value.faults[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "the data set has 0 samples, fewer than one global batch of 4"),
        ({"num_samples": 3, "drop_last": True}, "the data set has 3 samples.*leave dataloader_drop_last off"),
        ({"global_batch_size": 0}, "the global batch size is 0, it must be at least 1"),
        ({"seed": -1}, "seed is -1, it must not be negative"),
    ],
)
def test_what_cannot_be_ordered(arguments, message):
    with pytest.raises(UserError, match=message):
        GlobalOrder(**{"num_samples": 10, "global_batch_size": 4, "seed": 0} | arguments)


def test_negative_step():
    with pytest.raises(ValueError, match="step is -1"):
        GlobalOrder(5, global_batch_size=5, seed=0).batch(-1)


# --- split ---


def test_split_of_a_full_batch():
    parts = [[part.tolist() for part in split(np.arange(8), 2, rank=rank, world=2)] for rank in (0, 1)]
    assert parts == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@given(
    num_indices=st.integers(1, 40),
    world=st.integers(1, 5),
    size=st.integers(1, 10),
)
def test_split_loses_nothing_and_keeps_ranks_in_step(num_indices, world, size):
    indices = np.random.default_rng(0).permutation(num_indices)
    parts = [split(indices, size, rank=rank, world=world) for rank in range(world)]
    assert np.concatenate([part for share in parts for part in share]).tolist() == indices.tolist()
    counts = {len(share) for share in parts}
    assert len(counts) == 1
    shares = [sum(map(len, share)) for share in parts]
    assert max(shares) - min(shares) <= 1
    assert max(len(part) for share in parts for part in share) <= size
    assert counts == {-(-max(shares) // size)}


def test_split_checks_the_rank():
    with pytest.raises(ValueError, match="rank is 2, expected 0 to 1"):
        split(np.arange(4), 2, rank=2, world=2)
