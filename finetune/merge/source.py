"""What a folder holds that is to be merged: a model or an adapter, whole or in the files of ranks, and its tensors.

Adapters are called `lora_model_state` and `prefix_model_state` by PaddleNLP, `peft_model` by runs of this project;
files of ranks are named as `finetune.storage.rank_files` tells. Every sign that files are not of one run is a fault.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.families.family import Family, find_family
from finetune.families.multimodal.text_part import text_part
from finetune.families.tensor_splits import find_split
from finetune.storage.arrays import StoredArray
from finetune.storage.checkpoints import NOT_ONE_RUN, ShardedCheckpoint, TensorFiles, find_shards, find_start
from finetune.storage.files import read_json_if_present, read_json_or_empty
from finetune.storage.joined_tensors import JoinedTensor
from finetune.storage.rank_files import (
    LORA_STEM,
    MODEL_STEM,
    PREFIX_STEM,
    RankFiles,
    find_rank_files,
    match_rank_files,
)
from finetune.storage.splits import Split

MODEL, LORA, PREFIX, ADAPTER = "model", "lora", "prefix", "adapter"
ADAPTER_INDEX = "peft_model.safetensors.index.json"
_KINDS = {
    MODEL_STEM: MODEL,
    "model": MODEL,
    LORA_STEM: LORA,
    PREFIX_STEM: PREFIX,
    "peft_model": ADAPTER,
}
_NUMBERED = re.compile(
    rf"(?P<stem>{'|'.join(_KINDS)}|pytorch_model)-\d{{5}}-of-(?P<pieces>\d{{5}})(?P<suffix>\.(?:pdparams|safetensors|bin))"
)
_MAX_LISTED = 5
_WHOLE_ADAPTERS = {
    ADAPTER_INDEX: ADAPTER,
    f"{LORA_STEM}.pdparams": LORA,
    f"{PREFIX_STEM}.pdparams": PREFIX,
}
_CONFIGS = ("config.json", "lora_config.json", "prefix_config.json")
_LAYER_NUMBER = re.compile(r"\.(?:layers|h)\.(\d+)\.")
# PaddleNLP's prefix encoder: an embedding, and with `prefix_projection` two linear layers around an activation.
_PREFIX_SPLITS = {"0.weight": Split(0), "1.weight": Split(-1), "1.bias": Split(-1), "3.weight": Split(0)}


@dataclass(frozen=True)
class Source:
    """Where tensors come from and what is known of their model.

    Attributes:
        folder: Holds the files.
        files: The ranks' files.
        kind: MODEL, LORA or PREFIX.
        family: Record of the model; None where nothing is to be joined.
        config: Its configuration as the family adapts it.
    """

    folder: Path
    files: RankFiles
    kind: str
    family: Family | None
    config: Mapping[str, Any]

    def tensors(self, *, checks_replicas: bool = True) -> list[JoinedTensor]:
        """Every tensor, not yet read except for the comparison of what ranks hold twice.

        Args:
            checks_replicas: Whether tensors that several ranks hold must be equal to the last bit.

        Raises:
            UserError: A file is damaged, a layer is missing, or files are of different runs.
        """
        if self.files.is_whole:
            return list(TensorFiles(self.files.files[0, 0]).tensors.values())
        checkpoint = ShardedCheckpoint(self.files, self._find_split)
        for name, first, other in checkpoint.replicas if checks_replicas else ():
            _check_equal(name, first, other)
        if self.kind == MODEL:
            self._check_layers(checkpoint)
        return list(checkpoint.tensors.values())

    def _find_split(self, name: str) -> Split | None:
        if self.files.tensor_degree == 1:
            return None
        if self.kind == PREFIX:
            return _PREFIX_SPLITS.get(name)
        assert self.family is not None
        return find_split(self.family, name, self.config, degree=self.files.tensor_degree)

    def _check_layers(self, checkpoint: TensorFiles) -> None:
        """Says when the last stages are missing, which no file name tells."""
        assert self.family is not None
        num_layers = self.config.get(self.family.fields.num_layers)
        found = {int(match[1]) for name in checkpoint.tensors if (match := _LAYER_NUMBER.search(name))}
        if not num_layers or not found or found == set(range(int(num_layers))):
            return
        missing = sorted(set(range(int(num_layers))) - found)
        if not missing:
            raise UserError(
                f"{self.folder} holds layer {max(found)}, but its config.json tells of {num_layers} layers: "
                f"{NOT_ONE_RUN}"
            )
        shown = ", ".join(map(str, missing[:8]))
        raise UserError(
            f"{self.folder} lacks layers {shown} of {num_layers}: the files of a pipeline stage are missing. Copy "
            "them there"
        )


def open_source(folder: Path, *, prefers_whole: bool = False) -> Source:
    """Finds out what a folder holds: whose files, what model.

    Args:
        folder: Holds the files.
        prefers_whole: Whether files of ranks are passed over where the same weights are there in one piece, as
            PaddleNLP's merge leaves both.

    Raises:
        UserError: It holds no weights, or it is not clear which count; files of ranks are missing, or the
            configuration that tells how to join them.
    """
    kind, files = _find_files(folder, prefers_whole=prefers_whole)
    if kind == ADAPTER:
        kind = _adapter_kind(folder)
    if files.is_whole:
        return Source(folder, files, kind, None, {})
    _check_degree(folder, files)
    return Source(folder, files, kind, *_find_model(folder))


def locate_base(name: str, folder: Path) -> Path:
    """The folder of a base whose name may be relative to where the run was started.

    Args:
        name: As an adapter's configuration has it.
        folder: Of the adapter. Runs save below the folder they were started in, so its parents are tried, too.

    Returns:
        The first place with a configuration; the name as it is when there is none.
    """
    here = folder.resolve()
    places = (Path(name), *(parent / name for parent in (here, *here.parents)))
    return next((place for place in places if (place / "config.json").is_file()), Path(name))


def _find_files(folder: Path, *, prefers_whole: bool) -> tuple[str, RankFiles]:
    ranked = [
        (stem, ending)
        for stem in _KINDS
        for ending in (".pdparams", ".safetensors")
        if match_rank_files(folder, stem, ending)
    ]
    whole = [(folder / name, kind) for name, kind in _WHOLE_ADAPTERS.items() if (folder / name).is_file()]
    if start := find_start(folder):
        whole.append((start, MODEL))
    if prefers_whole and len(whole) == 1:
        ranked = [(stem, ending) for stem, ending in ranked if _KINDS[stem] != whole[0][1]]
    names = [f"{stem}.<rank>{ending}" for stem, ending in ranked] + [path.name for path, _ in whole]
    if len(names) > 1:
        raise UserError(
            f"{folder} holds {' and '.join(names)}: it is not clear which are to be merged. Move the others away"
        )
    if whole:
        path, kind = whole[0]
        return kind, RankFiles({(0, 0): tuple(find_shards(path))})
    files = find_rank_files(folder, *ranked[0]) if ranked else None
    if files is None:
        raise UserError(_incomplete(folder) or _no_weights(folder))
    return _KINDS[ranked[0][0]], files


def _adapter_kind(folder: Path) -> str:
    """LORA or PREFIX for an adapter whose file names do not tell."""
    kind = read_json_or_empty(folder / ADAPTER_INDEX).get("type")
    is_prefix = kind == "ptuning" or (kind is None and (folder / "prefix_config.json").is_file())
    return PREFIX if is_prefix else LORA


def _incomplete(folder: Path) -> str | None:
    """What is there and what is missing of a numbered set whose index, or more, was not copied."""
    here = sorted(path.name for path in folder.iterdir() if _NUMBERED.fullmatch(path.name))
    if not here:
        return None
    match = _NUMBERED.fullmatch(here[0])
    assert match is not None
    stem, pieces, suffix = match["stem"], match["pieces"], match["suffix"]
    whole = [f"{stem}-{number:05d}-of-{pieces}{suffix}" for number in range(1, int(pieces) + 1)]
    missing = [name for name in (*whole, f"{stem}{suffix}.index.json") if not (folder / name).is_file()]
    return (
        f"{folder} holds a part of its weights: {_listed([name for name in whole if name in here])} here, "
        f"{_listed(missing)} not. Copy the whole set there"
    )


def _listed(names: list[str]) -> str:
    """Names and their verb; the last one is kept, which may be the index."""
    if len(names) > _MAX_LISTED:
        left_out = len(names) - _MAX_LISTED
        names = [*names[: _MAX_LISTED - 1], f"{left_out} more", names[-1]]
    return f"{', '.join(names[:-1])} and {names[-1]} are" if len(names) > 1 else f"{names[0]} is"


def _no_weights(folder: Path) -> str:
    inside = sorted(
        (path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()),
        key=lambda path: int(path.name[11:]),
    )
    cure = (
        f"Its newest checkpoint is {inside[-1]}"
        if inside
        else "Give the folder that a run saved its weights in"
    )
    return f"{folder} holds no weights, neither of ranks (model_state.tp00.pdparams) nor whole ones. {cure}"


def _find_model(folder: Path) -> tuple[Family, dict[str, Any]]:
    """The family and its configuration, from the folder or from the base that an adapter names."""
    config, *adapters = (read_json_if_present(folder / name) for name in _CONFIGS)
    base = next((adapter.get("base_model_name_or_path") for adapter in adapters if adapter), None)
    place = folder
    if not config and base:
        place = locate_base(str(base), folder)
        config = read_json_if_present(place / "config.json")
    if not config:
        raise UserError(
            f"{folder} has no config.json, which tells how ranks divide tensors: copy the model's there"
        )
    text = text_part(config)
    family = find_family(text, place)
    return family, family.adapt_config(text)


def _check_degree(folder: Path, files: RankFiles) -> None:
    """Compares the degree in the names with the one on record: the last ranks' files may be missing."""
    for name in _CONFIGS:
        recorded = read_json_if_present(folder / name).get("tensor_parallel_degree")
        if isinstance(recorded, int) and recorded > 1 and recorded != files.tensor_degree:
            raise UserError(
                f"{folder} holds files of {files.tensor_degree} tensor-parallel ranks, but {name} tells of "
                f"{recorded}: copy the files of all ranks from the same checkpoint"
            )


def _check_equal(name: str, first: StoredArray, other: StoredArray) -> None:
    """Compares what must be the same; a difference means another step, or ranks that drifted apart."""
    for ours, theirs in zip(first.blocks(), other.blocks(), strict=True):
        if not np.array_equal(ours, theirs):
            raise UserError(
                f"{other.path}: {name}, which every rank holds whole, differs from that in {first.path.name}: "
                f"{NOT_ONE_RUN}. If they are, and rounding drove the ranks apart, add --differing_replicas first"
            )
