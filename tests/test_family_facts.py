"""A fact of a family is read from its record: nothing else knows names, words or modules of families.

The source is parsed, not searched, so that comments and docstrings may say what they like.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.families.family import families
from tests.conftest import ROOT
from tests.source_files import imported_modules, library, parse, shown

FAMILIES = ROOT / "finetune" / "families"
MODELS = ROOT / "finetune" / "models"

# Who reads the names of families and config.json's own words for them.
READS_CONFIG = {
    FAMILIES / "config_fields.py",
    FAMILIES / "family.py",
    FAMILIES / "registry.py",
    MODELS / "hf_names.py",
    MODELS / "loading.py",
    MODELS / "reward_head.py",
    # `model_type` is SentencePiece's word for the kind of a vocabulary.
    ROOT / "finetune" / "serving" / "gguf" / "vocabulary.py",
}
ALLOWED_NAMES = {
    "finetune/data/templates/jinja_forms.py": "names of forms of conversations, which users choose and no code compares",
    "finetune/demo.py": "the demonstration is one run, of one family",
    "finetune/serving/gguf/vocabulary.py": "GGUF calls kinds of tokenizers by the names of models",
}


def family_modules() -> set[Path]:
    """The records, the layers, decoders and tokenizers that only one family has, and the kinds of multimodal folders."""
    return {path for name in (*families(), "multimodal") for path in (FAMILIES / name).glob("*.py")}


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
    "finetune/adapters/kronecker.py": "LoKr's names of its factors, which two layers of Qwen happen to share",
    "finetune/adapters/lokr.py": "the same names",
    "finetune/adapters/update_tensors.py": "the same names",
    "finetune/merge/layer_updates.py": "the same names",
    "finetune/merge/hf_out.py": "fields that the class of our decoders writes into config.json, whatever the family's are called",
    "finetune/models/hf_names.py": "names of Hugging Face's files and of the layers that PaddleNLP's options join",
    "finetune/serving/gguf/metadata.py": "a field of its own, and transformers' word for the length of texts",
    "finetune/serving/gguf/tensors.py": "names of Hugging Face's files whose rows the format orders otherwise",
    "finetune/settings/yaml_text.py": "events of YAML are told apart by the names of their classes",
    "finetune/storage/quantisation/stored_format.py": "compressed-tensors' word for weights that are not sparse",
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


def branches_on_families(tree: ast.AST) -> Iterator[ast.AST]:
    """Conditions that compare something with the name of a family."""
    for node in ast.walk(tree):
        tests = [node.test] if isinstance(node, ast.If | ast.IfExp) else []
        tests += node.ifs if isinstance(node, ast.comprehension) else []
        for test in tests:
            compared = [
                part for each in ast.walk(test) if isinstance(each, ast.Compare) for part in ast.walk(each)
            ]
            if any(isinstance(part, ast.Constant) and part.value in families() for part in compared):
                yield test


def test_no_test_branches_on_the_name_of_a_family():
    found = [
        shown(path, node)
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in branches_on_families(parse(path))
    ]
    assert found == [], "put what differs into the table of tests/families/cases.py"
    source = (
        "size = 1 if name == 'llama' else 2\nif name in ('qwen', 'opt'): pass\n[x for x in y if x != 'bloom']"
    )
    assert len(list(branches_on_families(ast.parse(source)))) == 3


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
