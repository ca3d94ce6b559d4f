"""Training, evaluation, preview, prediction and merging as functions of Python; `finetune` itself hands them out.

Each call does its work in a process of its own, which ends with it. So nothing of it stays behind in the caller's
(signal handlers, environment, random state, Paddle's flags and memory), and two calls are two runs. The price is the
start of Paddle, about 15 seconds a call. What can be judged without Paddle is judged before that process starts.
"""

from __future__ import annotations

import codecs
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.checkpoints.folder import list_checkpoints
from finetune.errors import EXIT_USER_ERROR, RunError, UserError
from finetune.settings.arguments import Arguments, parse_arguments
from finetune.storage.files import read_json_or_empty

REQUEST_FILE, FAULTS_FILE = "request.json", "faults.json"
_CHILD = f"{__package__}.called_process"
_PROJECT = Path(__file__).resolve().parents[2]
_NUM_LAST_LINES = 20
_NUM_PREVIEWED = 3


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training or an evaluation left.

    Attributes:
        output_dir: Folder of weights, checkpoints and logs.
        metrics: The numbers of all_results.json by name.
        log: The rows of train_log.jsonl, in their order.
        best_checkpoint: Folder of the best checkpoint, where one was chosen and is kept.
        last_checkpoint: Folder of the newest checkpoint, if any.
        output: What was said on the screen.
    """

    output_dir: Path
    metrics: dict[str, Any]
    log: list[dict[str, Any]] = field(repr=False)
    best_checkpoint: Path | None
    last_checkpoint: Path | None
    output: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """Answers to prompts.

    Attributes:
        rows: One object for each line of the input, in its order, with ``output`` (a reward model: ``reward``).
        output: What was said on the screen.
    """

    rows: list[dict[str, Any]]
    output: str = field(repr=False)


def train(
    arguments: str | os.PathLike[str] | None = None, *, show: bool = True, **settings: Any
) -> TrainResult:
    """Trains, and evaluates where the settings say so.

    Args:
        arguments: An argument file, JSON or YAML; the settings win over it.
        show: Whether what the run says is printed.
        **settings: As in an argument file; `do_train` is true unless it is given.

    Raises:
        UserError: Settings, data or files cannot be used; its `faults` has a line for each.
        RunError: The run failed.
        KeyboardInterrupt: It was interrupted, after it saved what it could.
    """
    return _run(arguments, {"do_train": True} | settings, show)


def evaluate(
    arguments: str | os.PathLike[str] | None = None, *, show: bool = True, **settings: Any
) -> TrainResult:
    """Evaluates without training: `train` with `do_train` false and `do_eval` true; arguments and errors are the same."""
    return _run(arguments, settings | {"do_train": False, "do_eval": True}, show)


def preview(arguments: str | os.PathLike[str] | None = None, *, show: bool = True, **settings: Any) -> str:
    """Shows what a run would train on: three samples (`preview`: how many) and counts of all; returns that text.

    Arguments and errors are those of `train`.
    """
    settings = {"do_train": True, "preview": _NUM_PREVIEWED} | settings
    request, _ = _prepare(arguments, settings)
    return _call(request, show)


def predict(
    prompts: Sequence[str] | None = None,
    *,
    data_file: str | os.PathLike[str] | None = None,
    output_file: str | os.PathLike[str] | None = None,
    show: bool = False,
    **options: Any,
) -> PredictResult:
    """Answers prompts, or the lines of a file, with a dynamic or an exported model.

    Args:
        prompts: Texts to answer; or leave them out for `data_file`.
        data_file: Lines in any format of training data.
        output_file: Where the answers go, too, one JSON object a line.
        show: Whether what the command says is printed.
        **options: The other options of the command `predict`, such as `model_name_or_path` and `max_new_tokens`.

    Raises:
        UserError: Options, model or data cannot be used; also where both or neither of prompts and file are given.
        RunError: The command failed.
    """
    if (prompts is None) == (data_file is None):
        raise UserError("predict needs prompts or data_file, one of the two: give a list of texts, or a file")
    if isinstance(prompts, str) or not all(isinstance(each, str) for each in prompts or []):
        raise UserError('prompts is no list of texts: write predict(["..."], ...)')
    if prompts is not None and not prompts:
        return PredictResult(rows=[], output="")
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        source = Path(data_file) if data_file is not None else Path(folder, "prompts.jsonl")
        if prompts is not None:
            lines = [json.dumps({"src": each}) for each in prompts]
            source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        target = Path(output_file) if output_file is not None else Path(folder, "answers.jsonl")
        words = _write_words({**options, "data_file": source, "output_file": target})
        said = _call({"command": "predict", "words": words}, show)
        return PredictResult(rows=_read_rows(target), output=said)


def merge_lora(
    *, lora_path: Any, merge_model_path: str | os.PathLike[str], show: bool = True, **options: Any
) -> Path:
    """Merges LoRA adapters into the weights of their base; `finetune.merge` called is this function.

    Args:
        lora_path: An adapter, or a list of them, merged in this order.
        merge_model_path: Folder of the result.
        show: Whether what the command says is printed.
        **options: The other options of the command `merge lora`, such as `model_name_or_path` and `save_format`.

    Returns:
        The folder of the result.

    Raises:
        UserError: Options, adapter or base cannot be used.
        RunError: The command failed.
    """
    words = _write_words({"lora_path": lora_path, "merge_model_path": merge_model_path, **options})
    _call({"command": "merge lora", "words": words}, show)
    return Path(merge_model_path)


def _run(arguments: str | os.PathLike[str] | None, settings: Mapping[str, Any], show: bool) -> TrainResult:
    request, args = _prepare(arguments, settings)
    said = _call(request, show)
    folder = Path(args.training.output_dir)
    best = read_json_or_empty(folder / "trainer_state.json").get("best_model_checkpoint")
    best_folder = folder / Path(best).name if best else None
    checkpoints = list_checkpoints(folder)
    return TrainResult(
        output_dir=folder,
        metrics=read_json_or_empty(folder / "all_results.json"),
        log=_read_rows(folder / "train_log.jsonl"),
        best_checkpoint=best_folder if best_folder and best_folder.is_dir() else None,
        last_checkpoint=Path(checkpoints[-1]) if checkpoints else None,
        output=said,
    )


def _prepare(
    arguments: str | os.PathLike[str] | None, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], Arguments]:
    """The request to the process that runs, after every check that needs no Paddle."""
    values = {name: _simplify(name, value) for name, value in settings.items()}
    words = [] if arguments is None else [os.fspath(arguments)]
    if words and words[0].startswith("-"):
        raise UserError(f'arguments is "{words[0]}", no argument file: give settings as keyword arguments')
    args = parse_arguments(words, overrides=values)
    return {"command": "train", "words": words, "settings": values}, args


def _simplify(name: str, value: Any) -> Any:
    """The value as JSON has it: paths as texts, tuples as lists.

    Raises:
        UserError: It is no plain value.
    """
    try:
        return json.loads(json.dumps(value, default=os.fspath))
    except (TypeError, ValueError, RecursionError):
        raise UserError(
            f"{name} is an object of type {type(value).__name__}: give a text, a number, true or false, None, a list or a dict"
        ) from None


def _write_words(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line; None leaves one out."""
    words: list[str] = []
    for name, given in options.items():
        value = _simplify(name, given)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, bool):
                words.append(f"--{name}={str(each).lower()}")
            elif each is not None:
                words.append(f"--{name}={each}")
    return words


def _call(request: Mapping[str, Any], show: bool) -> str:
    """Runs a command in a process of its own; what it said."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    paths = [str(_PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:  # nobody else may read it
        Path(folder, REQUEST_FILE).write_text(json.dumps(request), encoding="utf-8")
        with subprocess.Popen(
            [sys.executable, "-m", _CHILD, folder],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes from here, once
        ) as process:
            said = _follow(process, show)
        faults = read_json_or_empty(Path(folder, FAULTS_FILE))
    if process.returncode:
        _fail(process.returncode, faults, said)
    return said


def _follow(process: subprocess.Popen[bytes], show: bool) -> str:
    """Reads what a process says until it ends, and hands an interrupt on to it."""
    assert process.stdout is not None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    parts: list[str] = []
    interrupted = False
    while True:
        try:
            content = os.read(process.stdout.fileno(), 2**16)
            text = decoder.decode(content, final=not content)
            parts.append(text)
            if show and text:
                print(text, end="", flush=True)
            if not content:
                process.wait()
                break
        except KeyboardInterrupt:
            process.send_signal(signal.SIGKILL if interrupted else signal.SIGINT)
            interrupted = True
        except BaseException:
            process.kill()
            raise
    if interrupted:
        raise KeyboardInterrupt
    return "".join(parts)


def _fail(code: int, faults: Mapping[str, Any], said: str) -> None:
    """Raises what ended the process."""
    lines = faults.get("faults") or [
        line.partition("error: ")[2] for line in said.splitlines() if "error: " in line
    ]
    if code == EXIT_USER_ERROR:
        raise UserError(lines or said.splitlines()[-1:])
    if code < 0:
        name = signal.Signals(-code).name
        raise RunError(f"the run was ended by {name}: check the memory of the machine, and start it again")
    raise RunError("\n".join(lines or said.splitlines()[-_NUM_LAST_LINES:]))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
