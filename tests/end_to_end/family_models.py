"""The tiny models of all families that runs through the entry script start from."""

from __future__ import annotations

from tests.families.cases import CASES

TINY = {"vocab_size": 330, "num_layers": 2, "hidden_size": 32, "max_length": 256}
OPTIONS = {row.name: row.options for row in CASES}
"""Of a family with two rows those of the last one: keys and values in fewer heads."""
