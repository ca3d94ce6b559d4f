"""The CPU stand-ins, forward and backward, against NumPy; and that they stay away where they are not wanted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.processes import ROOT, launch_script
from tests.machine.half_precision import rounding as half_precision

WORKER = Path(__file__).with_name("cpu_backend_worker.py")
pytestmark = pytest.mark.distributed
RANKS = (0, 1)


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    source = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return source.normal(size=shape).astype("float32")

    labels = source.integers(0, 10, (4, 3))
    labels[0, 0] = labels[2, 1] = -100
    logits = normal(4, 3, 10) * 3
    logits[1, 1] += 200  # exp would overflow without the shift by the largest
    return {
        "x": normal(4, 3, 8),
        "weight": normal(4, 3, 8),
        "x6": normal(4, 3, 6),
        "weight6": normal(4, 3, 6),
        "columns": normal(6, 8),
        "bias": normal(8),
        "table": normal(10, 8),
        "ids": source.integers(0, 10, (4, 3)),
        "labels": labels,
        "logits": logits,
        "loss_weight": normal(4, 3, 1),
        "half_small": normal(2, 64),
        "half_large": normal(2, 80_000),
    }


@pytest.fixture(scope="module")
def results(inputs, tmp_path_factory) -> list[dict[str, np.ndarray]]:
    """What each rank computed, from one launch for all tests."""
    folder = tmp_path_factory.mktemp("cpu_backend")
    np.savez(folder / "inputs.npz", **inputs)
    launch_script(WORKER, 2, [str(folder / "inputs.npz"), str(folder / "results")]).check()
    return [dict(np.load(folder / f"results.{rank}.npz")) for rank in RANKS]


def half(value: np.ndarray, rank: int, axis: int = -1) -> np.ndarray:
    return np.split(value, 2, axis)[rank]


def assert_results(results, name: str, *expected) -> None:
    """Compares an output and its gradients; each expectation is a function of the rank."""
    for rank in RANKS:
        for i, function in enumerate(expected):
            key = name if i == 0 else f"{name}.grad{i - 1}"
            want = function(rank)
            assert results[rank][key].shape == want.shape, (key, rank)
            np.testing.assert_allclose(
                results[rank][key], want, rtol=1e-5, atol=1e-5, err_msg=f"{key} of {rank}"
            )


def test_identity_sums_the_branches_gradients(inputs, results):
    x, weight = inputs["x"], inputs["weight"]
    assert_results(results, "identity", lambda r: x * (r + 1), lambda r: weight * 3)


def test_all_reduce_sums_forward_only(inputs, results):
    x, weight = inputs["x"], inputs["weight"]
    assert_results(results, "all_reduce", lambda r: x * 3, lambda r: weight * (r + 1))


def test_concatenate_and_split(inputs, results):
    x, weight = inputs["x"], inputs["weight"]
    assert_results(results, "concatenate", lambda r: x, lambda r: half(weight, r))
    assert_results(results, "split", lambda r: half(x, r), lambda r: weight)


def test_cross_entropy(inputs, results):
    logits, labels, weight = inputs["logits"].astype("float64"), inputs["labels"], inputs["loss_weight"]
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    softmax = exponentials / exponentials.sum(-1, keepdims=True)
    counted = (labels != -100)[..., None]
    index = np.where(labels == -100, 0, labels)[..., None]
    loss = -np.log(np.take_along_axis(softmax, index, -1)) * counted
    one_hot = np.eye(10)[index[..., 0]]
    gradient = (softmax - one_hot) * counted * weight
    assert_results(results, "cross_entropy", lambda r: loss, lambda r: half(gradient, r))
    assert_results(results, "softmax", lambda r: half(softmax, r))


@pytest.mark.parametrize("gather", [False, True])
def test_column_linear(inputs, results, gather):
    x, columns, weight = inputs["x6"], inputs["columns"], inputs["weight"]
    output = x @ columns + inputs["bias"]
    assert_results(
        results,
        f"column_gather_{gather}",
        lambda r: output if gather else half(output, r),
        lambda r: weight @ columns.T,
        lambda r: half(np.einsum("bsi,bso->io", x, weight), r),
        lambda r: half(weight.sum((0, 1)), r),
    )


@pytest.mark.parametrize("is_parallel", [False, True])
def test_row_linear(inputs, results, is_parallel):
    x, columns, weight = inputs["x6"], inputs["columns"], inputs["weight"]
    x_grad = weight @ columns.T
    assert_results(
        results,
        f"row_parallel_{is_parallel}",
        lambda r: x @ columns + inputs["bias"],
        lambda r: half(x_grad, r) if is_parallel else x_grad,
        lambda r: half(np.einsum("bsi,bso->io", x, weight), r, 0),
        lambda r: weight.sum((0, 1)),
    )


def test_embedding(inputs, results):
    gradient = np.zeros_like(inputs["table"])
    np.add.at(gradient, inputs["ids"], inputs["weight"])
    assert_results(
        results, "embedding", lambda r: inputs["table"][inputs["ids"]], lambda r: half(gradient, r, 0)
    )


def test_sequence_parallel_operators(inputs, results):
    x, weight = inputs["x6"], inputs["weight6"]
    assert_results(results, "scatter", lambda r: half(x, r, 0), lambda r: weight)
    assert_results(results, "gather", lambda r: x, lambda r: half(weight, r, 0))
    assert_results(results, "all_gather", lambda r: x * (r + 1), lambda r: half(weight * 3, r, 0))
    assert_results(results, "reduce_scatter", lambda r: half(x * 3, r, 0), lambda r: weight * (r + 1))


def test_sequence_parallel_linears(inputs, results):
    x, columns, weight = inputs["x6"], inputs["columns"], inputs["weight"]
    output, x_grad = x @ columns + inputs["bias"], weight @ columns.T
    weight_grad = np.einsum("bsi,bso->io", x, weight)
    assert_results(
        results,
        "sequence_column",
        lambda r: half(output, r),
        lambda r: half(x_grad, r, 0),
        lambda r: half(weight_grad, r),
        lambda r: half(weight.sum((0, 1)), r),
    )
    assert_results(
        results,
        "sequence_row",
        lambda r: half(output, r, 0),
        lambda r: half(x_grad, r),
        lambda r: half(weight_grad, r, 0),
    )


def test_recompute_repeats_the_dropout_mask(results):
    for result in results:
        assert (result["plain"] == 0).any() and (result["plain"] != 0).any()
        for suffix in ("", ".grad0", ".grad1"):
            np.testing.assert_array_equal(result[f"recomputed{suffix}"], result[f"plain{suffix}"])


def test_calls_on_the_calculation_stream(results):
    assert [float(result["stream_all_reduce"][0]) for result in results] == [3, 3]
    assert [float(result["stream_broadcast"][0]) for result in results] == [6, 6]
    assert [result["stream_receive"].tolist() for result in results] == [[0, 0], [3, 4]]
    assert [result["stream_all_gather"].tolist() for result in results] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_added_in_float32_and_rounded_once(inputs, results, dtype, size):
    rows = half_precision.rounded(inputs[f"half_{size}"], dtype)
    total = half_precision.rounded(rows[0] + rows[1], dtype)
    expected = {
        "sum": lambda r: total,
        "max": lambda r: np.maximum(*rows),
        "min": lambda r: np.minimum(*rows),
        "scatter": lambda r: half(total, r),
        "gather": lambda r: rows,
        "broadcast": lambda r: rows[1],
    }
    for rank in RANKS:
        for name, want in expected.items():
            found = half_precision.as_float32(results[rank][f"{dtype}_{size}_{name}"])
            np.testing.assert_array_equal(found, want(rank), err_msg=f"{name} of {rank}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_scalars_and_views_are_reduced(inputs, results, dtype):
    rows = half_precision.rounded(inputs["half_large"], dtype)
    view = half_precision.rounded(rows[0] + rows[1], dtype).reshape(2, -1)[:, 1:5]
    for result in results:
        assert half_precision.as_float32(result[f"{dtype}_scalar"]) == 3
        np.testing.assert_array_equal(half_precision.as_float32(result[f"{dtype}_view"]), view)


def run_alone(source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_one_process_gets_no_stand_in_and_no_paddle():
    done = run_alone(
        "import sys\n"
        "from finetune.processes.groups import ProcessGroups, start_groups\n"
        "from finetune.processes.layout import Layout\n"
        "assert start_groups(Layout(), device='cpu') == ProcessGroups()\n"
        "assert 'paddle' not in sys.modules and 'finetune.processes.cpu.backend' not in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr


def test_a_gpu_gets_no_stand_in():
    done = run_alone(
        "import os\n"
        "os.environ.update(PADDLE_TRAINER_ID='0', PADDLE_TRAINERS_NUM='2')\n"
        "from unittest import mock\n"
        "from paddle.distributed import collective, fleet\n"
        "from paddle.distributed.fleet.layers.mpu import mp_ops\n"
        "before = (mp_ops._c_identity, mp_ops._mp_allreduce, collective._new_process_group_impl)\n"
        "from finetune.processes import groups\nfrom finetune.processes.cpu import backend as cpu_backend\n"
        "from finetune.processes.layout import Layout\n"
        "class Reached(Exception): pass\n"
        "with mock.patch.object(fleet, 'init', side_effect=Reached):\n"
        "    try: groups.start_groups(Layout(tensor=2), device='gpu')\n"
        "    except Reached: pass\n"
        "    else: raise SystemExit('fleet.init was not called')\n"
        "assert not cpu_backend.is_installed()\n"
        "after = (mp_ops._c_identity, mp_ops._mp_allreduce, collective._new_process_group_impl)\n"
        "assert before == after\n"
    )
    assert done.returncode == 0, done.stderr
