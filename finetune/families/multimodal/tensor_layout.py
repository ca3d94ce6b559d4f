"""Names of the tensors of a multimodal folder: which of them are the text part's, and how that calls them by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorLayout:
    """How a folder calls its tensors.

    Attributes:
        outer: First part of the names of the text part's tensors; with it a layout is recognised.
        inner: What stands in its place in a folder of the text part alone.
        beside: Regular expression of the text part's tensors that have no such first part.
        others: The same of tensors that are not the text part's although they have it.
    """

    outer: str
    inner: str = ""
    beside: str = ""
    others: str = ""

    def text_name(self, name: str) -> str | None:
        """The name in a folder of the text part alone; None for a tensor of another part.

        Args:
            name: Of a tensor of the folder.
        """
        if self.others and re.match(self.others, name):
            return None
        if name.startswith(self.outer):
            return self.inner + name.removeprefix(self.outer)
        return name if self.beside and re.match(self.beside, name) else None

    def folder_name(self, text_name: str) -> str:
        """The folder's name of a tensor of the text part."""
        has_outer = text_name.startswith(self.inner) and not (
            self.beside and re.match(self.beside, text_name)
        )
        return self.outer + text_name.removeprefix(self.inner) if has_outer else text_name


_OUTPUT = r"lm_head\."
WRAPPED = (
    TensorLayout("model.language_model.", "model.", beside=_OUTPUT),
    TensorLayout("model.text_model.", "model.", beside=_OUTPUT),
    TensorLayout("language_model."),
)
"""Layouts in which the text part has a name of its own."""


def find_layout(names: Iterable[str], flat: TensorLayout | None) -> TensorLayout | None:
    """The layout of a folder.

    Args:
        names: Of all of its tensors.
        flat: The layout of folders of its kind in which the text part has no name of its own.
    """
    names = list(names)
    for layout in WRAPPED:
        if any(name.startswith(layout.outer) for name in names):
            return layout
    return flat


def without_wrapper(name: str) -> str:
    """The name of a layer or tensor in a folder of the text part alone, whatever layout it is of."""
    for layout in WRAPPED:
        if name.startswith(layout.outer):
            return layout.inner + name.removeprefix(layout.outer)
    return name
