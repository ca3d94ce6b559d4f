"""Merging files of ranks that are large: memory, a full disk, a killed merge."""

from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune.storage.output_folder import RECORD_NAME
from tests.conftest import ROOT
from tests.merge.interrupted import kill_while_writing
from tests.merge.rank_writing import SCRIPT, run_command, tiny_model


def _large_ranks(folder: Path, *, num_bytes: int) -> None:
    """Two ranks of llama layers, which hold `num_bytes` together; the same bytes in every layer."""
    config, _ = tiny_model("llama", num_layers=1)
    hidden, inner = 1024, 4096
    layer_bytes = 4 * (3 * hidden * inner + 2 * hidden * hidden + hidden)
    num_layers = max(1, num_bytes // layer_bytes)
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": num_layers,
               "tensor_parallel_degree": 2}  # fmt: skip
    generator = np.random.default_rng(0)
    columns = generator.standard_normal((hidden, inner // 2)).astype(np.float32)
    rows = generator.standard_normal((inner // 2, hidden)).astype(np.float32)
    square = generator.standard_normal((hidden, hidden // 2)).astype(np.float32)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for rank in range(2):
        state = {}
        for layer in range(num_layers):
            prefix = f"llama.layers.{layer}"
            state[f"{prefix}.mlp.gate_proj.weight"] = columns
            state[f"{prefix}.mlp.up_proj.weight"] = columns
            state[f"{prefix}.mlp.down_proj.weight"] = rows
            state[f"{prefix}.self_attn.q_proj.weight"] = square
            state[f"{prefix}.input_layernorm.weight"] = rows[0]
        with (folder / f"model_state.tp{rank:02d}.pdparams").open("wb") as file:
            pickler = pickle.Pickler(file, protocol=4)
            pickler.fast = True  # every array is written anew
            pickler.dump(state)


@pytest.fixture(scope="module")
def large_ranks(tmp_path_factory) -> Path:
    """300 MB in two ranks."""
    folder = tmp_path_factory.mktemp("large") / "run"
    _large_ranks(folder, num_bytes=300_000_000)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_memory_does_not_grow_with_the_model(large_ranks, tmp_path):
    program = (
        "import sys; from finetune.merge.tensor_parallel import main; main(sys.argv[1:]); "
        "print(*[line for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    words = [
        sys.executable,
        "-c",
        program,
        "--model_name_or_path",
        large_ranks,
        "--output_dir",
        tmp_path / "out",
    ]
    run = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-2]) < 120_000, "kB; the model has 300 MB, its largest tensor 17"


def test_full_disk(large_ranks, tmp_path):
    """A limit on the size of files gives the same kind of error as a disk without room."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))

    run = run_command("--model_name_or_path", large_ranks, "--output_dir", tmp_path / "out", preexec_fn=limit)
    assert run.returncode == 2, run.stderr
    assert "has no room for the result" in run.stderr and "it needs 0.2" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_killed_merge_leaves_nothing_that_looks_finished(large_ranks, tmp_path):
    words = [
        sys.executable,
        str(SCRIPT),
        "--model_name_or_path",
        str(large_ranks),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    hidden = kill_while_writing(words, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [hidden.name, ".out.lock"]
    assert not (hidden / RECORD_NAME).exists()
    run = run_command("--model_name_or_path", large_ranks, "--output_dir", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
