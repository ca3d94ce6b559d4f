"""What an adapter's folder says about the base that it was trained on."""

from __future__ import annotations

from pathlib import Path

from finetune.storage.files import read_json_if_present
from finetune.storage.quantisation.scheme import QuantisationScheme, scheme_from_json

FACTS_FILE = "adapter_facts.json"
"""What PaddleNLP's own configuration files have no place for."""
QUANTISATION = "base_quantisation"


def read_scheme(folder: Path) -> QuantisationScheme | None:
    """How the base of the adapter in a folder was quantised; None: it was not, or nothing is known.

    Raises:
        UserError: The record cannot be read.
    """
    path = folder / FACTS_FILE
    fields = read_json_if_present(path).get(QUANTISATION)
    return scheme_from_json(fields, str(path)) if fields else None
