"""The Python files of a published folder, which transformers runs for a model or a tokenizer that it has no code of.

`auto_map` in config.json and tokenizer_config.json names them, as "modeling_qwen.QWenLMHeadModel"; they import others
of the folder (`from .qwen_generation_utils import ...`). Nothing here runs them: they are copied with what names them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.storage.files import read_json_or_empty, write_json

AUTO_MAP = "auto_map"
CODE_SETTINGS = ("config.json", "tokenizer_config.json")
"""Files that may name code."""
_RELATIVE = re.compile(r"^[ \t]*from[ \t]+\.(\w*)[ \t]+import[ \t]+\(?([^()\n#]*)", re.MULTILINE)
# Code that transformers fetches from a repository on the hub: "owner/name--module.Class".
_ELSEWHERE = "--"


def find_code(folder: Path, *settings: str) -> list[Path]:
    """The code of a folder that its settings name, and what that imports; files that are not there are left out.

    Args:
        folder: Of a model or a tokenizer.
        settings: Names of the files that name code; all of `CODE_SETTINGS` by default.
    """
    waiting = [
        module
        for name in settings or CODE_SETTINGS
        for reference in _references(read_json_or_empty(folder / name).get(AUTO_MAP))
        if (module := _module(reference))
    ]
    found: dict[str, Path] = {}
    while waiting:
        path = folder / f"{waiting.pop()}.py"
        if path.name not in found and path.is_file():
            found[path.name] = path
            waiting += _imported(path.read_text(encoding="utf-8", errors="replace"))
    return [found[name] for name in sorted(found)]


def copy_code(source: Path, target: Path, *settings: str) -> None:
    """Copies what `find_code` finds, in place of files of the same names."""
    if source.resolve() == target.resolve():
        return
    for path in find_code(source, *settings):
        shutil.copyfile(path, target / path.name)


def keep_code(source: Path, target: Path, settings: str) -> None:
    """Copies the code of a folder, and names it in the settings of another as those there do.

    Args:
        source: Folder that has the code, if any.
        target: Folder with settings of the same model or tokenizer.
        settings: Name of the file of settings.
    """
    copy_code(source, target, settings)
    named, content = (read_json_or_empty(folder / settings).get(AUTO_MAP) for folder in (source, target))
    if named and named != content:
        write_json(target / settings, read_json_or_empty(target / settings) | {AUTO_MAP: named})


def with_present_code(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings that name no code but what is in the folder, or elsewhere on a hub.

    transformers refuses a folder whose `auto_map` names a file that is missing.
    """
    content = dict(settings)
    named = content.get(AUTO_MAP)
    if not isinstance(named, Mapping):
        return content
    present = {
        name: value
        for name, value in named.items()
        if all(_is_present(reference, folder) for reference in _references({name: value}))
    }
    if present:
        content[AUTO_MAP] = present
    else:
        del content[AUTO_MAP]
    return content


def _references(named: Any) -> Iterator[str]:
    """Every "module.Class" of an `auto_map`; a tokenizer has two, or null in the place of one."""
    for value in named.values() if isinstance(named, Mapping) else ():
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str):
                yield reference


def _module(reference: str) -> str | None:
    """The file in the folder that a reference names, without its ending; None for one elsewhere."""
    module = reference.rpartition(".")[0]
    return None if _ELSEWHERE in reference or not re.fullmatch(r"\w+", module) else module


def _is_present(reference: str, folder: Path) -> bool:
    if _ELSEWHERE in reference:
        return True
    module = _module(reference)
    return module is not None and (folder / f"{module}.py").is_file()


def _imported(code: str) -> list[str]:
    """Modules of the same folder that a file imports."""
    found = []
    for module, names in _RELATIVE.findall(code):
        found += [module] if module else re.findall(r"\w+", names.split(" as ")[0])
    return found
