"""Upload of what a run left to AI Studio, the model hub of PaddlePaddle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.settings.model import ModelArguments

_REPOSITORY_EXISTS = 10003
_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.tiktoken")
_NOT_FOR_OTHERS = ("arguments.json", "all_results.json", "trainer_state.json", "generated_output.json")


def files_to_upload(folder: Path) -> list[Path]:
    """Weights, configuration and tokenizer of a finished run, without its logs and checkpoints."""
    found = {path for pattern in _PATTERNS for path in folder.glob(pattern)}
    return sorted(
        path for path in found if path.name not in _NOT_FOR_OTHERS and not path.name.startswith(".")
    )


def upload(folder: Path, settings: ModelArguments, show_message: Callable[[str], None]) -> None:
    """Creates the repository when there is none and uploads the final files, same names overwritten.

    Args:
        folder: The output folder of a finished run; it stays as it is whatever happens here.
        settings: `aistudio_repo_id`, `aistudio_repo_private`, `aistudio_repo_license`, `aistudio_token`.
        show_message: Shows a line to the person.

    Raises:
        UserError: AI Studio refused, or cannot be reached. The run itself is finished and saved.
    """
    from aistudio_sdk import hub

    # The client takes the token as an argument, or from this variable.
    token = settings.aistudio_token or os.environ.get("AISTUDIO_ACCESS_TOKEN")
    access = {"token": token} if token else {}
    answer = _ask(
        hub.create_repo,
        repo_id=settings.aistudio_repo_id,
        private=settings.aistudio_repo_private,
        license=settings.aistudio_repo_license,
        **access,
    )
    if answer.get("error_code") not in (None, _REPOSITORY_EXISTS):
        raise UserError(_refusal(settings, "the repository cannot be created", answer))
    for path in files_to_upload(folder):
        answer = _ask(
            hub.upload,
            repo_id=settings.aistudio_repo_id,
            path_or_fileobj=str(path),
            path_in_repo=path.name,
            **access,
        )
        if "error_code" in answer:
            raise UserError(_refusal(settings, f"{path.name} cannot be uploaded", answer))
        show_message(f"Uploaded {path.name} to {settings.aistudio_repo_id}")


def _ask(call: Callable[..., dict[str, Any]], **arguments: object) -> dict[str, Any]:
    try:
        return call(**arguments)
    except Exception as error:  # the client lets every kind of network error through
        return {"error_code": type(error).__name__, "error_msg": str(error)}


def _refusal(settings: ModelArguments, what: str, answer: dict[str, Any]) -> str:
    return (
        f"AI Studio, {settings.aistudio_repo_id}: {what} ({answer.get('error_code')}: {answer.get('error_msg')}). "
        "The trained model is saved; check aistudio_repo_id and aistudio_token, or upload the folder by hand."
    )
