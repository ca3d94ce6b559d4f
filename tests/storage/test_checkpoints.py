import json
import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import UserError
from finetune.storage.checkpoints import Checkpoint, check_weights
from finetune.storage.dtypes import as_float32
from finetune.storage.joined_tensors import JoinedTensor
from finetune.storage.pdparams_files import read_pdparams
from finetune.storage.writer import write_tensors


class _RunsCode:
    def __reduce__(self):
        return (os.getcwd, ())


def test_tensors_and_shapes(tmp_path):
    expected: dict[str, np.ndarray] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(4, dtype=np.float16),
    }
    save_file(expected, tmp_path / "model.safetensors", metadata={"format": "np"})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.format == "np"
    assert checkpoint.names == {"a": (2, 3), "b": (4,)}
    for name, array in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


def test_shards(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.ones(3, np.float32)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == {"a": (2,), "b": (3,)}
    assert checkpoint.read("b").sum() == 3
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"names 1 files that are not in the folder .two.safetensors"):
        check_weights(tmp_path)


def test_index_must_stay_in_its_folder(tmp_path):
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"outside its folder"):
        check_weights(tmp_path)


def test_bfloat16_bits_become_float32():
    values = np.array([1.0, -2.5, 3.140625], dtype=np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(as_float32(bits), values)


@pytest.mark.parametrize("keep", [4, 40, -8])
def test_cut_safetensors_file(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(100, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"no valid safetensors file|its header promises"):
        Checkpoint(tmp_path)


def test_pdparams_of_arrays_are_read(tmp_path):
    array = np.arange(4, dtype=np.float32)
    content = {"a": ("inner_name", array), "b": np.asfortranarray(np.ones((2, 3))), "Names@@": {"a": "inner"}}
    for protocol in (2, 3, 4, 5):
        (tmp_path / "model_state.pdparams").write_bytes(pickle.dumps(content, protocol))
        checkpoint = Checkpoint(tmp_path)
        assert checkpoint.names == {"a": (4,), "b": (2, 3)}
        np.testing.assert_array_equal(checkpoint.read("a"), array)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_large_arrays_of_pdparams_stay_in_the_file(tmp_path, protocol, order):
    array = np.asarray(np.random.default_rng(0).normal(size=(50, 40)), dtype=np.float32, order=order)
    again = np.arange(1000, dtype=np.int64)
    content = {"a": ("inner_name", array), "b": again, "same": again, "tail": np.ones(2)}
    (tmp_path / "model_state.pdparams").write_bytes(pickle.dumps(content, protocol))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == {"a": (50, 40), "b": (1000,), "same": (1000,), "tail": (2,)}
    np.testing.assert_array_equal(checkpoint.read("a"), array)
    np.testing.assert_array_equal(checkpoint.read("b"), again)
    np.testing.assert_array_equal(checkpoint.read("same"), again)
    np.testing.assert_array_equal(checkpoint.read("tail"), [1, 1])
    if protocol > 2:
        assert isinstance(checkpoint.read("a"), np.memmap)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_paddle_saves_is_read(tmp_path, protocol):
    import paddle

    paddle.seed(0)
    tensors = {
        "matrix": paddle.randn([40, 50]),
        "half": paddle.randn([3]).astype("float16"),
        "brain": paddle.randn([3]).astype("bfloat16"),
        "none": paddle.zeros([0, 3]),
        "one": paddle.to_tensor(7),
        "yes": paddle.to_tensor([True, False]),
    }
    others = {
        "master_weights": {"w_0": paddle.ones([2])},
        "rate": 0.5,
        "steps": np.float32(2),
        "names": ["a", 1],
    }
    paddle.save(tensors | others, str(tmp_path / "model_state.pdparams"), protocol=protocol)
    arrays = read_pdparams(tmp_path / "model_state.pdparams")
    assert arrays.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.numpy()
        assert arrays[name].dtype == expected.dtype and arrays[name].shape == expected.shape
        np.testing.assert_array_equal(arrays[name].read(), expected)


def test_pdparams_with_arrays_of_objects_are_refused(tmp_path):
    content = {"a": np.array([{"b": 1}, None], dtype=object)}
    (tmp_path / "model_state.pdparams").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(UserError, match="holds something else than numbers"):
        Checkpoint(tmp_path)


def test_pdparams_may_not_point_outside_the_file(tmp_path):
    for place, message in (
        (b"X\x05\x00\x00\x009:999Q", "is refused: .*persistent"),
        (b"B" + (4).to_bytes(4, "little") + b"four", None),
        (b"B" + (999).to_bytes(4, "little"), "reaches past the end of the file"),
        (b"\x8e" + (2**63).to_bytes(8, "little"), "reaches past the end of the file"),
    ):
        state = b"(K\x01K\x01\x85cnumpy\ndtype\n(X\x02\x00\x00\x00f4\x89\x88tR\x89" + place + b"t"
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR" + state + b"b"
        (tmp_path / "model_state.pdparams").write_bytes(b"\x80\x02}X\x01\x00\x00\x00a" + array + b"s.")
        if message is None:
            assert Checkpoint(tmp_path).read("a").tobytes() == b"four"
            continue
        with pytest.raises(UserError, match=message):
            Checkpoint(tmp_path)


def test_pdparams_that_could_run_code_are_refused(tmp_path):
    (tmp_path / "model_state.pdparams").write_bytes(pickle.dumps({"a": _RunsCode()}))
    with pytest.raises(UserError, match=r"is refused: it contains posix.getcwd, which could run code"):
        Checkpoint(tmp_path)


def test_cut_pdparams_file(tmp_path):
    data = pickle.dumps({"a": np.zeros(100)})
    (tmp_path / "model_state.pdparams").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"is damaged|is refused"):
        Checkpoint(tmp_path)


def test_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"holds no weights: put one of model.safetensors"):
        check_weights(tmp_path)


def test_a_name_in_two_files_is_refused(tmp_path):
    for file in ("one.safetensors", "two.safetensors"):
        save_file({"a": np.zeros(2, np.float32)}, tmp_path / file)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"two.safetensors holds a, which one.safetensors holds too"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "is no valid JSON"),
        ("[]", "holds no JSON object but a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": 3}', r"is no valid weight index \("),
        ('{"weight_map": {"a": 3}}', r"is no valid weight index \("),
    ],
)
def test_an_index_that_is_none(tmp_path, text, fault):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=rf"{fault}.*: copy it again"):
        check_weights(tmp_path)


def test_big_endian_numbers_are_refused(tmp_path):
    (tmp_path / "model_state.pdparams").write_bytes(pickle.dumps({"a": np.ones(2, ">f4")}, 4))
    with pytest.raises(UserError, match="its numbers are big-endian"):
        Checkpoint(tmp_path)


def test_the_type_of_an_array_cannot_be_changed_afterwards(tmp_path):
    """A pickle may build a type, give it to an array, and then change what it has built."""
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4\x89\x88tRq\x01"
    state = b"(K\x01K\x01\x85" + dtype + b"\x89B\x04\x00\x00\x00\x00\x00\x80\x3ft"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR" + state + b"b"
    minus_one = b"J\xff\xff\xff\xff"
    change = b"h\x01(K\x03X\x01\x00\x00\x00>NNN" + 2 * minus_one + b"K\x00tb0"
    (tmp_path / "model_state.pdparams").write_bytes(b"\x80\x02}X\x01\x00\x00\x00a" + array + change + b"s.")
    array = Checkpoint(tmp_path).read("a")
    assert array.dtype == np.dtype("<f4") and array.tolist() == [1.0]


@pytest.mark.parametrize(
    "array", [np.arange(12.0).reshape(3, 4).T, np.asfortranarray(np.arange(6).reshape(2, 3))]
)
def test_turned_arrays_are_copied_row_by_row(tmp_path, array):
    """In the file columns lie together; the copy has rows."""
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(pickle.dumps({"a": np.asfortranarray(np.tile(array, (40, 40)))}, 4))
    stored = read_pdparams(path)["a"]
    assert stored.strides is not None and isinstance(stored.read(), np.memmap)
    expected = np.tile(array, (40, 40))
    np.testing.assert_array_equal(stored.read(), expected)
    np.testing.assert_array_equal(stored.load(), expected)
    assert b"".join(block.tobytes() for block in stored.blocks(1000)) == expected.tobytes()
    write_tensors(tmp_path, [JoinedTensor("a", (stored,))])
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["a"], expected)


def test_a_file_that_became_shorter(tmp_path):
    save_file({"a": np.zeros(100, np.float32)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(UserError, match="is cut short or was changed while it was read"):
        checkpoint.read("a")
    with pytest.raises(UserError, match="is cut short or was changed while it was read"):
        checkpoint.tensors["a"].load()
