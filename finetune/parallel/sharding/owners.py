"""Who updates which parameter at sharding stage 1, told without Paddle."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def deal_out(sizes: Mapping[str, int], num_ranks: int, shared: Collection[str] = ()) -> dict[str, int]:
    """Who owns which parameter: Fleet's rule, largest first, each to the first of the ranks that have least.

    What several stages of a pipeline hold is dealt out before the rest, so that it has the same owner on all of them:
    its gradient is summed over the stages.

    Args:
        sizes: Number of elements of each trained parameter, by structured name.
        num_ranks: Size of the sharding group.
        shared: Names that are dealt out first; in the order of their names where they are equally large.

    Returns:
        Position of the owner in the sharding group, by name.
    """
    first = sorted(name for name in sizes if name in shared)
    rest = [name for name in sizes if name not in shared]
    filled, owners = [0] * num_ranks, {}
    for names in (first, rest):
        for name in sorted(names, key=lambda name: -sizes[name]):
            owners[name] = filled.index(min(filled))
            filled[owners[name]] += sizes[name]
    return owners
