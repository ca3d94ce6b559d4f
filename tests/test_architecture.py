"""Rules on the source that no single test of behaviour would notice: what may be known where.

The source is parsed, not searched, so that comments and docstrings may say what they like.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.models.family import families
from tests.conftest import ROOT

MODELS = ROOT / "finetune" / "models"
MAX_CODE_LINES = 400
MAX_FUNCTION_LINES = 60

# Who reads the names of families and config.json's own words for them.
READS_CONFIG = {MODELS / "family.py", MODELS / "loading.py"}
ALLOWED_NAMES = {
    "finetune/data/chat_templates.py": "names of conversation formats, which users choose and no code compares",
    "finetune/demo.py": "the demonstration is one run, of one family",
}
# What --help, argument checks, and everything up to the first weight or the tokenizer import.
STARTS_FAST = (
    "finetune_generation",
    "finetune.arguments",
    "finetune.argument_help",
    "finetune.assembly",
    "finetune.finish",
    "finetune.run_directory",
    "finetune.models.loading",
    "finetune.models.tiny",
    "finetune.data.dataset",
)


def tracked() -> list[Path]:
    """All files that git knows, and those that it would add."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if found.returncode:
        pytest.skip("not a git checkout")
    return [path for line in found.stdout.splitlines() if (path := ROOT / line).is_file()]


def library() -> list[Path]:
    """The library and the entry scripts."""
    return [*sorted((ROOT / "finetune").rglob("*.py")), *sorted(ROOT.glob("*.py"))]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def shown(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def family_modules() -> set[Path]:
    """The records, and the layers and tokenizers that only one family has."""
    stems = families().keys()
    return {path for path in MODELS.glob("*.py") if path.stem.split("_")[0] in stems}


# A fact of a family is read from its record


def test_only_records_and_loading_read_what_kind_of_model_a_config_names():
    fields = {"model_type", "architectures"}
    found = [
        shown(path, node)
        for path in library()
        if path not in READS_CONFIG | family_modules()
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.Constant) and node.value in fields)
        or (isinstance(node, ast.Attribute) and node.attr in fields)
    ]
    assert found == [], "ask the record (finetune/models/family.py) instead"


def test_only_records_know_the_families_by_name():
    names = {
        name.casefold()
        for family in families().values()
        for name in (family.name, *family.model_types, *family.architectures)
    }
    found = [
        f"{shown(path, node)}: {node.value!r}"
        for path in library()
        if path not in family_modules() and str(path.relative_to(ROOT)) not in ALLOWED_NAMES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.casefold() in names
    ]
    assert found == [], "no branch on a family: put the fact into the record"


def test_no_format_of_conversations_is_compared_by_the_name_of_a_family():
    path = ROOT / "finetune" / "data" / "chat_templates.py"
    compared = [
        shown(path, node)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Compare)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in families()
    ]
    assert compared == []


def test_only_the_models_package_imports_the_code_of_a_family():
    types = {name for family in families().values() for name in (family.name, *family.model_types)}
    stems = {path.stem for path in family_modules()}
    found = []
    for path in set(library()) - set(MODELS.glob("*.py")):
        for node in ast.walk(parse(path)):
            for module in imported_modules(node):
                parts = module.split(".")
                if parts[0] == "paddlenlp" and types & set(parts[1:]):
                    found.append(f"{shown(path, node)}: {module}")
                if parts[:2] == ["finetune", "models"] and stems & set(parts[2:]):
                    found.append(f"{shown(path, node)}: {module}")
    assert found == []


# What answers at once imports no Paddle


def imported_modules(node: ast.AST) -> Iterator[str]:
    """Dotted names that an import statement may load; "from a import b" gives both "a" and "a.b"."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports are absolute here"
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


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
        if candidate.is_file() and module.split(".")[0] in ("finetune", "finetune_generation"):
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
