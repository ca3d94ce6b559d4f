"""The packages of finetune/, the level that each stands on, and how large files may become.

A package is a folder of modules, or a module at the root of finetune/. The longest name in `LEVELS` counts, so that
"processes/watch" stands by itself and "machine/x" belongs to "machine". A package imports from lower levels only, never
from its own level or a higher one; inside a package everything may be imported, as long as no circle of files comes
of it.

An import counts wherever it stands, in a function too, and so does the dotted name of a module in a string. What only
a type checker reads does not count.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROJECT = ROOT / "finetune"

LEVELS = (  # from the lowest up
    ("errors",),
    ("machine", "storage", "processes/network"),
    ("machine/randomness", "families", "processes/cpu"),
    ("processes",),
    ("processes/watch", "settings", "reporting"),
    ("processes/command",),
    ("models", "models/tiny"),
    ("tokenizers", "data/reading"),
    ("data/templates",),
    ("data/samples", "data/packing"),
    ("data/stream", "data/preference"),
    ("data/batches",),
    ("checkpoints",),
    ("adapters",),
    ("parallel/pipe", "parallel/sharding"),
    ("parallel",),
    ("training",),
    ("run", "merge", "serving/decoding", "serving/web"),
    ("run/preview", "serving/export", "serving/gguf", "serving/predict"),
    ("serving/chat", "serving/batching", "run/plan"),
    ("serving/api",),
    ("commands", "chat", "demo", "environment", "stand_ins"),
    ("__main__",),  # the scripts beside finetune/ stand above all
)
LEVEL_OF = {package: number for number, packages in enumerate(LEVELS) for package in packages}

MAX_ROOT_ENTRIES = (
    25  # with what a program needs: __main__.py, its commands, and py.typed, which type checkers look for
)
MAX_LINES = 350
MAX_TEST_LINES = 400
MAX_MEAN_LINES = 150


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of finetune."""
    found = {}
    for path in PROJECT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def package_of(module: str) -> str | None:
    """The package of a module; None for folders that only hold packages."""
    parts = module.split(".")[1:]
    for end in range(len(parts), 0, -1):
        if (name := "/".join(parts[:end])) in LEVEL_OF:
            return name
    return None


def imported(tree: ast.AST, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules of ours that the code may load, at its import or later."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imported(ast.Module([other], []), known)
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in inner]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"finetune(\.\w+)+", str(node.value)):
            names = [node.value, node.value.rpartition(".")[0]]
        yield from (name for name in names if name in known)
        yield from imported(node, known)


def arrows() -> dict[str, set[str]]:
    """Module -> the modules that it may load."""
    known = modules()
    return {
        module: set(imported(ast.parse(path.read_text(encoding="utf-8")), known)) - {module}
        for module, path in known.items()
    }


def find_circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (the strongly connected components of two and more)."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in graph.get(waiting.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    waiting.append(name)
        reached[start] = seen
    groups = {
        tuple(sorted(other for other in reached[start] if start in reached.get(other, ())))
        for start in graph
        if start in reached[start]
    }
    return [list(group) for group in sorted(groups)]


def find_upward(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports that do not go to a lower level."""
    found = []
    for module, others in sorted(graph.items()):
        here = package_of(module)
        for other in sorted(others):
            there = package_of(other)
            if here is None or there is None or here == there:
                continue
            if LEVEL_OF[there] >= LEVEL_OF[here]:
                found.append(f"{module} ({here}) imports {other} ({there})")
    return found


def test_every_module_has_a_package_and_every_package_is_there():
    known = modules()
    unplaced = [
        str(path.relative_to(ROOT))
        for module, path in known.items()
        if package_of(module) is None
        and module != "finetune"
        and len(ast.parse(path.read_text(encoding="utf-8")).body) > 1
    ]
    assert unplaced == [], "name its package in LEVELS, or move it into one that is there"
    assert [name for name in LEVEL_OF if f"finetune.{name.replace('/', '.')}" not in known] == []


def test_imports_go_to_lower_levels():
    assert find_upward(arrows()) == [], "move what both need to a lower level, or hand it over as an argument"


def test_no_files_import_each_other_in_a_circle():
    assert find_circles(arrows()) == []


def test_nothing_below_the_scripts_imports_a_script():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    found = [
        f"{module}: {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name}"
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and str(node.module) in scripts)
        or (isinstance(node, ast.Import) and {alias.name for alias in node.names} & scripts)
    ]
    assert found == []


def test_the_root_stays_small():
    entries = [path.name for path in PROJECT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MAX_ROOT_ENTRIES, sorted(entries)


def count_lines(folder: Path) -> dict[str, int]:
    """Lines of every Python file."""
    return {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in folder.rglob("*.py")
    }


def test_files_stay_short():
    lines = count_lines(PROJECT)
    assert {name: size for name, size in lines.items() if size > MAX_LINES} == {}
    assert sum(lines.values()) / len(lines) < MAX_MEAN_LINES
    tests = count_lines(ROOT / "tests")
    assert {name: size for name, size in tests.items() if size > MAX_TEST_LINES} == {}


# The search itself


@pytest.mark.parametrize(
    "source",
    [
        "from finetune.training import trainer",
        "from finetune.training.trainer import FinetuneTrainer",
        "import finetune.training.trainer",
        "def late():\n    from finetune.training.trainer import FinetuneTrainer",
        "if x:\n    try:\n        from finetune.training.trainer import FinetuneTrainer\n    except ImportError:\n        pass",
        "import_object('finetune.training.trainer.FinetuneTrainer')",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from finetune.training.trainer import FinetuneTrainer",
    ],
)
def test_the_search_finds_imports(source):
    found = set(imported(ast.parse(source), modules()))
    assert "finetune.training.trainer" in found
    assert find_upward({"finetune.storage.files": found}) == [
        "finetune.storage.files (storage) imports finetune.training.trainer (training)"
    ]


def test_the_search_leaves_other_text_alone():
    source = '''
        """See finetune.training.trainer."""
        if TYPE_CHECKING:
            from finetune.training.trainer import FinetuneTrainer
        command = "python -m finetune.training.trainer"
    '''
    assert set(imported(ast.parse(textwrap.dedent(source)), modules())) == set()


def test_packages_of_one_level_do_not_import_each_other():
    assert find_upward({"finetune.merge.lora": {"finetune.run.model", "finetune.training.loss"}}) == [
        "finetune.merge.lora (merge) imports finetune.run.model (run)"
    ]
    assert find_upward({"finetune.processes.groups": {"finetune.processes.cpu.backend"}}) == []
    assert find_upward({"finetune.processes.cpu.backend": {"finetune.processes.groups"}}) != []


def test_circles_are_found_whatever_their_length():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"f"}, "f": {"e"}, "g": {"a"}}
    assert find_circles(graph) == [["a", "b", "c"], ["e", "f"]]
