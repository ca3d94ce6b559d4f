"""Tensors of a folder by name, whatever kind of file holds them. Nothing is read before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from finetune.errors import UserError, list_some
from finetune.storage.arrays import StoredArray
from finetune.storage.dtypes import Array, dtype_name
from finetune.storage.files import read_json_object
from finetune.storage.joined_tensors import JoinedTensor
from finetune.storage.pdparams_files import read_pdparams
from finetune.storage.quantisation.side_files import find_old_start, read_side_facts
from finetune.storage.rank_files import RankFiles
from finetune.storage.safetensors_files import FileContent, read_safetensors
from finetune.storage.splits import Split
from finetune.storage.torch_files import read_torch_file

WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "model_state.pdparams.index.json",
    "model_state.pdparams",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""Names of the files that start a checkpoint, in the order of preference."""
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin", ".pdparams")
NOT_ONE_RUN = "they are not of one run and step: copy the files of all ranks from the same checkpoint"


def find_start(folder: Path) -> Path | None:
    """The file that a checkpoint starts with; old folders of AutoGPTQ name theirs in a file beside it."""
    if start := next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None):
        return start
    if not (facts := read_side_facts(folder)):
        return None
    name = find_old_start((path.name for path in folder.iterdir() if path.is_file()), facts)
    return folder / name if name else None


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weights that can be read here, every shard included."""
    start = find_start(folder)
    return start is not None and all((folder / shard).is_file() for shard in shard_names(start))


def check_weights(folder: Path) -> Path:
    """The file that a checkpoint starts with.

    Raises:
        UserError: The folder has no readable weights; it names what is there or what is missing.
    """
    start = find_start(folder)
    if start is None:
        others = sorted(path.name for path in folder.glob("*") if path.suffix in _WEIGHT_SUFFIXES)
        held = f" under a name that is read here (it holds {list_some(others, 4)})" if others else ""
        raise UserError(f"{folder} holds no weights{held}: put one of {', '.join(WEIGHT_FILES)} there")
    find_shards(start)
    return start


def shard_names(start: Path) -> list[str]:
    """File names that an index names, or the one file itself.

    Raises:
        UserError: The index is damaged, or names files of other folders.
    """
    if start.suffix != ".json":
        return [start.name]
    index = read_json_object(start, keys=("weight_map",))
    try:
        names = set(index["weight_map"].values())
        outside = [name for name in names if Path(name).name != name]
    except (TypeError, AttributeError) as error:
        raise UserError(f"{start} is no valid weight index ({error}): copy it again") from None
    if outside:
        raise UserError(
            f"{start} names files outside its folder ({outside[0]}): use only files of this folder"
        )
    return sorted(names)


def find_shards(start: Path) -> list[Path]:
    """The files of a checkpoint, from the one that it starts with.

    Raises:
        UserError: Some are missing, or the index is damaged.
    """
    names = shard_names(start)
    missing = [name for name in names if not (start.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{start} names {len(missing)} files that are not in the folder ({', '.join(missing[:5])}): "
            "copy them there"
        )
    return [start.parent / name for name in names]


def read_file(path: Path) -> FileContent:
    """The arrays of a weight file of any kind, told by its suffix.

    Raises:
        UserError: It is missing, damaged or of another kind.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: copy it there")
    if path.suffix == ".bin":
        return FileContent(read_torch_file(path), "pt")
    return FileContent(read_pdparams(path), "pd")


def read_files(paths: Iterable[Path]) -> FileContent:
    """The arrays of several files by name.

    Raises:
        UserError: A file is damaged, or two hold the same name.
    """
    arrays: dict[str, StoredArray] = {}
    format_name = None
    for path in paths:
        content = read_file(path)
        if doubled := sorted(arrays.keys() & content.arrays.keys()):
            raise UserError(
                f"{path} holds {doubled[0]}, which {arrays[doubled[0]].path.name} holds too: one of them is of "
                "another run"
            )
        arrays |= content.arrays
        format_name = format_name or content.format
    return FileContent(arrays, format_name)


class TensorFiles:
    """Tensors of one or several files.

    Attributes:
        tensors: By name.
        format: See `FileContent`.
    """

    def __init__(self, paths: Iterable[Path]):
        content = read_files(paths)
        self.tensors = {name: JoinedTensor(name, (array,)) for name, array in content.arrays.items()}
        self.format = content.format

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Array:
        """The tensor as stored, mapped where one file holds it; bfloat16 as uint16."""
        return self.tensors[name].read()


class Checkpoint(TensorFiles):
    """The whole tensors of a model's folder."""

    def __init__(self, folder: Path):
        super().__init__(find_shards(check_weights(folder)))


def open_indexed(folder: Path, index_name: str) -> TensorFiles:
    """Opens the files that an index names.

    Raises:
        UserError: The index or one of the files is missing or damaged.
    """
    return TensorFiles(find_shards(folder / index_name))


class ShardedCheckpoint(TensorFiles):
    """Tensors that every tensor- and pipeline-parallel rank wrote its part of.

    The ranks of a stage hold the same names; what tensor parallelism divides has the same shape on all of them, and
    what it does not divide, such as norms, is the same. A tied weight that two stages hold is the same on both.

    Args:
        files: The ranks' files.
        find_split: How the ranks divide a tensor of that name; None when all of them hold it whole.

    Attributes:
        tensor_degree: Tensor-parallel ranks that wrote.
        pipeline_degree: Pipeline stages that wrote.
        replicas: Pairs of arrays that must be the same to the last bit, with their name.

    Raises:
        UserError: A file is damaged, or files are of different runs.
    """

    def __init__(self, files: RankFiles, find_split: Callable[[str], Split | None]):
        self.tensor_degree, self.pipeline_degree = files.tensor_degree, files.pipeline_degree
        self.tensors: dict[str, JoinedTensor] = {}
        self.replicas: list[tuple[str, StoredArray, StoredArray]] = []
        for stage in range(files.pipeline_degree):
            paths = [files.files[rank, stage] for rank in range(files.tensor_degree)]
            contents = [read_files(each) for each in paths]
            self.format = contents[0].format
            for content, (path, *_) in zip(contents, paths, strict=True):
                if different := sorted(content.arrays.keys() ^ contents[0].arrays.keys()):
                    raise UserError(
                        f"{path} and {paths[0][0].name} hold different tensors ({different[0]}): {NOT_ONE_RUN}"
                    )
            for name in contents[0].arrays:
                self._add(name, [content.arrays[name] for content in contents], find_split(name))

    def _add(self, name: str, parts: list[StoredArray], split: Split | None) -> None:
        first = parts[0]
        for other in parts[1:]:
            _check_alike(name, first, other)
        if split is None:
            self.replicas += [(name, first, other) for other in parts[1:]]
            parts = [first]
        tensor = JoinedTensor(name, tuple(parts), split)
        try:
            if split:
                split.places(tensor.shape, len(parts), 0)
        except ValueError as error:
            raise UserError(f"{first.path}: {name} cannot be joined ({error}): {NOT_ONE_RUN}") from None
        known = self.tensors.setdefault(name, tensor)
        if known is not tensor:
            for there, here in zip(known.parts, parts, strict=True):
                _check_alike(name, there, here)
                self.replicas.append((name, there, here))


def _check_alike(name: str, first: StoredArray, other: StoredArray) -> None:
    if (first.shape, first.dtype) != (other.shape, other.dtype):
        raise UserError(
            f"{other.path}: {name} has shape {list(other.shape)} ({dtype_name(other.dtype)}), but "
            f"{list(first.shape)} ({dtype_name(first.dtype)}) in {first.path.name}: {NOT_ONE_RUN}"
        )
