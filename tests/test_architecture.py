"""Rules on the source that no single test of behaviour would notice: what may be known where.

The source is parsed, not searched, so that comments and docstrings may say what they like.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.source_files import imported_modules, library, parse, shown, tracked

MAX_CODE_LINES = 400
MAX_FUNCTION_LINES = 60

ENTRIES = (
    "export_model",
    "finetune_generation",
    "merge_lora_params",
    "merge_tp_params",
    "predict_generation",
)
# What --help, argument checks, and everything up to the first weight or the tokenizer import.
STARTS_FAST = (
    "export_model",
    "finetune_generation",
    "merge_lora_params",
    "merge_tp_params",
    "predict_generation",
    "finetune.__main__",
    "finetune.commands.doctor",
    "finetune.commands.export",
    "finetune.commands.init",
    "finetune.commands.page.run",
    "finetune.commands.page.trial",
    "finetune.commands.plan",
    "finetune.commands.predict",
    "finetune.commands.train",
    "finetune",
    "finetune.commands.python_calls",
    "finetune.serving.api.run",
    "finetune.serving.chat.run",
    "finetune.serving.decoding.settings",
    "finetune.serving.export.options",
    "finetune.serving.gguf.__main__",
    "finetune.merge.tensor_parallel",
    "finetune.settings.arguments",
    "finetune.settings.help",
    "finetune.settings.schema",
    "finetune.run.data",
    "finetune.run.model",
    "finetune.run.trainer",
    "finetune.run.report",
    "finetune.run.directory",
    "finetune.models.loading",
    "finetune.models.resolve",
    "finetune.models.tiny.__main__",
    "finetune.data.samples.dataset",
)


# What answers at once imports no Paddle


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, those in classes, `if` and `try` among them."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from top_level(node.orelse)
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for part in ("body", "orelse", "finalbody"):
            yield from top_level(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from top_level(handler.body)


def source_of(module: str) -> Path | None:
    """The file of a module of ours."""
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file() and module.split(".")[0] in ("finetune", *ENTRIES):
            return candidate
    return None


def loaded_by(module: str) -> dict[str, str]:
    """Every module loaded by importing one, with who imports it first."""
    found = {module: "the command line"}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        parts = current.split(".")
        parents = [".".join(parts[:end]) for end in range(1, len(parts))]
        source = source_of(current)
        imported = (
            [name for node in top_level(parse(source).body) for name in imported_modules(node)]
            if source
            else []
        )
        for name in [*parents, *imported]:
            if name not in found:
                found[name] = current
                waiting.append(name)
    return found


@pytest.mark.parametrize("module", STARTS_FAST)
def test_what_starts_fast_imports_no_paddle(module):
    assert source_of(module)
    slow = {
        name: by for name, by in loaded_by(module).items() if name.split(".")[0] in ("paddle", "paddlenlp")
    }
    assert slow == {}, "import it inside the function that needs it"


def test_the_search_for_imports_finds_some():
    found = loaded_by("finetune.training.trainer")
    assert found["paddle"] and "finetune.errors" in loaded_by("finetune_generation")


# Size and names


def code_lines(path: Path) -> int:
    """Lines that hold neither a comment alone nor a docstring nor nothing."""
    text = path.read_text(encoding="utf-8")
    lines = {
        number
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#")
    }
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_files_stay_small():
    long = {str(path.relative_to(ROOT)): code_lines(path) for path in tracked() if path.suffix == ".py"}
    assert {name: count for name, count in long.items() if count > MAX_CODE_LINES} == {}


def test_functions_stay_small():
    long = {
        f"{shown(path, node)} {node.name}": size
        for path in library()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_no_module_is_named_after_nothing():
    vague = {"utils", "util", "common", "misc", "helpers", "tools"}
    assert [path for path in tracked() if path.suffix == ".py" and path.stem in vague] == []


# Nothing of the machine it was written on

HOME = re.compile(r"(?<![\w.~>}-])/(?:root|home/\w+|Users/\w+|work|tmp/w)/")
PACKAGE_INDEX = re.compile(
    r"https?://[^/\s\"'`)]*(?:pypi|registry|mirror|proxy|artifact|nexus)", re.IGNORECASE
)


def test_no_file_names_a_folder_or_a_package_index_of_one_machine():
    found = []
    for path in tracked():
        if path.suffix in (".npz", ".png", ".model"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if HOME.search(line) or PACKAGE_INDEX.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "open('/home/" + "me/x')",
        "cd /root" + "/x",
        "see https://" + "pypi.example.org/simple",
        "/work" + "/main",
    ],
)
def test_the_patterns_find_what_they_are_for(line):
    assert HOME.search(line) or PACKAGE_INDEX.search(line)
