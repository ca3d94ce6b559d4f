"""Tensors of a checkpoint folder, one at a time, without Paddle.

Files are mapped into memory, so a tensor costs nothing until it is used. safetensors files are read here,
PaddleNLP's `.pdparams` in `pickled_arrays`, PyTorch's `.bin` in `torch_files`.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.errors import UserError
from finetune.models.pickled_arrays import PickledArray, read_pdparams
from finetune.models.torch_files import TorchTensor, read_torch_file

WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "model_state.pdparams.index.json",
    "model_state.pdparams",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""Names of the files that start a checkpoint, in the order of preference."""

_SAFETENSORS_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "U16": "<u2",  # what PaddleNLP writes for bfloat16
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
# NumPy has no bfloat16; both formats keep its 16 bits, which 16-bit unsigned integers stand for.
_BFLOAT16 = np.dtype("<u2")
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file: place of its data, and name -> (dtype, shape, begin, end)."""

    path: Path
    data_start: int
    tensors: dict[str, tuple[np.dtype, tuple[int, ...], int, int]]
    format: str | None


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weights that can be read here, every shard included."""
    start = _start_file(folder)
    return start is not None and all((folder / shard).is_file() for shard in shard_names(start))


def check_weights(folder: Path) -> None:
    """Raises UserError when the folder has no readable weights, naming what is there or what is missing."""
    start = _start_file(folder)
    if start is None:
        raise UserError(f"{folder} holds no weights: put one of {', '.join(WEIGHT_FILES)} there")
    missing = [name for name in shard_names(start) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{start} names {len(missing)} files that are not in the folder ({', '.join(missing[:5])}): "
            "copy them there"
        )


def shard_names(start: Path) -> list[str]:
    """File names that an index names, or the one file itself."""
    if start.suffix != ".json":
        return [start.name]
    try:
        names = set(json.loads(start.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{start} is no valid weight index ({error}): copy it again") from None
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(
            f"{start} names files outside its folder ({outside[0]}): use only files of this folder"
        )
    return sorted(names)


class Checkpoint:
    """Read access to all tensors of a folder.

    Attributes:
        names: Name of every tensor -> its shape.
        format: "pt" for files that Hugging Face wrote, "np" or "pd" for PaddleNLP's, None when unsaid.
    """

    def __init__(self, folder: Path):
        check_weights(folder)
        start = _start_file(folder)
        assert start is not None
        paths = [folder / name for name in shard_names(start)]
        self._mapped: dict[str, WeightFile] = {}
        self._pickled: dict[str, PickledArray | TorchTensor] = {}
        self.format: str | None = None
        if paths[0].suffix == ".safetensors":
            for path in paths:
                file = read_header(path)
                self.format = self.format or file.format
                self._mapped |= dict.fromkeys(file.tensors, file)
        elif paths[0].suffix == ".bin":
            self.format = "pt"
            for path in paths:
                self._pickled |= read_torch_file(path)
        else:
            self.format = "pd"
            for path in paths:
                self._pickled |= read_pdparams(path)

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, by name."""
        mapped = {name: file.tensors[name][1] for name, file in self._mapped.items()}
        return mapped | {name: array.shape for name, array in self._pickled.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored; bfloat16 comes as uint16 (see `as_float32`)."""
        if name in self._pickled:
            return self._pickled[name].read()
        file = self._mapped[name]
        dtype, shape, begin, end = file.tensors[name]
        if begin == end:
            return np.empty(shape, dtype)
        return np.memmap(file.path, dtype=dtype, mode="r", offset=file.data_start + begin, shape=shape)


def as_float32(array: np.ndarray) -> np.ndarray:
    """Widens stored floats, bfloat16 bits (uint16) among them; no copy for float32."""
    if array.dtype == _BFLOAT16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(array, dtype=np.float32)


def read_header(path: Path) -> WeightFile:
    """Reads what a safetensors file says of its tensors.

    Raises:
        UserError: The file is cut short or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None) or {}
            tensors = {
                name: (
                    np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]),
                    tuple(entry["shape"]),
                    *entry["data_offsets"],
                )
                for name, entry in header.items()
            }
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no valid safetensors file ({error}): copy it again") from None
    end = 8 + length + max((entry[3] for entry in tensors.values()), default=0)
    if end > size:
        raise UserError(f"{path} has {size} bytes but its header promises {end}: copy it again")
    return WeightFile(path, 8 + length, tensors, metadata.get("format"))


def _start_file(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
