"""What an exported folder holds besides the graph: the facts that running it needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.storage.files import read_json_object, write_json

PROGRAM_FILE = "model.json"
WEIGHTS_FILE = "model.pdiparams"
FACTS_FILE = "static_decoder.json"
PREFIX_FILE = "prefix_cache.npy"
FORMAT = 1
"""Changes with the inputs of the graph."""


@dataclass(frozen=True, kw_only=True)
class ExportedFacts:
    """Facts about an exported decoder.

    Attributes:
        family: Name of the model's family.
        dtype: Type of weights and cache: "float32", "float16" or "bfloat16".
        head_dim: Size of a head.
        max_positions: Most tokens of prompt and answer, None without a limit.
        stop_ids: Tokens that end an answer.
        pad_token_id: Fills finished rows.
        num_prefix_tokens: Length of the trained prefix in `PREFIX_FILE`, 0 without one.
        context_marks: Ids of the tokens that end a context, of which the graph wants the places; see
            `finetune.families.context_marks`. Empty for most models.
        format: Version of the graph's inputs.
    """

    family: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int | None
    stop_ids: tuple[int, ...]
    pad_token_id: int
    num_prefix_tokens: int = 0
    context_marks: tuple[int, ...] = ()
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Writes the facts into a folder."""
        write_json(folder / FACTS_FILE, asdict(self))


def is_exported(folder: Path) -> bool:
    """Whether a folder looks like an export."""
    return (folder / FACTS_FILE).is_file()


def read_facts(folder: Path) -> ExportedFacts:
    """The facts of an exported folder.

    Raises:
        UserError: No such folder, files missing, or another version's export.
    """
    remedy = "export the model with export_model.py"
    missing = [name for name in (FACTS_FILE, PROGRAM_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is no exported model: it has no {', no '.join(missing)}; {remedy}")
    path = folder / FACTS_FILE
    fields = read_json_object(path, remedy=f"{remedy} again")
    try:
        if fields.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {fields.get('format')}, this version runs {FORMAT}: {remedy} again"
            )
        marks = tuple(fields.get("context_marks", ()))
        return ExportedFacts(**fields | {"stop_ids": tuple(fields["stop_ids"]), "context_marks": marks})
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy} again") from None


def read_prefix(folder: Path, facts: ExportedFacts) -> NDArray[Any] | None:
    """Keys and values of the trained prefix, [2 x layers, kv heads, prefix, head dim]; None without one.

    Raises:
        UserError: The file is missing or of another shape.
    """
    if not facts.num_prefix_tokens:
        return None
    shape = (2 * facts.num_layers, facts.num_kv_heads, facts.num_prefix_tokens, facts.head_dim)
    path = folder / PREFIX_FILE
    try:
        prefix: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): export the model again") from None
    if prefix.shape != shape:
        raise UserError(f"{path} has shape {prefix.shape}, expected {shape}: export the model again")
    return prefix
