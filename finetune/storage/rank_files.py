"""Files of tensor- and pipeline-parallel ranks: their names, and which of them a folder holds.

    model_state.pdparams                       one process
    model_state.tp00.pdparams ...              tensor parallelism
    model_state.pp00.pdparams ...              pipeline parallelism
    model_state.tp00_pp00.pdparams ...         both
    model_state.tp00-00001-of-00002.pdparams   PaddleNLP numbers the files of a rank that would be too large

The degrees are read off the names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError

MODEL_STEM = "model_state"
LORA_STEM = "lora_model_state"
PREFIX_STEM = "prefix_model_state"
_RANKS = re.compile(r"(?:tp(?P<tensor>\d+))?_?(?:pp(?P<pipeline>\d+))?")

Rank = tuple[int, int]
"""Tensor-parallel rank and pipeline stage."""


@dataclass(frozen=True)
class RankFiles:
    """The files of every rank; (0, 0) alone for what is whole."""

    files: dict[Rank, tuple[Path, ...]]

    @property
    def tensor_degree(self) -> int:
        """Number of tensor-parallel ranks."""
        return 1 + max(tensor for tensor, _ in self.files)

    @property
    def pipeline_degree(self) -> int:
        """Number of pipeline stages."""
        return 1 + max(pipeline for _, pipeline in self.files)

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing to join."""
        return len(self.files) == 1

    @property
    def first(self) -> Path:
        """The first file, for messages."""
        return self.files[0, 0][0]


def shard_name(stem: str, *, tensor: int | None, pipeline: int | None, ending: str = ".pdparams") -> str:
    """File name of a rank's shard; None for an axis of degree 1."""
    places = ("tp", tensor), ("pp", pipeline)
    suffix = "_".join(f"{axis}{place:02d}" for axis, place in places if place is not None)
    return f"{stem}.{suffix}{ending}" if suffix else f"{stem}{ending}"


def match_rank_files(folder: Path, stem: str, ending: str = ".pdparams") -> list[re.Match[str]]:
    """The names in a folder that some rank's file has."""
    pattern = re.compile(
        rf"{re.escape(stem)}\.(?P<ranks>[a-z]+\d+(?:_[a-z]+\d+)*)"
        rf"(?:-(?P<piece>\d{{5}})-of-(?P<pieces>\d{{5}}))?{re.escape(ending)}"
    )
    matches = (pattern.fullmatch(path.name) for path in sorted(folder.glob(f"{stem}.*")))
    return [match for match in matches if match]


def find_rank_files(folder: Path, stem: str, ending: str = ".pdparams") -> RankFiles | None:
    """The files of all ranks, or the one without ranks in its name where there is no other; None without any.

    Raises:
        UserError: Files are missing, or are of runs with different layouts.
    """
    by_rank: dict[str, list[re.Match[str]]] = {}
    for match in match_rank_files(folder, stem, ending):
        by_rank.setdefault(match["ranks"], []).append(match)
    if not by_rank:
        whole = folder / f"{stem}{ending}"
        return RankFiles({(0, 0): (whole,)}) if whole.is_file() else None
    ranks: dict[Rank, str] = {}
    axes = set()
    for text, matches in by_rank.items():
        place = _RANKS.fullmatch(text)
        if place is None:
            raise UserError(
                f"{folder / matches[0].string} is named after {text}; only tensor-parallel (tp) and pipeline (pp) "
                "ranks can be merged: save the model without sharding its weights"
            )
        axes.add((place["tensor"] is not None, place["pipeline"] is not None))
        ranks[int(place["tensor"] or 0), int(place["pipeline"] or 0)] = text
    if len(axes) > 1 or len(ranks) < len(by_rank):
        raise UserError(
            f"{folder} holds files of runs with different layouts ({', '.join(sorted(by_rank))}): move those of "
            "the other run away"
        )
    found = RankFiles({rank: _pieces(folder, by_rank[text]) for rank, text in sorted(ranks.items())})
    _check_complete(folder, found, stem, ending, axes.pop())
    return found


def _check_complete(folder: Path, found: RankFiles, stem: str, ending: str, axes: tuple[bool, bool]) -> None:
    missing = [
        shard_name(
            stem, tensor=tensor if axes[0] else None, pipeline=stage if axes[1] else None, ending=ending
        )
        for tensor in range(found.tensor_degree)
        for stage in range(found.pipeline_degree)
        if (tensor, stage) not in found.files
    ]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing[:5])}: the other names tell of {found.tensor_degree} "
            f"tensor-parallel ranks and {found.pipeline_degree} pipeline stages. Copy the missing files there"
        )


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
