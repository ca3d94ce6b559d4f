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

ORIGINAL, DEQUANTISED = "original", "dequantised"


def trained_scheme(folders: Sequence[Path]) -> QuantisationScheme | None:
    """How the base of adapters was quantised when they were trained; None where it was not, or not alike.

    Raises:
        UserError: A record cannot be read.
    """
    schemes = {read_scheme(folder) for folder in folders}
    return schemes.pop() if len(schemes) == 1 else None


def scheme_to_apply(folders: Sequence[Path], into: str, *, unmerge: bool) -> QuantisationScheme | None:
    """How the base is quantised, and dequantised again, before adapters are added; None: not at all.

    Args:
        folders: Of the adapters.
        into: ORIGINAL or DEQUANTISED.
        unmerge: Whether the adapters are taken out instead.

    Raises:
        UserError: The base cannot be dequantised, because it was not quantised, or not alike.
    """
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


def describe_choice(folders: Sequence[Path], scheme: QuantisationScheme | None) -> str | None:
    """A line for a person about what was merged into; None where the base was not quantised."""
    trained = trained_scheme(folders)
    if trained is None:
        return None
    if scheme is None:
        return (
            f"note: trained over a base in {trained.label}, merged into the original weights "
            "(--into dequantised takes what it was trained over)"
        )
    return f"note: merged into the values of the base in {trained.label}, over which it was trained"
