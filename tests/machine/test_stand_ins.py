"""What is replaced in Paddle and PaddleNLP is on the list, and nothing else is."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys

import pytest

from finetune.machine import stand_ins
from tests.conftest import ROOT, launch

COMPARE = r"""
import json, sys, types
import paddle, paddlenlp, paddlenlp.trainer, paddlenlp.peft
import paddlenlp.transformers
import paddle.distributed.fleet
PREPARE

def snapshot():
    seen = {}
    for name, module in list(sys.modules.items()):
        if module is None or name.split(".")[0] not in ("paddle", "paddlenlp") or not isinstance(module, types.ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            seen[f"{name}.{attribute}"] = value
            if isinstance(value, type) and getattr(value, "__module__", None) == name:
                for inner, member in list(vars(value).items()):
                    seen[f"{name}.{value.__qualname__}.{inner}"] = member
    return seen

before = snapshot()
# An operator that a module imported by name is the one of paddle._C_ops.
sources = {id(value): key for key, value in before.items() if key.startswith("paddle._C_ops.")}
INSTALL
after = snapshot()
changed = [key for key, value in after.items() if key in before and before[key] is not value]
print("CHANGED", json.dumps(sorted({sources.get(id(before[key]), key) for key in changed})))
"""
FAMILIES = """
from finetune.families.family import families, import_object
for family in families().values():
    import_object(family.model_class)
"""
INSTALLS = {
    "families": FAMILIES,
    "backend": "from finetune.processes.cpu.backend import install\ninstall()",
    "received objects": "from finetune.processes.groups import _refuse_pickles\n_refuse_pickles()",
    "half precision": "from finetune.machine.half_precision import install\ninstall()",
    "cpu layers": "from finetune.families.llama.cpu_layers import install_llama\ninstall_llama()",
}
# Counters and caches that Paddle writes itself.
OWN_STATE = re.compile(r".*\.(_\w*(cache|state|count|mode)\w*|__\w+__)")


def changed_by(source: str) -> list[str]:
    """Attributes of theirs that code changes; the layers of families are in place before, unless it puts them there."""
    prepare = "" if source == FAMILIES else FAMILIES
    result = launch("-c", COMPARE.replace("INSTALL", source).replace("PREPARE", prepare))
    assert result.returncode == 0, result.stderr[-2000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("CHANGED "))
    return [name for name in json.loads(line.removeprefix("CHANGED ")) if not OWN_STATE.fullmatch(name)]


@pytest.mark.parametrize("name", INSTALLS)
def test_what_an_installation_changes_is_on_the_list(name):
    changed = changed_by(INSTALLS[name])
    assert changed, "the comparison sees nothing"
    assert [target for target in changed if stand_ins.find(target) is None] == []


def test_a_replacement_beside_the_list_is_seen():
    assert changed_by("paddle.tensor.math.add = None") == ["paddle.tensor.math.add"]
    assert stand_ins.find("paddle.tensor.math.add") is None


def test_a_target_beside_the_list_is_refused():
    with pytest.raises(ValueError, match=r"json\.dumps is not in finetune\.machine\.stand_ins"):
        stand_ins.replace(json, "dumps", None)


def test_a_temporary_stand_in_goes_again_also_after_an_error():
    from paddle.nn import functional

    original = functional.dropout
    with pytest.raises(KeyError), stand_ins.replaced(functional, "dropout", len) as before:
        assert before is original and functional.dropout is len
        raise KeyError
    assert functional.dropout is original


def assigned_attributes(source: str) -> list[int]:
    """Lines that assign to an attribute of something imported from Paddle or PaddleNLP."""
    nodes = list(ast.walk(ast.parse(source)))
    theirs = {name for node in nodes for name in _imported_from_theirs(node)}
    found = []
    for node in nodes:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = [target for target in node.targets if isinstance(target, ast.Attribute)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets = node.args[:1]
        found += [node.lineno for target in targets if ast.unparse(target).split(".")[0] in theirs]
    return found


def test_no_attribute_of_theirs_is_assigned_past_the_list():
    found = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / "finetune").rglob("*.py")
        if (lines := assigned_attributes(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import paddle\npaddle.nn.functional.dropout = None",
        "from paddlenlp.transformers.llama import modeling as llama\nllama.swiglu = None",
        "def late():\n    from paddle.nn import Layer\n    setattr(Layer, 'forward', None)",
    ],
)
def test_the_search_finds_assignments(source):
    assert assigned_attributes(source)


def _imported_from_theirs(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [
            (alias.asname or alias.name).split(".")[0]
            for alias in node.names
            if alias.name.split(".")[0] in ("paddle", "paddlenlp")
        ]
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("paddle", "paddlenlp"):
        return [alias.asname or alias.name for alias in node.names]
    return []


def test_every_entry_names_a_test_that_exists_and_says_why():
    for each in stand_ins.STAND_INS:
        assert (ROOT / each.test).is_file(), each
        assert each.reason and each.when and re.match(r"(paddlepaddle|paddlenlp) \d", each.versions)


def test_the_list_can_be_printed_without_paddle():
    source = "import sys\nfrom finetune.machine.stand_ins import main\nmain([])\nassert 'paddle' not in sys.modules"
    result = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert all(each.target in result.stdout for each in stand_ins.STAND_INS)
