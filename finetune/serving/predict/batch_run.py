"""Answers every line of a file: longest prompts first, kept as they come, written in the order of the input."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.adapters.adapter_folder import CONFIG_FILES
from finetune.checkpoints.companions import is_companion
from finetune.data.samples.tokenize import Prompt
from finetune.errors import UserError, list_some
from finetune.machine.screen import print_text
from finetune.models.resolve import ResolvedModel
from finetune.serving.decoding.exported import FACTS_FILE
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.journal import Journal
from finetune.serving.predict.loading import PlannedModel
from finetune.serving.predict.requests import Request
from finetune.serving.predict.responder import Responder

_MAX_LISTED = 10
_WEIGHTS = (".safetensors", ".pdparams", ".pdiparams", ".bin", ".npy")


def describe_run(plan: PlannedModel, settings: DecodingSettings, data_file: Path) -> dict[str, Any]:
    """Whatever decides about the answers, to compare with when a run is continued; not the batch size."""
    options = plan.options
    folders = {"model": _folder(plan.resolved), "adapter": options.adapter}
    template = Path(plan.template_name)
    return {
        "model_name_or_path": options.model_name_or_path,
        "lora_path": options.lora_path and str(options.lora_path),
        "prefix_path": options.prefix_path and str(options.prefix_path),
        **({"base": scheme.to_json()} if (scheme := options.base_quantisation) else {}),
        "mode": "static" if options.is_static else "dynamic",
        "dtype": options.dtype,
        "chat_template": plan.template_name,
        "system": options.system_text(),
        **({} if (switch := options.thinking()) is None else {"enable_thinking": switch}),
        "src_length": options.src_length,
        **asdict(settings),
        "content of data_file": _digest([data_file]),
        "content of chat_template": _digest([template]) if template.is_file() else None,
        **{f"configuration and tokenizer of the {name}": _companions(each) for name, each in folders.items()},
        **{f"weights of the {name}": _signature(folder) for name, folder in folders.items()},
    }


def run_batches(
    responder: Responder,
    requests: Sequence[Request],
    settings: DecodingSettings,
    journal: Journal,
    *,
    batch_size: int,
    show_message: Callable[[str], None] = lambda line: print_text(line, stream=sys.stderr),
) -> None:
    """Generates what the journal does not hold yet, and writes the output.

    Args:
        responder: The model.
        requests: All lines of the input.
        settings: How to generate; the number of a line decides its random draws.
        journal: Of the output.
        batch_size: Prompts that are generated together.
        show_message: Tells a person.

    Raises:
        UserError: A line has no token, or the model has no room for prompt and answer.
    """
    from finetune.reporting.progress import ProgressReporter
    from finetune.training.evaluation import batches_by_length

    prompts = _build_prompts(responder, requests, settings)
    if num_cut := sum(prompt.truncated_source for prompt in prompts):
        show_message(
            f"{num_cut} of {len(prompts)} prompts were cut to {responder.prompt_room(settings)} tokens."
        )
    open_ = [line for line in range(len(prompts)) if line not in journal.answers]
    if journal.answers:
        show_message(f"Going on: {len(journal.answers)} of {len(prompts)} answers are there.")
    batches = batches_by_length([len(prompts[line].input_ids) for line in open_], batch_size)
    with ProgressReporter(0).evaluating(len(batches), "Generating") as advance:
        for places in batches:
            lines = [open_[place] for place in places]
            texts = responder.generate([prompts[line] for line in lines], settings, samples=lines)
            journal.add(dict(zip(lines, texts, strict=True)))
            advance()
    journal.finish([request.result(journal.answers[line]) for line, request in enumerate(requests)])
    show_message(f"{journal.output}: {len(requests)} answers.")


def _build_prompts(
    responder: Responder, requests: Sequence[Request], settings: DecodingSettings
) -> list[Prompt]:
    built = [responder.prompt(request.conversation, settings) for request in requests]
    empty = [
        request.conversation.place for request, prompt in zip(requests, built, strict=True) if prompt is None
    ]
    if empty:
        listed = list_some(empty, _MAX_LISTED, separator=", ")
        raise UserError(f"prompts without any token: {listed}. Fill them in or remove the lines")
    return [prompt for prompt in built if prompt is not None]


def _folder(resolved: ResolvedModel) -> Path | None:
    return resolved.folder


def _digest(paths: Sequence[Path]) -> str:
    """Of names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _companions(folder: Path | None) -> str | None:
    """Of everything but the weights that decides about prompts and answers."""
    if folder is None:
        return None
    names = (*(each for files in CONFIG_FILES.values() for each in files), FACTS_FILE)
    return _digest([
        path for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in _WEIGHTS and (path.name in names or is_companion(path.name))
    ])  # fmt: skip


def _signature(folder: Path | None) -> list[list[Any]] | None:
    """Name, size and time of weight files: enough to notice another model under the same name."""
    if folder is None:
        return None
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
