"""Which files of a folder hold a model's or an adapter's tensors, and what lies where in them.

PaddleNLP names the files of one rank `model_state.tp00.pdparams`, `.pp00`, `.tp00_pp00`; adapters are called
`lora_model_state` and `prefix_model_state`, safetensors `model` and `peft_model`, and a file that was too large is
numbered (`model_state.tp00-00001-of-00002.pdparams`). The degrees are read off these names.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.errors import UserError
from finetune.merge.shards import StoredArray
from finetune.models import weights
from finetune.models.pickled_arrays import read_pdparams
from finetune.models.shard_files import LORA_STEM, MODEL_STEM, PREFIX_STEM, shard_name

MODEL, LORA, PREFIX, ADAPTER = "model", "lora", "prefix", "adapter"
ADAPTER_INDEX = "peft_model.safetensors.index.json"
_KINDS = {
    MODEL_STEM: MODEL,
    "model": MODEL,
    LORA_STEM: LORA,
    PREFIX_STEM: PREFIX,
    "peft_model": ADAPTER,
}
_RANK_FILE = re.compile(
    rf"(?P<stem>{'|'.join(_KINDS)})"
    r"\.(?P<ranks>[a-z]+\d+(?:_[a-z]+\d+)*)(?:-(?P<piece>\d{5})-of-(?P<pieces>\d{5}))?\.(?:pdparams|safetensors)"
)
_NUMBERED = re.compile(
    rf"(?P<stem>{'|'.join(_KINDS)}|pytorch_model)-\d{{5}}-of-(?P<pieces>\d{{5}})(?P<suffix>\.(?:pdparams|safetensors|bin))"
)
_MAX_LISTED = 5
_RANKS = re.compile(r"(?:tp(?P<tensor>\d+))?_?(?:pp(?P<pipeline>\d+))?")
_WHOLE_ADAPTERS = {
    ADAPTER_INDEX: ADAPTER,
    f"{LORA_STEM}.pdparams": LORA,
    f"{PREFIX_STEM}.pdparams": PREFIX,
}

Rank = tuple[int, int]
"""Tensor-parallel rank and pipeline stage."""


@dataclass(frozen=True)
class RankFiles:
    """The files of every rank.

    Attributes:
        kind: MODEL, LORA, PREFIX, or ADAPTER for one whose kind its index or configuration tells.
        files: Of every rank; (0, 0) alone for a checkpoint that is whole.
        tensor_degree: Number of tensor-parallel ranks.
        pipeline_degree: Number of pipeline stages.
    """

    kind: str
    files: dict[Rank, tuple[Path, ...]]
    tensor_degree: int = 1
    pipeline_degree: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing to join."""
        return self.tensor_degree == self.pipeline_degree == 1


def find_rank_files(folder: Path) -> RankFiles:
    """Finds the weights in a folder.

    Raises:
        UserError: There are none, some are missing, or it is not clear which of them count.
    """
    found: dict[tuple[str, str], dict[str, list[re.Match[str]]]] = {}
    for path in sorted(folder.iterdir()):
        if match := _RANK_FILE.fullmatch(path.name):
            kind = (match["stem"], path.suffix)
            found.setdefault(kind, {}).setdefault(match["ranks"], []).append(match)
    whole = _find_whole(folder)
    names = [f"{stem}.<rank>{suffix}" for stem, suffix in found] + [path for path, _ in whole]
    if len(names) > 1:
        raise UserError(
            f"{folder} holds {' and '.join(names)}: it is not clear which are to be merged. Move the others away"
        )
    if not names:
        raise UserError(_no_weights(folder))
    if whole:
        return RankFiles(
            whole[0][1], {(0, 0): tuple(folder / name for name in _whole_files(folder, *whole[0]))}
        )
    (stem, suffix), by_rank = next(iter(found.items()))
    return _ranked(folder, (stem, suffix), by_rank)


def read_arrays(paths: tuple[Path, ...]) -> dict[str, StoredArray]:
    """All tensors of some files by name, not yet read.

    Raises:
        UserError: A file is damaged, or two hold the same name.
    """
    arrays: dict[str, StoredArray] = {}
    for path in paths:
        content = _read_file(path)
        doubled = sorted(arrays.keys() & content.keys())
        if doubled:
            raise UserError(
                f"{path} holds {doubled[0]}, which {arrays[doubled[0]].path.name} holds too: one of them is of another run"
            )
        arrays |= content
    return arrays


def _read_file(path: Path) -> dict[str, StoredArray]:
    if path.suffix == ".pdparams":
        return {name: StoredArray(path, array.read()) for name, array in read_pdparams(path).items()}
    if path.suffix == ".bin":
        return {
            name: StoredArray(path, tensor.read()) for name, tensor in weights.read_torch_file(path).items()
        }
    file = weights.read_header(path)
    arrays = {}
    for name, (dtype, shape, begin, end) in file.tensors.items():
        if begin == end:
            array = np.empty(shape, dtype)
        else:
            array = np.memmap(path, dtype=dtype, mode="r", offset=file.data_start + begin, shape=shape)
        arrays[name] = StoredArray(path, array)
    return arrays


def _find_whole(folder: Path) -> list[tuple[str, str]]:
    names = [(name, kind) for name, kind in _WHOLE_ADAPTERS.items() if (folder / name).is_file()]
    start = next((name for name in weights.WEIGHT_FILES if (folder / name).is_file()), None)
    return names + ([(start, MODEL)] if start else [])


def _whole_files(folder: Path, start: str, kind: str) -> list[str]:
    if kind == MODEL:
        weights.check_weights(folder)
    names = weights.shard_names(folder / start)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder / start} names {missing[0]}, which is not in the folder: copy it there")
    return names


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
    verb = "are" if len(names) > 1 else "is"
    return f"{', '.join(names[:-1])} and {names[-1]} {verb}" if len(names) > 1 else f"{names[0]} {verb}"


def _no_weights(folder: Path) -> str:
    if told := _incomplete(folder):
        return told
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


def _ranked(folder: Path, kind: tuple[str, str], by_rank: dict[str, list[re.Match[str]]]) -> RankFiles:
    stem, suffix = kind
    ranks: dict[Rank, str] = {}
    marks = set()
    for text in by_rank:
        match = _RANKS.fullmatch(text)
        if match is None:
            raise UserError(
                f"{folder / by_rank[text][0].string} is named after {text}; only tensor-parallel (tp) and pipeline (pp) ranks "
                "can be merged: save the model without sharding its weights"
            )
        marks.add((match["tensor"] is not None, match["pipeline"] is not None))
        ranks[int(match["tensor"] or 0), int(match["pipeline"] or 0)] = text
    if len(marks) > 1 or len(ranks) < len(by_rank):
        raise UserError(
            f"{folder} holds files of runs with different layouts ({', '.join(sorted(by_rank))}): move those of "
            "the other run away"
        )
    tensor_degree = 1 + max(tensor for tensor, _ in ranks)
    pipeline_degree = 1 + max(pipeline for _, pipeline in ranks)
    has_tensor, has_pipeline = marks.pop()
    missing = [
        shard_name(
            stem, tensor=t if has_tensor else None, pipeline=p if has_pipeline else None, ending=suffix
        )
        for t in range(tensor_degree)
        for p in range(pipeline_degree)
        if (t, p) not in ranks
    ]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing[:5])}: the other names tell of {tensor_degree} tensor-parallel "
            f"ranks and {pipeline_degree} pipeline stages. Copy the missing files there"
        )
    files = {rank: _pieces(folder, by_rank[text]) for rank, text in ranks.items()}
    return RankFiles(_KINDS[stem], dict(sorted(files.items())), tensor_degree, pipeline_degree)


def _pieces(folder: Path, matches: list[re.Match[str]]) -> tuple[Path, ...]:
    """The files of one rank, which may be one or numbered."""
    promised = {int(match["pieces"] or 1) for match in matches}
    numbers = sorted(int(match["piece"] or 1) for match in matches)
    if len(promised) > 1 or numbers != list(range(1, promised.pop() + 1)):
        names = ", ".join(match.string for match in matches)
        raise UserError(
            f"{folder} has {names}, but the numbers in these names promise other files: copy the whole set again"
        )
    return tuple(folder / match.string for match in matches)


def adapter_kind(folder: Path, files: RankFiles) -> str:
    """LORA or PREFIX for an adapter whose file names do not tell."""
    index = folder / ADAPTER_INDEX
    if files.kind != ADAPTER:
        return files.kind
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("type")
    except (OSError, ValueError, AttributeError):
        kind = None
    is_prefix = kind == "ptuning" or (kind is None and (folder / "prefix_config.json").is_file())
    return PREFIX if is_prefix else LORA
