"""From the files of a run to one model: tensors are joined, changed and written one at a time. NumPy only."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    """This package, which `from finetune import merge` gives, called as the function `finetune.merge_lora`."""

    def __call__(self, **options: Any) -> Path:
        """Merges LoRA adapters into their base, as `finetune.merge_lora` says."""
        merged: Path = import_module(__name__.partition(".")[0]).merge_lora(**options)
        return merged


sys.modules[__name__].__class__ = _CallableModule
