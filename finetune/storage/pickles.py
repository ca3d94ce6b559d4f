"""Pickles of tensors, read without running what is in them.

The two kinds of weight file that are pickles, Paddle's and PyTorch's, share the rules here: an unpickler resolves the
few names that a dictionary of arrays needs and refuses every other, so that a folder from a stranger cannot run
code; what it gives for tensors are places in the file (`StoredArray`), whose attributes no pickle can change.
"""

from __future__ import annotations

import collections
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from finetune.errors import UserError

_DAMAGE = (
    EOFError, ValueError, IndexError, TypeError, KeyError, AttributeError, struct.error, NotImplementedError,
    OverflowError, MemoryError, zipfile.BadZipFile,
)  # fmt: skip


class TensorUnpickler(pickle._Unpickler):
    """Resolves ordered dictionaries and what a kind of file adds to them.

    The standard library's unpickler in Python, whose steps can be replaced one by one (`pdparams_files`).

    Args:
        file: Holds the pickle.
        allowed: (module, name) -> what stands for it. Plain containers, strings and bound methods, none of
            which has attributes that a pickle could change.
        remedy: What to do with a file that holds anything else.
    """

    def __init__(self, file: BinaryIO, allowed: Mapping[tuple[str, str], Any], remedy: str):
        super().__init__(file)
        self._allowed = {("collections", "OrderedDict"): collections.OrderedDict, **allowed}
        self._remedy = remedy

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global name of the pickle.

        Raises:
            UnpicklingError: It is none of those allowed.
        """
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        raise pickle.UnpicklingError(
            f"it contains {module}.{name}, which could run code or is unknown here; only tensors are read. "
            f"{self._remedy}"
        )


def load_pickle(path: Path, load: Callable[[], Any]) -> dict[str, Any]:
    """What a file holds by name.

    Args:
        path: The file, for messages.
        load: Reads it through a `TensorUnpickler`.

    Raises:
        UserError: It is damaged, holds anything but a dictionary, or names an object that could run code.
    """
    try:
        content = load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return content
