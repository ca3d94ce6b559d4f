"""Checkpoints of many processes under the names and shapes of one.

What is split over tensor-parallel ranks is put together on the first of them, one tensor at a time; each stage of
the pipeline writes its own files through that rank, and rank 0 writes the index. Replicas write nothing. So host memory
holds one whole tensor and its parts beside the model, and the files are the same whatever the layout was.

All ranks must call the functions here, in the same order. Where a file cannot be written, the rank goes on taking in
what the others send and raises at the end, so that nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.families.family import Family, find_family
from finetune.families.tensor_splits import find_split
from finetune.models.layers import one_name_each
from finetune.models.loading import one_process_config
from finetune.processes.groups import Group, ProcessGroups
from finetune.processes.joint_steps import fail_on_all_ranks
from finetune.storage.dtypes import array_dtype, dtype_name, num_bytes
from finetune.storage.rank_files import MODEL_STEM, shard_name
from finetune.storage.splits import Split
from finetune.storage.writer import TensorWriter, file_names, plan_files, write_index

MODEL_FILES = "model"
_MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class LocalTensor:
    """A tensor as this rank holds it.

    Attributes:
        shape: Of this tensor-parallel rank's part.
        dtype: Paddle's name of its type.
        read: Gives it; may communicate within the sharding group.
        split: How it is divided over tensor-parallel ranks; None when all hold it whole.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any]
    split: Split | None = None


def family_of(config: Any) -> Family:
    """The family of a PaddleNLP config object."""
    return find_family(config.to_dict())


def find_local_split(name: str, config: Any, family: Family | None = None) -> Split | None:
    """How a parameter, or optimizer state called `<parameter>/<accumulator>`, is divided in a model.

    Args:
        name: The tensor.
        config: The model's PaddleNLP config, with its tensor-parallel degree.
        family: Its family, where it is known.
    """
    degree = config.tensor_parallel_degree
    return find_split(family or family_of(config), name, config, degree=degree) if degree > 1 else None


def model_weights(model: Any) -> dict[str, LocalTensor]:
    """All weights of a model, or of a stage, that a checkpoint holds; tied ones once, as the embedding.

    An output layer that PaddleNLP's files hold even then is written, too: PaddleNLP would start it at random.
    """
    family = family_of(model.config)
    ignored = set(model._keys_to_ignore_on_save or ())
    whole = {name: each for name, each in model.state_dict().items() if name not in ignored}
    copied = family.hugging_face.own_head
    state = one_name_each(whole) | ({copied: whole[copied]} if copied in whole else {})
    return {name: local_tensor(name, state[name], model.config, family) for name in sorted(state)}


def local_tensor(name: str, tensor: Any, config: Any, family: Family | None = None) -> LocalTensor:
    """A tensor of the model as it stands."""
    return LocalTensor(
        tuple(tensor.shape), dtype_name(tensor.dtype), lambda: tensor, find_local_split(name, config, family)
    )


def save_model_weights(
    model: Any,
    folder: Path,
    groups: ProcessGroups,
    *,
    unified: bool = True,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    whole: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Writes weights and configuration as PaddleNLP's `save_pretrained` writes them.

    Args:
        model: A model or a stage of one, without adapter.
        folder: Where to write; the same on all ranks.
        groups: All ranks call this.
        unified: Whether the files are those of one process, safetensors; otherwise every rank writes its own part,
            `model_state.tpXX_ppYY.pdparams`.
        max_shard_bytes: Size of a safetensors file beyond which the next is begun.
        whole: Makes the parameters whole while they are read, for sharding stage 3.
    """
    with whole():
        tensors = model_weights(model)
        if unified:
            save_tensors_of_all(tensors, folder, groups, stem=MODEL_FILES, max_bytes=max_shard_bytes)
        else:
            save_shards(tensors, folder, groups, stem=MODEL_STEM)
    with fail_on_all_ranks(groups):
        if groups.is_first:
            one_process_config(model).save_pretrained(str(folder))
            if model.can_generate():
                model.generation_config.save_pretrained(str(folder))


def save_shards(
    tensors: Mapping[str, LocalTensor],
    folder: Path,
    groups: ProcessGroups,
    *,
    stem: str,
    ending: str = ".pdparams",
) -> None:
    """Writes what this rank holds as one pickle of arrays, on the first of its replicas.

    Args:
        tensors: By name; every rank of the sharding group must have the same names.
        folder: Where to write.
        groups: All ranks call this.
        stem: First part of the file name.
        ending: Last part.
    """
    import paddle

    takes_part = groups.coordinates.data == 0
    state = {name: tensor.read() for name, tensor in sorted(tensors.items())} if takes_part else {}
    with fail_on_all_ranks(groups):
        if not groups.data.is_first:
            return
        place, layout = groups.coordinates, groups.layout
        name = shard_name(
            stem,
            tensor=place.tensor if layout.tensor > 1 else None,
            pipeline=place.pipeline if layout.pipeline > 1 else None,
            ending=ending,
        )
        paddle.save(state, str(folder / name), protocol=4)


def save_tensors_of_all(
    tensors: Mapping[str, LocalTensor],
    folder: Path,
    groups: ProcessGroups,
    *,
    stem: str,
    max_bytes: int | None = None,
    always_index: bool = False,
    index_facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes the tensors of all ranks, whole, as `<stem>.safetensors` or numbered files with an index.

    Args:
        tensors: What this rank has a part in; the same names on all ranks of a stage.
        folder: Where to write.
        groups: All ranks call this.
        stem: First part of the file names.
        max_bytes: Size of a file beyond which the next is begun.
        always_index: Whether one file, too, is numbered and has an index.
        index_facts: More fields of the index.

    Raises:
        OSError: A file could not be written.
        RuntimeError: Ranks that should have the same tensors do not.
    """
    _check_same(tensors, groups.tensor)
    _check_same(tensors, groups.sharding)
    stages = groups.pipeline.gather_objects(
        {name: _bytes(tensor, groups) for name, tensor in tensors.items()}
    )
    plans = [plan_files(sizes, max_bytes) for sizes in _without_doubles(stages)]
    plan = [names for plan in plans for names in plan]
    numbered = len(plan) > 1 or always_index
    files = list(zip(file_names(stem, len(plan), numbered=numbered), plan, strict=True))
    begin = sum(map(len, plans[: groups.pipeline.position]))
    mine = files[begin : begin + len(plans[groups.pipeline.position])]
    failure: OSError | None = None
    # Of several replicas the first writes; those that share its optimizer state take part in reading.
    for file, names in mine if groups.coordinates.data == 0 else ():
        failure = _write_file(folder / file, {name: tensors[name] for name in names}, groups) or failure
    with fail_on_all_ranks(groups):
        if failure is not None:
            raise failure
        if numbered and groups.is_first:
            sizes = {name: size for stage in stages for name, size in stage.items()}
            total = sum(sizes.values())
            write_index(folder, stem, dict(files), num_bytes=total, facts=index_facts or {})


def _bytes(tensor: LocalTensor, groups: ProcessGroups) -> int:
    return num_bytes(tensor.dtype, _whole_shape(tensor, groups.tensor.size))


def _whole_shape(tensor: LocalTensor, degree: int) -> tuple[int, ...]:
    return tensor.split.whole_shape(tensor.shape, degree) if tensor.split else tensor.shape


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
            shapes = {name: (tensor.dtype, _whole_shape(tensor, degree)) for name, tensor in tensors.items()}
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


def gather_whole(value: Any, tensor: LocalTensor, group: Group) -> np.ndarray | None:
    """The whole tensor on the first rank of a tensor-parallel group, None on the others; bfloat16 as uint16."""
    if group.size == 1 or tensor.split is None:
        return value.numpy() if group.is_first else None
    if not group.is_first:
        if value.size:
            group.send(_as_bytes(value), to=0)
        return None
    import paddle

    whole = np.empty(tensor.split.whole_shape(tensor.shape, group.size), array_dtype(tensor.dtype))
    tensor.split.put(whole, value.numpy(), degree=group.size, rank=0)
    for rank in range(1, group.size):
        if not value.size:
            break
        part = paddle.empty([value.size * value.element_size()], dtype="uint8")
        group.receive(part, source=rank)
        array = part.numpy().view(whole.dtype).reshape(tensor.shape)
        tensor.split.put(whole, array, degree=group.size, rank=rank)
    return whole


def _as_bytes(value: Any) -> Any:
    """A tensor's bytes [n]: a type that every backend sends, and no rounding on the way."""
    return value.detach().contiguous().flatten().view("uint8")
