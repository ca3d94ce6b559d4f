"""The counter of device reads counts what it should."""

import paddle
import pytest

from tests.device_reads import patched_reads

READS = {
    "numpy": lambda tensor: tensor.numpy(),
    "item": lambda tensor: tensor[0].item(),
    "tolist": lambda tensor: tensor.tolist(),
    "__float__": lambda tensor: float(tensor[0]),
    "__int__": lambda tensor: int(tensor[0]),
    "__bool__": lambda tensor: bool(tensor[0] > 0),
    "__repr__": repr,
    "nonzero": lambda tensor: paddle.nonzero(tensor),
    "masked_select": lambda tensor: paddle.masked_select(tensor, tensor > 0),
    "__getitem__": lambda tensor: tensor[tensor > 1],
}


@pytest.mark.parametrize("name", READS)
def test_a_read_is_found_once_with_its_place(name):
    tensor = paddle.to_tensor([1.0, 2.0])
    with patched_reads() as reads, reads.watching() as found:
        READS[name](tensor)
    (read,) = found
    assert read.startswith(f"{name} in tests/test_device_reads.py:")


def test_other_calls_and_other_times_are_not_counted():
    original = paddle.Tensor.numpy
    tensor = paddle.to_tensor([1.0, 2.0])
    with patched_reads() as reads:
        tensor.tolist()
        with reads.watching() as found:
            total = (tensor[0] + tensor[1:].sum()).reshape([len(tensor.shape)])
            paddle.concat([total, tensor]).astype("float64")
            assert tensor.shape == [2] and len(tensor) == 2
        tensor.numpy()
    assert found == []
    assert paddle.Tensor.numpy is original
