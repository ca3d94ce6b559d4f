"""Lists the messages in finetune/ that have no Chinese form yet, or takes new ones into the catalogue.

    python tools/message_templates.py                  how many are missing, and which the code no longer has
    python tools/message_templates.py --missing        the missing ones as JSON: template -> where it stands
    python tools/message_templates.py --add NEW.json   adds translations: template -> Chinese
    python tools/message_templates.py --prune          takes out those that the code no longer has

A message is a text of the code that a person may see. Those that are raised or printed as they stand must have a form
(tests/machine/test_messages.py); texts that are put together from pieces are listed, too.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "finetune"
CATALOGUE = PACKAGE / "machine" / "language" / "messages_zh.json"
SHOWN_BY = frozenset(
    [
        "UserError",
        "RunError",
        "Interrupted",
        "RecordError",
        "RefusedConversationError",
        "UnsupportedTokenizerError",
        "YamlFault",
        "show_line",
        "print_text",
        "add_argument",
        "CommandParser",
        "Command",
    ]
)
"""Calls whose texts a person sees as they stand."""
LABELS = frozenset(("error:", "warning:", "note:", "next:", "interrupted:"))
"""What stands in front of a message."""
_FOR_PROGRAMMERS = frozenset(
    ("ValueError", "TypeError", "RuntimeError", "KeyError", "AssertionError", "compile")
)
_MIN_LETTERS = 7
_TABLES = ("training_arguments.json", "training_records.json")
_TOLD = ("help", "why", "ignored", "instead")


def find_templates(package: Path = PACKAGE) -> dict[str, tuple[str, bool]]:
    """Templates of the messages in a package: "{}" for each value -> file and line, whether it is shown as it stands."""
    found: dict[str, tuple[str, bool]] = {}
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for template, line, is_shown in _templates(tree, _docstrings(tree), is_shown=False):
            place, known = found.get(template, (f"{path.relative_to(package.parent)}:{line}", False))
            found[template] = (place, known or is_shown)
    for name in _TABLES:
        path = package / "settings" / name
        found |= {text: (f"{path.relative_to(package.parent)}", True) for text in _table_texts(path)}
    return found


def _table_texts(path: Path) -> Iterator[str]:
    """What the tables of PaddleNLP's settings say of them."""
    rows: list[dict[str, object]] = []
    for group in json.loads(path.read_text(encoding="utf-8")).values():
        rows += group if isinstance(group, list) else group.values() if isinstance(group, dict) else []
    return (text for row in rows for key in _TOLD if isinstance(text := row.get(key), str))


def _templates(node: ast.AST, skipped: set[int], *, is_shown: bool) -> Iterator[tuple[str, int, bool]]:
    if id(node) in skipped:
        return
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in _FOR_PROGRAMMERS:
            return
        is_shown = name in SHOWN_BY
    elif isinstance(node, ast.Subscript | ast.Compare):
        is_shown = False
    text = _template(node)
    lines = (text or "").split("\n")  # which are looked up one by one
    for part in lines if is_shown else lines[:1] * (len(lines) == 1):
        if _is_message(part):
            yield part, node.lineno, is_shown  # type: ignore[attr-defined]
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant):
            continue
        inside = is_shown and not isinstance(node, ast.JoinedStr)
        yield from _templates(child, skipped, is_shown=inside)


def _template(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def _is_message(text: str) -> bool:
    words = re.findall(r"[A-Za-z]{2,}", text.replace("{}", " "))
    return " " in text and len(words) > 1 and sum(map(len, words)) >= _MIN_LETTERS and text.isprintable()


def _docstrings(tree: ast.AST) -> set[int]:
    """Texts that stand alone: docstrings of modules, classes, functions and attributes."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def read_catalogue() -> dict[str, str]:
    """Template -> Chinese."""
    return dict(json.loads(CATALOGUE.read_text(encoding="utf-8")))


def write_catalogue(entries: dict[str, str]) -> None:
    """Writes the catalogue in the order of its templates, so that branches which add to it seldom meet."""
    text = json.dumps(dict(sorted(entries.items())), ensure_ascii=False, indent=0)
    CATALOGUE.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Tells what is missing, or adds what was translated."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--add", type=Path)
    parser.add_argument("--prune", action="store_true")
    options = parser.parse_args()
    templates, known = find_templates(), read_catalogue()
    if options.prune:
        write_catalogue({key: text for key, text in known.items() if key in templates or key in LABELS})
        return
    if options.add:
        known |= json.loads(options.add.read_text(encoding="utf-8"))
        write_catalogue(known)
    missing = {template: place for template, (place, _) in templates.items() if template not in known}
    if options.missing:
        print(json.dumps(missing, ensure_ascii=False, indent=0))
        return
    shown = sum(1 for template in missing if templates[template][1])
    print(
        f"{len(templates)} messages, {len(missing)} without a Chinese form, {shown} of them shown as they stand"
    )


if __name__ == "__main__":
    main()
