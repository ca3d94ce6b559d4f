"""Two machines: tensor parallelism inside, data parallelism across, and a cable that is pulled."""

import time
from pathlib import Path

import pytest

from finetune.checkpoints.folder import find_fault
from tests.conftest import FAST, ROOT, launch, losses, read_log, write_arguments
from tests.distributed.hosts import two_hosts, why_not

WORKER = Path(__file__).with_name("watch_worker.py")
NUM_STEPS = 40
# The worker has no output folder in common, by which the ranks of the real script come to a secret.
SECRET = {"FINETUNE_JOB_SECRET": "the same on both hosts"}
_OBSTACLE = why_not()
pytestmark = [
    pytest.mark.skipif(bool(_OBSTACLE), reason=_OBSTACLE or "two hosts can be made"),
    pytest.mark.distributed,
    pytest.mark.slow,
]


def check_that_both_sides_end(hosts) -> None:
    """After the cable was pulled: everything ends within a minute, and each side names the other."""
    began = time.monotonic()
    first, second = hosts.wait(timeout=60)
    assert time.monotonic() - began < 60
    assert first.exit_code != 0 and second.exit_code != 0
    # Whichever of the two ranks over there is given up first: both are on the lost host.
    assert f"({hosts.addresses[1]}) cannot be reached any more" in first.outputs[0], first.tails()
    for output in second.outputs:
        assert f"({hosts.addresses[0]}) cannot be reached any more" in output, second.tails()


@pytest.mark.slow_distributed  # the training below is cut in the same way
def test_a_cut_between_hosts_ends_both_and_the_same_command_works_again(tmp_path: Path):
    with two_hosts(tmp_path) as hosts:
        hosts.launch(WORKER, ["run", "2", "2"], SECRET)
        hosts.wait_for("step 10\n", timeout=90)
        hosts.cut()
        check_that_both_sides_end(hosts)
        hosts.mend()
        hosts.launch(WORKER, ["compare", "2", "2"], SECRET)
        assert [one.exit_code for one in hosts.wait(timeout=90)] == [0, 0]


def test_training_that_was_cut_continues_on_the_uninterrupted_curve(
    tmp_path: Path, tiny_llama: Path, small_data: Path
):
    settings = FAST | {
        "model_name_or_path": str(tiny_llama),
        "dataset_name_or_path": str(small_data),
        "max_steps": NUM_STEPS,
        "device": "cpu",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    alone = write_arguments(
        tmp_path / "alone.json",
        **settings | {"output_dir": str(tmp_path / "alone"), "per_device_train_batch_size": 4},
    )
    result = launch("finetune_generation.py", alone, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]

    out = tmp_path / "out"
    parallel = {"tensor_parallel_degree": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
    arguments = write_arguments(tmp_path / "arguments.json", **settings | parallel | {"output_dir": str(out)})
    with two_hosts(tmp_path) as hosts:
        hosts.launch(ROOT / "finetune_generation.py", [str(arguments)])
        _wait_for_checkpoint(hosts, out, step=6)
        hosts.cut()
        check_that_both_sides_end(hosts)
        steps_before = len(read_log(out))
        assert 6 <= steps_before < NUM_STEPS, "the cut came in mid-run"
        hosts.mend()
        hosts.launch(ROOT / "finetune_generation.py", [str(arguments)])
        ended = hosts.wait(timeout=240)
        assert [one.exit_code for one in ended] == [0, 0], "\n".join(one.tails() for one in ended)
    assert losses(out) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert len(losses(out)) == NUM_STEPS


def _wait_for_checkpoint(hosts, out: Path, *, step: int, timeout: float = 150) -> None:
    """Returns when a whole checkpoint of a step, or of a later one, stands."""
    end = time.monotonic() + timeout
    while True:
        whole = [path for path in out.glob("checkpoint-*") if path.suffix == "" and not find_fault(path)]
        if any(int(path.name.split("-")[1]) >= step for path in whole):
            return
        ended = [one.exit_code for one in hosts.outputs() if one.exit_code != -1]
        assert time.monotonic() < end and not ended, "\n".join(one.tails() for one in hosts.outputs())
        time.sleep(0.1)
