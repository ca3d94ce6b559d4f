"""Groups of real processes: every call, messages past two ranks, lost and missing processes, many starts in a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from finetune.processes.groups import Group, ProcessGroups, start_groups
from finetune.processes.layout import Layout
from finetune.processes.time_limit import time_limit
from tests.distributed.processes import ROOT, launch_script

HEAD = """
import json, sys
from pathlib import Path
import numpy as np
import paddle
from finetune.processes.groups import start_groups
from finetune.processes.layout import Layout
groups = start_groups(Layout(**json.loads(sys.argv[1])), device="cpu")
out = {}
"""
TAIL = """
print("RESULT " + json.dumps(out), flush=True)
"""


def run(body: str, world: int, layout: dict[str, int]) -> list[dict]:
    """Runs a body with `groups` and `out` at hand; returns every rank's `out`."""
    done = launch_script(HEAD + body + TAIL, world, [json.dumps(layout)], timeout=90).check()
    return [json.loads(output.split("RESULT ", 1)[1].splitlines()[0]) for output in done.outputs]


def test_one_process_has_groups_of_one():
    groups = start_groups(Layout(), device="cpu")
    assert groups == ProcessGroups() and groups.is_first
    assert groups.data.all_reduce_numbers([1.5, 2]) == [1.5, 2]
    assert groups.model.gather_objects("a") == ["a"]
    assert Group().size == 1 and Group().is_first


@pytest.mark.distributed
def test_members_and_every_call():
    results = run(
        """
import paddle.distributed as dist
x = lambda dtype: paddle.to_tensor([groups.rank % 2, 1, 0]).astype(dtype)
for name in ("world", "tensor", "pipeline", "sharding", "replicas", "data", "model", "ends"):
    group = getattr(groups, name)
    out[name] = [group.ranks, group.position]
for dtype in ("bool", "int32", "int64", "float64", "float32"):
    for op in ("sum", "max", "min"):
        value = x(dtype)
        groups.world.all_reduce(value, op)
        out[f"{dtype} {op}"] = value.astype("int64").tolist()
big = paddle.arange(30_001, dtype="float32") * (groups.rank + 1)  # several slices, none of equal length
groups.world.all_reduce(big)
out["big"] = bool((big == paddle.arange(30_001, dtype="float32") * 10).all())
view = paddle.zeros([3, 4])
groups.world.all_reduce(view[:, 1:3].add_(paddle.ones([3, 2])))
out["view"] = view.tolist()
scalar = paddle.to_tensor(float(groups.rank)); groups.world.broadcast(scalar, source=2)
out["broadcast"] = scalar.item()
out["all_gather"] = [part.tolist() for part in groups.pipeline.all_gather(paddle.to_tensor([groups.rank]))]
part, whole = paddle.zeros([2]), paddle.zeros([8])
begun = [
    groups.world.begin_reduce_scatter(part, paddle.arange(8, dtype="float32")),
    groups.world.begin_all_gather(whole, paddle.full([2], float(groups.rank))),
]
for task in begun: task.wait()
out["reduce_scatter"], out["begun all_gather"] = part.tolist(), whole.tolist()
total = paddle.full([2], float(groups.rank))
dist.reduce(total, dst=2)  # what Fleet's stage 1 calls; the other ranks keep theirs
out["reduce"] = total.tolist()
out["objects"] = groups.world.gather_objects({"rank": groups.rank, "text": "x" * groups.rank})
value = [(None, True, groups.rank), {1: 0.5, "a": float("inf")}, Path("x") / "\\udcff", "\u4e2d", []]
out["types"] = groups.world.gather_objects(value) == [
    [(None, True, rank), *value[1:]] for rank in range(4)
]
try:
    dist.all_gather_object([], 1)
except RuntimeError as error:
    out["pickle"] = str(error)
out["numbers"] = groups.tensor.all_reduce_numbers([0.1, groups.rank], "sum")
groups.world.barrier()
""",
        4,
        {"tensor": 2, "pipeline": 2},
    )
    for rank, out in enumerate(results):
        pipeline, tensor = divmod(rank, 2)
        assert out["world"] == [[0, 1, 2, 3], rank] == out["model"]
        assert out["tensor"] == [[2 * pipeline, 2 * pipeline + 1], tensor]
        assert out["pipeline"] == out["ends"] == [[tensor, tensor + 2], pipeline]
        assert out["sharding"] == out["replicas"] == out["data"] == [[rank], 0]
        for dtype in ("int32", "int64", "float64", "float32"):
            assert out[f"{dtype} sum"] == [2, 4, 0]
        assert out["bool sum"] == [1, 1, 0]
        for dtype in ("bool", "int32", "int64", "float64", "float32"):
            assert out[f"{dtype} max"] == [1, 1, 0] and out[f"{dtype} min"] == [0, 1, 0]
        assert out["big"] and out["view"] == [[0, 4, 4, 0]] * 3
        assert out["broadcast"] == 2 and out["all_gather"] == [[tensor], [tensor + 2]]
        assert out["reduce_scatter"] == [8 * rank, 8 * rank + 4]
        assert out["begun all_gather"] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert out["reduce"] == [6.0 if rank == 2 else rank] * 2
        assert out["objects"] == [{"rank": r, "text": "x" * r} for r in range(4)]
        assert out["types"] and "is not unpickled" in out["pickle"]
        assert out["numbers"] == pytest.approx([0.2, 4 * pipeline + 1])


@pytest.mark.distributed
def test_messages_among_three_ranks_need_no_common_count():
    """Both neighbours send to each other first, large tensors too, and the middle rank sends twice as many."""
    results = run(
        """
pipe = groups.pipeline
peers = {0: [1], 1: [0, 2], 2: [1]}[pipe.position]
for peer in peers:
    pipe.send(paddle.full([400_000], float(pipe.position)), peer)
    pipe.send(paddle.to_tensor([peer], dtype="int64"), peer)
total = paddle.ones([1]); pipe.all_reduce(total)  # overtakes the messages without mixing with them
for peer in peers:
    large = paddle.zeros([400_000]); pipe.receive(large, peer)
    small = paddle.zeros([1], dtype="int64"); pipe.receive(small, peer)
    out[str(peer)] = [large[-1].item(), small.item()]
out["total"] = total.item()
out["ends"] = groups.ends.ranks
""",
        3,
        {"pipeline": 3},
    )
    assert results[0] == {"1": [1, 0], "total": 3, "ends": [0, 2]}
    assert results[1] == {"0": [0, 1], "2": [2, 1], "total": 3, "ends": [1]}
    assert results[2] == {"1": [1, 2], "total": 3, "ends": [0, 2]}


@pytest.mark.distributed
def test_a_lost_rank_ends_the_wait_of_the_others():
    started = time.monotonic()
    done = launch_script(
        HEAD
        + """
import os
if groups.rank == 1:
    os._exit(7)
for _ in range(2):  # what cleans up after the first failure may communicate, too
    try:
        groups.tensor.all_reduce(paddle.ones([2]))
    except RuntimeError as error:
        failure = error
print("twice", flush=True)
raise failure
""",
        2,
        ['{"tensor": 2}'],
        timeout=90,
    )
    assert done.exit_code != 0
    assert time.monotonic() - started < 60
    if done.failed.get(1) != 7:  # the launcher stops rank 0 if it sees rank 1's end first
        assert (
            "rank 1 ended while rank 0 waited for it" in done.outputs[0] or "lost rank 1" in done.outputs[0]
        )
        assert "twice" in done.outputs[0]


@pytest.mark.distributed
def test_different_shapes_are_an_error_not_a_hang():
    done = launch_script(
        HEAD + "groups.tensor.all_reduce(paddle.ones([2 + groups.rank]))\n", 2, ['{"tensor": 2}'], timeout=90
    )
    assert done.exit_code != 0
    assert "the ranks called different collectives" in "".join(done.outputs), done.tails()


@pytest.mark.distributed
def test_the_exit_code_of_rank_0_is_the_launchers():
    done = launch_script("import sys\nsys.exit(2)\n", 2, timeout=60)
    assert done.exit_code == 2, done.tails()


@pytest.mark.distributed
def test_a_launch_that_hangs_is_ended_and_shown():
    source = "import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(300)\n"
    with pytest.raises(AssertionError, match="not done after 6 s") as caught:
        launch_script(source, 2, timeout=6)
    pids = {int(line.split()[1]) for line in str(caught.value).splitlines() if line.startswith("pid ")}
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_time_limit_ends_a_process_that_hangs():
    source = (
        "import time\nfrom finetune.processes.time_limit import time_limit\n"
        "with time_limit(0.5, 'making groups'): time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "making groups took more than 0.5 s" in done.stderr


def test_the_time_limit_lets_go():
    with time_limit(0.2, "nothing"):
        pass
    time.sleep(0.4)


@pytest.mark.slow_distributed
@pytest.mark.timeout(1800)  # 10 to 26 s a start were seen on two busy cores
def test_thirty_starts_in_a_row():
    body = "groups.tensor.barrier(); groups.pipeline.barrier(); groups.world.barrier()\n"
    seconds = []
    for _ in range(30):
        started = time.monotonic()
        launch_script(HEAD + body, 4, ['{"tensor": 2, "pipeline": 2}'], timeout=60).check()
        seconds.append(time.monotonic() - started)
    print(f"30 starts: {sum(seconds):.0f} s, each {min(seconds):.1f} to {max(seconds):.1f} s")
