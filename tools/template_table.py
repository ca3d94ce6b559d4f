"""Write the tables of docs/chat_templates.md and its Chinese twin from the built-in chat templates.

python tools/template_table.py [--check]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.data.reading.conversation import make_conversation  # noqa: E402
from finetune.data.templates.chat_templates import CHAT_FORMATS  # noqa: E402
from finetune.data.templates.jinja_forms import JINJA_FORMS  # noqa: E402
from finetune.data.templates.template import FORM_NAMES, load_template  # noqa: E402
from finetune.data.templates.template_clock import set_day  # noqa: E402
from finetune.families.registry import families  # noqa: E402
from tools.marked_tables import replace_table  # noqa: E402

HEADS = {
    "chat_templates.md": (
        ("`chat_template`", "one round of `q` and `a`, learned in bold", "default of"),
        ("yes", "functions and calls as objects", "`enable_thinking`"),
    ),
    "chat_templates_zh.md": (
        ("`chat_template`", "一轮 `q` 与 `a`，学习的部分为粗体", "默认用于"),
        ("是", "函数与调用作为对象", "`enable_thinking`"),
    ),
}
_END = "⏎"
_TOKENS = {"bos_token": "<s>", "eos_token": _END}
_MAX_CHARACTERS = 90


def table(page: str) -> str:
    """The table of a page."""
    heads, (yes, tools, switch) = HEADS[page]
    defaults = _defaults()
    lines = [_row((*heads, tools, switch)), _row(["---"] * 5)]
    for name in sorted(FORM_NAMES):
        form = JINJA_FORMS.get(name)
        takes_tools = "tools" in form.source if form is not None else CHAT_FORMATS[name].tools is not None
        lines.append(_row((
            f"`{name}`", written(name), ", ".join(defaults[name]), yes if takes_tools else "",
            yes if form is not None and form.has_switch else "",
        )))  # fmt: skip
    return "\n".join(lines)


def written(name: str) -> str:
    """One round as a template writes it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(_TOKENS), encoding="utf-8")
        template = load_template(name, folder)
        pieces = template.render(make_conversation([("q", "a")]))
    asked = "".join(piece.text for piece in pieces if not piece.learned).rstrip("\n")
    prompt = "".join(piece.text for piece in template.render_prompt(make_conversation([("q", "")])))
    learned = "".join(piece.text for piece in pieces if piece.learned) + _END * template.appends_eos
    assert prompt.startswith(asked) or asked.startswith(prompt)
    return f"{_code(prompt)}**{_code(learned)}**"


def _code(text: str) -> str:
    if len(text) > _MAX_CHARACTERS:
        half = _MAX_CHARACTERS // 2
        text = f"{text[:half]} … {text[-half:]}"
    shown = text.replace("\n", "\\n").replace("|", "\\|")
    return f"`{shown}`"


def _defaults() -> dict[str, list[str]]:
    """The families whose conversations a template writes where nothing is set and the folder has none."""
    found: dict[str, list[str]] = defaultdict(list)
    for family in families().values():
        known = family.chat_template
        for name in [known] if isinstance(known, str) else dict.fromkeys((known or {}).values()):
            found[name].append(family.name)
    return found


def _row(cells: object) -> str:
    return f"| {' | '.join(cells)} |"  # type: ignore[arg-type]


def main() -> int:
    """Writes the pages, or says whether they are up to date."""
    set_day("2024-07-26")
    stale = []
    for page in HEADS:
        path = ROOT / "docs" / page
        before = path.read_text(encoding="utf-8")
        replace_table(path, table(page))
        if path.read_text(encoding="utf-8") != before:
            stale.append(page)
            if "--check" in sys.argv:
                path.write_text(before, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"run python tools/template_table.py: {', '.join(stale)} would change", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
