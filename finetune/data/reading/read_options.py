"""How files are read: what a person says about them, and what a registry of data sets says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TEXT_DOCUMENTS = ("line", "paragraph", "file")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files are read.

    Attributes:
        dataset_format: A key of `finetune.data.reading.formats.FORMATS`; None recognises it.
        recognised_format: The same as the first examples of the file show it; others of the file may have another.
        preference: "chosen" reads the chosen answer of preference pairs; None refuses such files.
        comparison: "pairs" or "marked", what a preference method compares (`finetune.data.reading.comparisons`); None
            for supervised training.
        columns: Names of fields here, and the names that the files have for them.
        tags: What the files call parts of a message, by LLaMA-Factory's names (``role_tag``, ``user_tag``, ...).
        encoding: The files' encoding, by Python's name.
        text_document: What one document of a .txt file is, one of `TEXT_DOCUMENTS`.
    """

    dataset_format: str | None = None
    recognised_format: str | None = None
    preference: str | None = None
    comparison: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"
    text_document: str = "line"


DEFAULT_OPTIONS = ReadOptions()
