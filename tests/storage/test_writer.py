"""The writer of safetensors files: joining by any rule, order, sizes, sources that end too early."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import UserError
from finetune.storage import joined_tensors
from finetune.storage.arrays import StoredArray
from finetune.storage.joined_tensors import JoinedTensor
from finetune.storage.safetensors_files import read_safetensors
from finetune.storage.splits import Split
from finetune.storage.writer import ComputedTensor, Layout, write_tensors
from tests.merge.rank_writing import check_same, read_whole


def _stored(path, array) -> StoredArray:
    """The array behind 13 other bytes in a file, as arrays lie in a pickle."""
    path.write_bytes(b"x" * 13 + array.tobytes())
    return StoredArray(path, array.dtype, array.shape, 13)


@settings(max_examples=60, deadline=None)
@given(
    axis=st.sampled_from([0, -1]),
    blocks=st.sampled_from([(1,), (1, 1), (4, 2, 2), (1, 1, 1)]),
    degree=st.sampled_from([2, 4]),
    other=st.lists(st.integers(1, 5), max_size=2),
    multiple=st.integers(1, 3),
    dtype=st.sampled_from(["f4", "u2", "f2", "f8"]),
    buffer=st.sampled_from([1, 64, 4096]),
    pieces=st.sampled_from([1, 16, 1024]),
)
def test_joining_equals_the_rule(
    tmp_path_factory, axis, blocks, degree, other, multiple, dtype, buffer, pieces
):
    folder = tmp_path_factory.mktemp("join")
    size = degree * sum(blocks) * multiple
    shape = (size, *other) if axis == 0 else (*other, size)
    whole = np.random.default_rng(multiple).integers(0, 255, shape).astype(dtype)
    split = Split(axis, blocks=blocks)
    parts = tuple(
        _stored(folder / f"{rank}.bin", np.ascontiguousarray(split.part(whole, degree, rank)))
        for rank in range(degree)
    )
    tensor = JoinedTensor("w", parts, split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joined_tensors, "_ROWS_BYTES", buffer)
        patch.setattr(joined_tensors, "_MAX_PIECES", pieces)
        write_tensors(folder, [tensor])
    check_same(read_whole(folder), {"w": whole})
    np.testing.assert_array_equal(tensor.load(), whole)


def test_types_are_aligned_and_marked(tmp_path):
    arrays = {
        "half": np.arange(3, dtype=np.uint16),
        "wide": np.arange(5, dtype=np.float64),
        "none": np.empty((0, 4), np.float32),
        "flags": np.array([True, False, True]),
        "single": np.array(2.5, np.float32),
    }
    tensors = [JoinedTensor(name, (_stored(tmp_path / name, array),)) for name, array in arrays.items()]
    (path,) = write_tensors(tmp_path, tensors, Layout(format="pt"))
    file = read_safetensors(path)
    assert file.format == "pt"
    assert min(array.start for array in file.arrays.values()) % 8 == 0
    assert all(array.start % array.dtype.itemsize == 0 for array in file.arrays.values())
    check_same(read_whole(tmp_path), arrays)


def test_written_files_open_with_the_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    (path,) = write_tensors(tmp_path, [JoinedTensor("w", (_stored(tmp_path / "w", array),))])
    np.testing.assert_array_equal(library.load_file(path)["w"], array)


def test_computed_tensor(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor = ComputedTensor("t", array.dtype, (4, 3), lambda: (row for row in array.T))
    write_tensors(tmp_path, [tensor])
    check_same(read_whole(tmp_path), {"t": array.T})


def test_large_tensor_gets_its_own_file(tmp_path):
    arrays = {name: np.zeros(size, np.float32) for name, size in (("a", 2), ("b", 100), ("c", 2), ("d", 2))}
    tensors = [JoinedTensor(name, (_stored(tmp_path / name, array),)) for name, array in arrays.items()]
    paths = write_tensors(tmp_path, tensors, Layout(max_shard_bytes=16))
    assert [list(read_safetensors(path).arrays) for path in paths] == [["a"], ["b"], ["c", "d"]]


@pytest.mark.parametrize("split", [None, Split(0), Split(-1)])
def test_source_that_shrinks(tmp_path, split):
    array = np.zeros((4, 4), np.float32)
    parts = tuple(_stored(tmp_path / f"source{rank}", array) for rank in range(2 if split else 1))
    os.truncate(tmp_path / "source0", 40)
    with pytest.raises(UserError, match="source0 is cut short"):
        write_tensors(tmp_path, [JoinedTensor("w", parts, split)])


def test_progress_counts_every_byte(tmp_path):
    array = np.zeros((64, 64), np.float32)
    parts = tuple(_stored(tmp_path / f"source{rank}", array) for rank in range(2))
    counted: list[int] = []
    (path,) = write_tensors(tmp_path, [JoinedTensor("w", parts, Split(-1))], advance=counted.append)
    assert sum(counted) == path.stat().st_size


def test_a_write_that_takes_less(tmp_path, monkeypatch):
    """The system may write fewer bytes than it was given; the rest follows."""
    array = np.arange(64, dtype=np.float32).reshape(8, 8)
    parts = tuple(_stored(tmp_path / f"source{rank}", array) for rank in range(2))
    monkeypatch.setattr(os, "pwritev", lambda file, pieces, offset: os.pwrite(file, pieces[0][:7], offset))
    write_tensors(tmp_path, [JoinedTensor("w", parts, Split(-1))])
    check_same(read_whole(tmp_path), {"w": np.concatenate([array, array], axis=1)})
