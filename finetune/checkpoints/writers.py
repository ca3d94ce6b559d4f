"""Two ways of writing the tensors of all ranks: under the names and shapes of one process, or a file per rank.

A run chooses its writer once. `WholeTensorWriter` puts together on the first tensor-parallel rank what is split over
them, one tensor at a time; each stage of the pipeline writes its own files through that rank, and rank 0 writes the
index. Replicas write nothing. So host memory holds one whole tensor and its parts beside the model, and the files are
the same whatever the layout was. `RankFileWriter` lets every rank write what it holds.

Which of the two wrote a folder is told by the files in it (`TensorSet.open`).

All ranks must call `write`, in the same order. Where a file cannot be written, the rank goes on taking in what the
others send and raises at the end, so that nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.checkpoints.tensors_of_ranks import LocalTensor, gather_whole
from finetune.models.shard_files import open_shards
from finetune.processes.groups import Group, ProcessGroups
from finetune.processes.joint_steps import fail_on_all_ranks
from finetune.storage.checkpoints import ShardedCheckpoint, TensorFiles, open_indexed
from finetune.storage.rank_files import find_rank_files, shard_name
from finetune.storage.writer import TensorWriter, file_names, plan_files, write_index

_MAX_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class TensorSet:
    """Tensors that are saved together.

    Attributes:
        stem: Of files with whole tensors: `<stem>.safetensors`, or numbered files with an index.
        rank_stem: Of files per rank: `<rank_stem>.tpXX_ppYY<rank_ending>`.
        rank_ending: Ends their names.
        is_divided: Whether large ones go to several files.
        always_index: Whether one file, too, is numbered and has an index.
        index_facts: More fields of the index.
    """

    stem: str
    rank_stem: str
    rank_ending: str = ".pdparams"
    is_divided: bool = False
    always_index: bool = False
    index_facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The one file with whole tensors."""
        return f"{self.stem}.safetensors"

    @property
    def index_name(self) -> str:
        """The index of several."""
        return f"{self.file_name}.index.json"

    def has_whole_tensors(self, folder: Path) -> bool:
        """Whether a folder holds them whole."""
        return (folder / self.index_name).is_file() or (folder / self.file_name).is_file()

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds them, in either form.

        Raises:
            UserError: A rank's file is missing.
        """
        return (
            self.has_whole_tensors(folder)
            or find_rank_files(folder, self.rank_stem, self.rank_ending) is not None
        )

    def open(self, folder: Path, family: Any, config: Any) -> TensorFiles | ShardedCheckpoint:
        """Opens what either writer wrote; nothing but names and shapes is read.

        Args:
            folder: Holds the files.
            family: Record of the model; None where only whole tensors can be read.
            config: Its PaddleNLP config.

        Raises:
            UserError: Files are missing or damaged.
        """
        if (folder / self.index_name).is_file():
            return open_indexed(folder, self.index_name)
        if family is None or (folder / self.file_name).is_file():
            return TensorFiles([folder / self.file_name])
        return open_shards(folder, stem=self.rank_stem, ending=self.rank_ending, family=family, config=config)


@dataclass(frozen=True)
class RankFileWriter:
    """Every rank writes what it holds as one pickle of arrays; of replicas the first does.

    Attributes:
        groups: All ranks call `write`.
        writes_whole: Whether the files are those of one process.
    """

    groups: ProcessGroups
    writes_whole = False

    def write(self, tensors: Mapping[str, LocalTensor], folder: Path, tensor_set: TensorSet) -> None:
        """Writes a set (see `WholeTensorWriter.write`)."""
        import paddle

        groups = self.groups
        # Those that share the optimizer state of the first replica take part in reading.
        takes_part = groups.coordinates.data == 0
        state = {name: tensor.read() for name, tensor in sorted(tensors.items())} if takes_part else {}
        with fail_on_all_ranks(groups):
            if not groups.data.is_first:
                return
            place, layout = groups.coordinates, groups.layout
            name = shard_name(
                tensor_set.rank_stem,
                tensor=place.tensor if layout.tensor > 1 else None,
                pipeline=place.pipeline if layout.pipeline > 1 else None,
                ending=tensor_set.rank_ending,
            )
            paddle.save(state, str(folder / name), protocol=4)


@dataclass(frozen=True)
class WholeTensorWriter:
    """Writes `<stem>.safetensors`, or numbered files with an index.

    Attributes:
        groups: All ranks call `write`; those of one process by default.
        max_file_bytes: Size beyond which the next file of a divided set is begun.
        writes_whole: Whether the files are those of one process.
    """

    groups: ProcessGroups = field(default_factory=ProcessGroups)
    max_file_bytes: int = _MAX_FILE_BYTES
    writes_whole = True

    def write(self, tensors: Mapping[str, LocalTensor], folder: Path, tensor_set: TensorSet) -> None:
        """Writes a set.

        Args:
            tensors: What this rank has a part in; the same names on all ranks of a stage.
            folder: Where to write; the same on all ranks.
            tensor_set: What the files are called.

        Raises:
            OSError: A file could not be written.
            RuntimeError: Ranks that should have the same tensors do not.
        """
        groups = self.groups
        _check_same(tensors, groups.tensor)
        _check_same(tensors, groups.sharding)
        stages = groups.pipeline.gather_objects(
            {name: tensor.whole_bytes(groups.tensor.size) for name, tensor in tensors.items()}
        )
        max_bytes = self.max_file_bytes if tensor_set.is_divided else None
        plans = [plan_files(sizes, max_bytes) for sizes in _without_doubles(stages)]
        plan = [names for plan in plans for names in plan]
        numbered = len(plan) > 1 or tensor_set.always_index
        files = list(zip(file_names(tensor_set.stem, len(plan), numbered=numbered), plan, strict=True))
        begin = sum(map(len, plans[: groups.pipeline.position]))
        mine = files[begin : begin + len(plans[groups.pipeline.position])]
        failure: OSError | None = None
        # Of several replicas the first writes; those that share its optimizer state take part in reading.
        for file, names in mine if groups.coordinates.data == 0 else ():
            part = {name: tensors[name] for name in names}
            failure = _write_file(folder / file, part, groups) or failure
        with fail_on_all_ranks(groups):
            if failure is not None:
                raise failure
            if numbered and groups.is_first:
                sizes = {name: size for stage in stages for name, size in stage.items()}
                write_index(
                    folder,
                    tensor_set.stem,
                    dict(files),
                    num_bytes=sum(sizes.values()),
                    facts=tensor_set.index_facts,
                )


TensorSetWriter = WholeTensorWriter | RankFileWriter


def _check_same(tensors: Iterable[str], group: Group) -> None:
    """Ranks that would wait for each other over different tensors must not begin."""
    if group.size == 1:
        return
    for other in group.gather_objects(sorted(tensors)):
        if different := set(other) ^ set(tensors):
            raise RuntimeError(f"ranks {group.ranks} hold different tensors: {sorted(different)[:5]}")


def _without_doubles(stages: list[dict[str, int]]) -> list[dict[str, int]]:
    """A tied tensor that two stages hold belongs to the earlier one."""
    seen: set[str] = set()
    left = []
    for sizes in stages:
        left.append({name: size for name, size in sizes.items() if name not in seen})
        seen |= sizes.keys()
    return left


def _write_file(path: Path, tensors: Mapping[str, LocalTensor], groups: ProcessGroups) -> OSError | None:
    """Reads, gathers and, on the rank that writes, writes; an error is handed back when all is gathered."""
    writer, failure = None, None
    degree = groups.tensor.size
    try:
        if groups.data.is_first and groups.tensor.is_first:
            shapes = {name: (tensor.dtype, tensor.whole_shape(degree)) for name, tensor in tensors.items()}
            writer = TensorWriter(path, shapes)
    except OSError as error:
        failure = error
    for name, tensor in tensors.items():
        value = tensor.read()
        if not groups.data.is_first:
            continue
        array = gather_whole(value, tensor, groups.tensor)
        try:
            if writer and not failure and array is not None:
                writer.write(name, array)
        except OSError as error:
            failure = error
    if writer and failure:
        writer.abandon()
    elif writer:
        try:
            writer.close()
        except OSError as error:
            failure = error
    return failure
