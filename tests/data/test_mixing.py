from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.reading.mixing import DataSource, draw, hold_out, mix, share_out
from finetune.errors import UserError


def source(ratio=None, max_samples=None):
    return DataSource(name="d", files=(), ratio=ratio, max_samples=max_samples)


A, B = [f"a{i}" for i in range(30)], [f"b{i}" for i in range(10)]


def test_without_ratios_every_example_is_used_once():
    assert mix([A, B], [source(), source()], 1) == A + B


@pytest.mark.parametrize(
    ("ratios", "counts"), [((1, 1), (20, 20)), ((3, 1), (30, 10)), ((0.1, 0.9), (4, 36))]
)
def test_ratios_are_shares_of_an_epoch_that_is_as_long_as_the_data(ratios, counts):
    mixed = mix([A, B], [source(ratio) for ratio in ratios], 1)
    assert tuple(Counter(item[0] for item in mixed)[name] for name in "ab") == counts
    used = Counter(mixed)
    for group in (A, B):
        times = [used[item] for item in group]
        assert max(times) - min(times) <= 1


def test_max_samples_comes_before_the_ratio():
    mixed = mix([A, B], [source(1, 5), source(1)], 1)
    assert Counter(item[0] for item in mixed) == {"a": 8, "b": 7}
    assert len({item for item in mixed if item[0] == "a"}) == 5


def test_the_seed_alone_decides():
    sources = [source(1), source(1)]
    assert mix([A, B], sources, 1) == mix([A, B], sources, 1)
    assert mix([A, B], sources, 1) != mix([A, B], sources, 2)


def test_what_is_drawn_today_is_drawn_tomorrow():
    assert draw(list(range(100)), 5, "42:train") == [7, 70, 87, 94, 99]


@given(total=st.integers(0, 500), ratios=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_sum_up(total, ratios):
    counts = share_out(total, ratios)
    assert sum(counts) == total
    assert all(abs(n - total * r / sum(ratios)) < 1 + 1e-6 for n, r in zip(counts, ratios, strict=True))


@given(count=st.integers(0, 50), size=st.integers(1, 20), seed=st.text(max_size=3))
def test_draws_are_even_and_in_order(count, size, seed):
    drawn = draw(list(range(size)), count, seed)
    assert len(drawn) == count
    times = Counter(drawn)
    assert max(times.values(), default=0) - min((times[i] for i in range(size)), default=0) <= 1
    rest = drawn[count - count % size :]
    assert rest == sorted(rest)


@pytest.mark.parametrize(("split", "count"), [(0.1, 4), (0.5, 20), (7, 7), (1, 1)])
def test_held_back_examples_are_not_trained_on(split, count):
    train, held = hold_out([A, B], split, 3)
    assert len(held) == count
    assert sorted([*train[0], *train[1], *held]) == sorted(A + B)
    assert [len(group) for group in train] == [
        30 - sum(i[0] == "a" for i in held),
        10 - sum(i[0] == "b" for i in held),
    ]
    assert hold_out([A, B], split, 3)[1] == held != (A + B)[:count]


@pytest.mark.parametrize("split", [40, 41, 0.001, 0.999])
def test_both_parts_need_an_example(split):
    with pytest.raises(UserError, match=r"validation_split .* of 40 examples holds back .* both parts need"):
        hold_out([A, B], split, 3)
