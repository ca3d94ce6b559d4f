"""Weight files from a stranger end in a message, soon and in little memory, whatever they hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.storage import hostile_files

MAX_BYTES = 3 * 2**29
MAX_SECONDS = 2
NAMES = (
    *(f"{name}.pdparams" for name in hostile_files.pdparams()),
    *(f"{name}.bin" for name in hostile_files.torch_pickles()),
    "compressed zeros.bin",
    "encrypted.bin",
    "directory of many members.bin",
    "long pickle.bin",
)
# What must be said, where it could be right for a wrong reason.
REASONS = {
    "scalar of a pointer.pdparams": "something else than numbers",
    "key without end by memo.pdparams": "a dictionary has a tuple as key",
    "copies of a list.pdparams": "it copies more than 4000000 elements",
    "copies of a text.pdparams": "its strings are longer than the file",
    "deep lists.pdparams": "holds no tensors",
    "deep marks.pdparams": "nested more than 64 deep",
    "many instructions.pdparams": "more than 4000000 instructions",
    "huge empty array.pdparams": "an array has shape",
    "array without content.pdparams": "has no content",
    "integer of 255 bytes.pdparams": "an integer of 255 bytes",
    "text beyond the end.pdparams": "a string of 4294967295 bytes reaches past the end of the file",
    "storage of pointers.bin": "an unknown kind of storage",
    "storage changed to pointers.bin": "it sets the state of a _Storage",
    "stand-in for a storage.bin": "a tensor without storage",
    "one number repeated.bin": "is larger than the file",
    "storage of negative size.bin": "has 64 bytes",
    "compressed zeros.bin": "it is compressed",
    "encrypted.bin": "compressed",
    "directory of many members.bin": "the directory of the archive has more than",
    "long pickle.bin": "data.pkl has more than",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name of each file -> what was said and the seconds of computing."""
    folder = tmp_path_factory.mktemp("hostile")
    written = [path.name for path in hostile_files.write_all(folder)]
    assert sorted(written) == sorted(NAMES)
    done = subprocess.run(
        [sys.executable, "-m", "tests.storage.limited_reading", str(folder), str(MAX_BYTES)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {name: (said, seconds) for name, said, seconds in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file_ends_in_a_message(outcomes, name):
    said, seconds = outcomes[name]
    assert said.startswith("UserError: "), said
    assert "MemoryError" not in said
    assert REASONS.get(name, "") in said
    assert seconds < MAX_SECONDS


def test_the_files_fail_for_their_fault_alone(tmp_path):
    """The same builders make files that are read."""
    from finetune.storage.pdparams_files import read_pdparams
    from finetune.storage.torch_files import read_torch_file

    (tmp_path / "a.pdparams").write_bytes(
        hostile_files.holding(hostile_files.array(hostile_files.plain((1,))))
    )
    assert read_pdparams(tmp_path / "a.pdparams")["a"].read().tolist() == [0.0]
    hostile_files.save_archive(tmp_path / "a.bin", hostile_files.holding(hostile_files.tensor()))
    assert read_torch_file(tmp_path / "a.bin")["a"].read().tolist() == [0.0] * 4
