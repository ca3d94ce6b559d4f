"""Tensors survive the file exactly, and other readers understand it."""

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from finetune.storage.checkpoints import TensorFiles
from finetune.storage.dtypes import to_tensor
from finetune.storage.writer import TensorWriter


def save_tensors(path, tensors):
    writer = TensorWriter(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        writer.write(name, tensor.numpy())
    writer.close()


def load_tensors(path):
    file = TensorFiles([path])
    return {name: to_tensor(np.array(file.read(name))) for name in file.names}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_round_trip_keeps_bits_and_dtype(tmp_path, dtype):
    paddle.seed(0)
    tensors = {
        "matrix": paddle.randn([3, 5]).astype(dtype),
        "scalar": paddle.to_tensor(1.5).astype(dtype),
        "名": paddle.randn([1]).astype(dtype),
    }
    save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert loaded[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_the_safetensors_library_reads_it(tmp_path):
    tensors = {"a": paddle.arange(6, dtype="float32").reshape([2, 3]), "b": paddle.ones([4], "float16")}
    save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert {name: array.dtype for name, array in loaded.items()} == {"a": np.float32, "b": np.float16}
    np.testing.assert_array_equal(loaded["a"], tensors["a"].numpy())
