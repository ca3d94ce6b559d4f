"""Adapters that were trained over a quantised base: what they are merged into.

The original weights lose nothing to quantisation, but are not what the adapter was trained over; the dequantised
weights are, and carry its rounding. `--verify` measures the merged model against both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.errors import UserError
from finetune.storage.quantisation.record import read_scheme
from finetune.storage.quantisation.scheme import QuantisationScheme
from finetune.storage.quantisation.stored_format import StoredFormat

ORIGINAL, DEQUANTISED = "original", "dequantised"


def trained_scheme(folders: Sequence[Path]) -> QuantisationScheme | None:
    """How the base of adapters was quantised when they were trained; None where it was not, or not alike.

    Raises:
        UserError: A record cannot be read.
    """
    schemes = {read_scheme(folder) for folder in folders}
    return schemes.pop() if len(schemes) == 1 else None


def scheme_to_apply(
    folders: Sequence[Path], into: str, stored: StoredFormat | None = None, *, unmerge: bool
) -> QuantisationScheme | None:
    """How the base is quantised, and dequantised again, before adapters are added; None: not at all.

    Args:
        folders: Of the adapters.
        into: ORIGINAL or DEQUANTISED.
        stored: How the files of the base are quantised; None where they are not.
        unmerge: Whether the adapters are taken out instead.

    Raises:
        UserError: The base cannot be dequantised, because it was not quantised, or not alike; or it has no original
            weights.
    """
    if stored:
        _check_stored(folders, into, stored)
        return None
    if into == ORIGINAL:
        return None
    if unmerge:
        raise UserError("--into dequantised merges, and --unmerge does the opposite: leave one of them out")
    scheme = trained_scheme(folders)
    if scheme is None:
        listed = ", ".join(str(folder) for folder in folders)
        raise UserError(
            f"--into dequantised needs adapters that were trained over one quantised base, and {listed} "
            f"{'name' if len(folders) > 1 else 'names'} none in common: leave --into out to merge into the "
            "original weights"
        )
    return scheme


def _check_stored(folders: Sequence[Path], into: str, stored: StoredFormat) -> None:
    if scheme := next(filter(None, map(read_scheme, folders)), None):
        raise UserError(
            f"the base is quantised ({stored.label}), and an adapter was trained over another one in {scheme.label}: give "
            "the model that it was trained on with --model_name_or_path"
        )
    if into == ORIGINAL:
        raise UserError(
            f"the base is quantised ({stored.label}) and cannot take an adapter up as it is: add --into dequantised for "
            f"a model of ordinary weights ({stored.dtype}), or give the model that it was quantised from with "
            "--model_name_or_path"
        )


def describe_choice(
    folders: Sequence[Path], scheme: QuantisationScheme | None, stored: StoredFormat | None = None
) -> str | None:
    """A line for a person about what was merged into; None where the base was not quantised."""
    if stored:
        return f"note: merged into the values of the packed weights ({stored.label}), as ordinary weights"
    trained = trained_scheme(folders)
    if trained is None:
        return None
    if scheme is None:
        return (
            f"note: trained over a base in {trained.label}, merged into the original weights "
            "(--into dequantised takes what it was trained over)"
        )
    return f"note: merged into the values of the base in {trained.label}, over which it was trained"
