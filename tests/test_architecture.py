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

from finetune.families.family import families
from tests.conftest import ROOT

FAMILIES = ROOT / "finetune" / "families"
MODELS = ROOT / "finetune" / "models"
MAX_CODE_LINES = 400
MAX_FUNCTION_LINES = 60

# Who reads the names of families and config.json's own words for them.
READS_CONFIG = {FAMILIES / "family.py", MODELS / "hf_names.py", MODELS / "loading.py"}
ALLOWED_NAMES = {
    "finetune/data/templates/chat_templates.py": "names of conversation formats, which users choose and no code compares",
    "finetune/demo.py": "the demonstration is one run, of one family",
}
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
    "finetune.serving.decoding.settings",
    "finetune.serving.export.options",
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
    """The records, and the layers, decoders and tokenizers that only one family has."""
    return {path for name in families() for path in (FAMILIES / name).glob("*.py")}


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
    assert found == [], "ask the record (finetune/families/family.py) instead"


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
    path = ROOT / "finetune" / "data" / "templates" / "chat_templates.py"
    compared = [
        shown(path, node)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Compare)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in families()
    ]
    assert compared == []


def test_only_its_own_folder_imports_the_code_of_a_family():
    types = {name for family in families().values() for name in (family.name, *family.model_types)}
    found = []
    for path in (each for each in library() if FAMILIES not in each.parents):
        for node in ast.walk(parse(path)):
            for module in imported_modules(node):
                parts = module.split(".")
                if parts[0] == "paddlenlp" and types & set(parts[1:]):
                    found.append(f"{shown(path, node)}: {module}")
                if parts[:2] == ["finetune", "families"] and families().keys() & set(parts[2:]):
                    found.append(f"{shown(path, node)}: {module}")
    assert found == []


# Words of family records that anyone may use, and why.
GENERIC_WORDS = {
    "vocab_size": "the same word in every PaddleNLP configuration: rows of the embeddings",
    "head_dim": "a size of PrefixGeometry, the record's own answer",
}
ALLOWED_WORDS = {
    "finetune/demo.py": "sizes of the tiny checkpoint, arguments of finetune.models.tiny",
    "finetune/models/tiny/__main__.py": "options of the command, which happen to be called like sizes of Llama's",
    "finetune/models/tiny/checkpoint.py": "the same options",
    "finetune/models/hf_names.py": "names of Hugging Face's files and of the layers that PaddleNLP's options join",
    "finetune/models/sequence_parallel.py": "the attribute in which PaddleNLP's attention layers keep the row length",
}


def config_words() -> set[str]:
    """What some family calls a size in its config.json."""
    words: set[str] = set()
    for family in families().values():
        words |= {name for name in vars(family.fields).values() if name}
        words |= set(family.parallel.tensor_divides)
    return words - GENERIC_WORDS.keys()


def module_words() -> set[str]:
    """What some family calls its embeddings, its head and its linear layers."""
    words: set[str] = set()
    for family in families().values():
        words |= {family.embedding_module, family.head_module}
        words |= {re.findall(r"\w+", pattern)[-1] for pattern in family.lora_target_modules}
    return words


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """Strings that stand alone as statements."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def is_identity(node: ast.AST) -> bool:
    """`family.name`, `x.family.name`, `type(x).__name__` or `x.__class__.__name__`."""
    if not isinstance(node, ast.Attribute):
        return False
    owner = ast.unparse(node.value)
    if node.attr == "name":
        return owner.rpartition(".")[2] == "family"
    return node.attr == "__name__" and (owner.startswith("type(") or owner.endswith(".__class__"))


def decided_by(node: ast.AST) -> list[ast.AST]:
    """What a comparison, an index or slice, a `match` or a string method looks at."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Subscript):
        return [node.value, node.slice]
    if isinstance(node, ast.Match):
        return [node.subject]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        # x.name.startswith("q") and SIZES.get(x.name) decide as well.
        return [node.func.value, *(node.args if node.func.attr == "get" else [])]
    return []


def family_facts(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Places that know what only a record should: words of config.json, names of modules, identities."""
    fields, modules, ignored = config_words(), module_words(), docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in fields:
            yield node, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in ignored:
            # Sentences may use the words; names and patterns hold no blank.
            parts = set() if " " in node.value else set(re.findall(r"\w+", node.value))
            if node.value in fields or parts & modules:
                yield node, repr(node.value)
        for part in decided_by(node):
            if any(is_identity(inner) for inner in ast.walk(part)):
                yield node, ast.unparse(node)[:60]


def test_only_records_know_the_words_and_modules_of_families():
    found = [
        f"{shown(path, node)}: {what}"
        for path in library()
        if FAMILIES not in path.parents and str(path.relative_to(ROOT)) not in ALLOWED_WORDS
        for node, what in family_facts(parse(path))
    ]
    assert found == [], "no fact of a family outside its record: ask the record"


@pytest.mark.parametrize(
    "source",
    [
        "heads = config.num_key_value_heads",
        "groups = getattr(model.config, 'multi_query_group_num', 1)",
        "layers = config['n_head']",
        "layer = find_layer(model, 'embed_tokens')",
        "weight = state['llama.embed_tokens.weight']",
        "head = model.lm_head if hasattr(model, 'lm_head') else None",
        "targets = ['.*query_key_value.*', r'.*attn\\.c_attn']",
        "if resolved.family.name == 'q' + 'wen': pass",
        "if family.name in ODD_ONES: pass",
        "if family.name[:4] == prefix: pass",
        "if family.name.startswith(prefix): pass",
        "size = SIZES[family.name]",
        "size = SIZES.get(family.name, 1)",
        "match family.name:\n    case x: pass",
        "if type(model).__name__ == wanted: pass",
        "if 'GLM' in model.__class__.__name__: pass",
        "if type(model).__name__.lower().startswith(prefix): pass",
    ],
)
def test_the_search_finds_what_knows_a_family(source):
    assert list(family_facts(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        '"""Heads are num_key_value_heads; the head is lm_head."""',
        "raise UserError(f'{family.name} has no pipeline; {type(x).__name__}')",
        "size = config.vocab_size // geometry.head_dim",
        "raise ValueError('for instance embed_tokens and lm_head')",
        "if path.name == other.name: pass",
    ],
)
def test_the_search_leaves_other_code_alone(source):
    assert not list(family_facts(ast.parse(source)))


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
