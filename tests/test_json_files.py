"""Every JSON file that is read may hold anything, or be no file at all: a message says which file and what to do."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from finetune.adapters.files import check_tokenizer
from finetune.adapters.lora import load_lora
from finetune.adapters.prefix import load_prefix
from finetune.checkpoints.folder import MANIFEST_NAME, find_fault
from finetune.checkpoints.optimizer_state import OPTIMIZER_FILES
from finetune.checkpoints.scheduler_state import load_scheduler
from finetune.data.samples import cache
from finetune.data.templates.template import load_template
from finetune.data.templates.trained_template import trained_template
from finetune.errors import UserError
from finetune.families.config_file import read_config
from finetune.families.family import get_family
from finetune.merge.lora_adapters import named_base, read_paddle_adapter
from finetune.merge.lora_base import open_base
from finetune.merge.peft_adapters import read_peft_adapter
from finetune.models.resolve import resolve_model
from finetune.reporting.run_log import read_log
from finetune.serving.decoding.exported import FACTS_FILE, PROGRAM_FILE, WEIGHTS_FILE, read_facts
from finetune.settings.arguments import parse_arguments
from finetune.storage import files
from finetune.storage.checkpoints import check_weights, open_indexed
from finetune.tokenizers.loading import load_tokenizer
from finetune.training.run_state import read_position, read_trainer_state

MAX_SECONDS = 20  # a pipe would be waited for without end
DEEP = "[" * 100_000

SHAPES: dict[str, tuple[bytes | None, str]] = {
    "empty": (b"", "is no valid JSON"),
    "null": (b"null", "but null"),
    "a list": (b"[1]", "but a list"),
    "a string": (b'"text"', "but a string"),
    "a number": (b"7", "but a number"),
    "nested": (DEEP.encode(), "is no valid JSON .it is nested too deep"),
    "nested inside": (b'{"a": ' + DEEP.encode(), "is no valid JSON .it is nested too deep"),
    "cut": (b'{"weight_map": {"a', "is no valid JSON"),
    "a long number": (b'{"a": ' + b"9" * 10_000 + b"}", "is no valid JSON"),
    "binary": (bytes(range(256)), "is no UTF-8 text|is no valid JSON"),
    "another encoding": ('{"a": "上衣"}'.encode("gbk"), r"is no UTF-8 text \(byte 0xc9 at 7\)"),
    "a folder": (None, r"cannot be read \(it is a folder, not a file\): put the file there"),
    "a pipe": (None, r"cannot be read \(it is a pipe or a device, not a file\): put the file there"),
    "unreadable": (b"{}", r"cannot be read \(Permission denied\): allow it to be read"),
}

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config.json": ("config.json", read_config),
    "config.json of a base": ("config.json", open_base),
    "generation_config.json": ("generation_config.json", resolve_model),
    "tokenizer_config.json": ("tokenizer_config.json", load_tokenizer),
    "special_tokens_map.json": ("special_tokens_map.json", load_tokenizer),
    "added_tokens.json": ("added_tokens.json", load_tokenizer),
    "lora_config.json": ("lora_config.json", lambda folder: load_lora(None, folder)),
    "lora_config.json in a merge": ("lora_config.json", read_paddle_adapter),
    "prefix_config.json": ("prefix_config.json", lambda folder: load_prefix(None, folder, family=None)),
    "adapter_config.json": (
        "adapter_config.json",
        lambda folder: read_peft_adapter(folder, get_family("llama"), tied=False),
    ),
    "adapter_config.json for its base": ("adapter_config.json", named_base),
    "adapter_facts.json": ("adapter_facts.json", lambda folder: check_tokenizer(folder, 5)),
    "index of an adapter": (
        "peft_model.safetensors.index.json",
        lambda folder: open_indexed(folder, "peft_model.safetensors.index.json"),
    ),
    "index of an optimizer": (
        OPTIMIZER_FILES.index_name,
        lambda folder: open_indexed(folder, OPTIMIZER_FILES.index_name),
    ),
    "data_position.json": ("data_position.json", read_position),
    "trainer_state.json": ("trainer_state.json", read_trainer_state),
    "scheduler.json": ("scheduler.json", lambda folder: load_scheduler(folder, None)),
}

# Files that are looked for among others: what is no file counts as absent.
FOUND_READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    **{
        name: (name, check_weights)
        for name in (
            "model.safetensors.index.json", "model_state.pdparams.index.json", "pytorch_model.bin.index.json"
        )
    },
    "chat_template.json": ("chat_template.json", lambda folder: load_template("tokenizer", folder)),
    "tokenizer_config.json for its template": (
        "tokenizer_config.json",
        lambda folder: load_template("tokenizer", folder),
    ),
    "template file": ("mine.json", lambda folder: load_template(folder / "mine.json")),
    "facts of an export": (FACTS_FILE, read_facts),
}  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model without weights and with a vocabulary that nothing reads."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.model").write_bytes(b"")
    for name in (PROGRAM_FILE, WEIGHTS_FILE):
        (folder / name).write_bytes(b"")
    return folder


@contextmanager
def without_rights() -> Iterator[None]:
    """Root may read everything, so the process becomes another user for a moment."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def place(path: Path, shape: str) -> None:
    content, _ = SHAPES[shape]
    path.unlink(missing_ok=True)
    if shape == "a folder":
        path.mkdir()
    elif shape == "a pipe":
        os.mkfifo(path)
    else:
        assert content is not None
        path.write_bytes(content)
    if shape == "unreadable":
        path.chmod(0)


def read(reader: Callable[[Path], Any], folder: Path, shape: str) -> Any:
    """What the reader gives, or its error; fails when that takes too long, as over a pipe."""
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(reader(folder))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=call, daemon=True)
    with without_rights() if shape == "unreadable" else nullcontext():
        thread.start()
        thread.join(MAX_SECONDS)
    assert results, "it waits"
    return results[0]


@pytest.fixture
def folder(model_folder):
    """A copy of the model that a test may damage; every user may enter it."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        for path in model_folder.iterdir():
            (Path(name) / path.name).write_bytes(path.read_bytes())
        yield Path(name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", READERS)
def test_a_file_is_told_by_its_name(folder, name, shape):
    file, reader = READERS[name]
    place(folder / file, shape)
    error = read(reader, folder, shape)
    assert isinstance(error, UserError), repr(error)
    assert str(error).startswith(str(folder / file))
    assert re.search(SHAPES[shape][1], str(error)), str(error)
    assert re.search(
        r": (copy it again|put the (file|keys .*) there\b.*|allow it to be read)$", str(error)
    ), str(error)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FOUND_READERS)
def test_what_is_no_file_may_count_as_absent(folder, name, shape):
    file, reader = FOUND_READERS[name]
    place(folder / file, shape)
    error = read(reader, folder, shape)
    assert isinstance(error, UserError), repr(error)
    if shape not in ("a folder", "a pipe", "unreadable"):
        assert str(error).startswith(str(folder / file))
        assert re.search(SHAPES[shape][1], str(error)), str(error)
    assert re.search(r"copy|put|allow|give|choose|export", str(error)), str(error)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_may_be_made_anew_counts_as_absent(folder, shape):
    for file in ("arguments.json", "trained_template.json", "key.json", MANIFEST_NAME):
        place(folder / file, shape)
    assert read(trained_template, folder, shape) is None
    assert read(lambda folder: cache.load(folder, "key"), folder, shape) is None
    fault = read(find_fault, folder, shape)
    assert isinstance(fault, str) and MANIFEST_NAME in fault


@pytest.mark.parametrize("shape", SHAPES)
def test_a_log_without_records(folder, shape):
    place(folder / "train_log.jsonl", shape)
    found = read(lambda folder: read_log(folder / "train_log.jsonl"), folder, shape)
    if SHAPES[shape][1].startswith("cannot be read"):
        assert isinstance(found, UserError) and re.search(SHAPES[shape][1], str(found))
    else:
        assert found == []


@pytest.mark.parametrize("shape", SHAPES)
def test_an_argument_file(folder, shape):
    place(folder / "arguments.json", shape)
    error = read(lambda folder: parse_arguments([str(folder / "arguments.json")]), folder, shape)
    assert isinstance(error, UserError), repr(error)
    assert str(folder / "arguments.json") in str(error)


def test_objects_and_their_keys(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe4\xb8\x8a"}')
    assert files.read_json_object(path, keys=("a",)) == {"a": "上"}
    with pytest.raises(UserError, match=r"a\.json has no b, c: mend it$"):
        files.read_json_object(path, keys=("a", "b", "c"), remedy="mend it")
    with pytest.raises(
        UserError, match=r"a\.json cannot be read \(it has more than 5 bytes\): copy it again$"
    ):
        files.read_json_object(path, max_bytes=5)
    with pytest.raises(
        UserError, match=r"b\.json cannot be read \(No such file or directory\): copy it there$"
    ):
        files.read_json_object(tmp_path / "b.json")
    with pytest.raises(UserError, match=r"cannot be read \(embedded null byte\): correct the path$"):
        files.read_json_object(f"{tmp_path}/\0")
    assert files.read_json_if_present(tmp_path / "b.json") == {}
    assert files.read_json_or_empty(tmp_path / "b.json") == {}
