"""Files that come with the project: argument files and sample data, in a checkout and in an installed wheel.

In a checkout they stand beside `finetune/`, where users look for them. The build of a wheel copies them into
`finetune/shipped/` (tools/wheel_files.py), in the same folders.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "shipped"
_ENDING = "_argument.json"


def shipped_folder() -> Path:
    """The folder that the names below count from."""
    return _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent


def shipped_arguments() -> dict[str, Path]:
    """The argument files by short name, such as "llama/lora" for llama/lora_argument.json."""
    folder = shipped_folder()
    return {
        f"{path.parent.name}/{path.name.removesuffix(_ENDING)}": path
        for path in sorted(folder.glob(f"*/*{_ENDING}"))
    }


def sample_data() -> Path:
    """The folder with the sample data, `train.json` and `dev.json`."""
    return shipped_folder() / "data"
