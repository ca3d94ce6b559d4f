"""Write docs/settings.md and docs/settings_zh.md from the records of the settings.

python tools/settings_table.py [--check]
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.machine.language.translation import chinese  # noqa: E402
from finetune.settings.records import LAYOUT, MODEL_CONFIG, PADDLENLP, Range, Setting  # noqa: E402
from finetune.settings.registry import foreign_settings, known_settings, read_rows  # noqa: E402
from finetune.settings.synonyms import Synonym, known_methods, known_synonyms  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Language:
    """The words of one of the two documents; `words` translates the marks of a record."""

    file: str
    title: str
    introduction: str
    groups: dict[str, str]
    columns: tuple[str, ...]
    foreign_title: str
    foreign_introduction: str
    foreign_columns: tuple[str, ...]
    synonyms_title: str
    synonyms_introduction: str
    synonyms_columns: tuple[str, ...]
    methods_introduction: str
    methods_columns: tuple[str, ...]
    words: dict[str, str]

    def translate(self, text: str) -> str:
        """What a record says in English, in this language."""
        return text if self.file == "settings.md" else chinese().translate(text)


ENGLISH = Language(
    file="settings.md",
    title="Settings\n\n[中文](settings_zh.md)",
    introduction=(
        "Every key of an argument file, which is also a `--key` of the command line. This page is made from the "
        "records in `finetune/settings/` by `python tools/settings_table.py`. null stands for the default. \"On "
        "resume\" says whether a run may continue from its checkpoints with another value and keep its curve: what "
        "is not marked is named in a warning when it changes, and a finished run is not continued with it."
    ),
    groups={
        "model": "Model and method",
        "data": "Data",
        "training": "Training",
        "generation": "Generation",
        "alignment": "Preference alignment",
        "quant": "Quantisation",
    },
    columns=("setting", "type", "default", "allowed", "on resume", "read by", "what it does"),
    foreign_title="Known keys without a place here",
    foreign_introduction="Most are settings of PaddleNLP's scripts: a file that holds them at their off value runs unchanged.",
    foreign_columns=("setting", "off", "otherwise"),
    synonyms_title="Names of other tools",
    synonyms_introduction=(
        "What means the same here is read as the setting named, with one line in the log; the rest is refused with "
        "what to write instead. Two names of one setting with two values are refused, but for `intokens`, which wins "
        "over `zero_padding` as in PaddleNLP. A key that stands in neither table nor above is unknown and refused."
    ),
    synonyms_columns=("name", "tool", "here"),
    methods_introduction="Argument files of other methods are recognised by these keys and answered in one line.",
    methods_columns=("method", "recognised by", "answer"),
    words={
        "may_change": "may change",
        "may_grow": "may grow",
        MODEL_CONFIG: "model configuration",
        PADDLENLP: "PaddleNLP's trainer",
        LAYOUT: "parallel layout",
        "aliases": "Also accepted as {}.",
        "only": "Only {} works: {}.",
        "ignored": "Without effect: {}.",
        "refused": "refused: {}",
        "without": "without effect: {}",
        "gpu_only": "Turned off on CPU.",
        "otherwise": "otherwise refused: {}",
        "accepted": "accepted",
        "others": "others",
        "default": "the default",
        "words": "Words: {}.",
    },
)  # fmt: skip
CHINESE = Language(
    file="settings_zh.md",
    title="设置\n\n[English](settings.md)",
    introduction=(
        "参数文件中的全部键，也都可以在命令行上写作 `--键`。本页由 `python tools/settings_table.py` 根据 "
        "`finetune/settings/` 中的记录生成。null 表示默认值。“续训时”说明从检查点继续时可否换用别的值而损失曲线不变："
        "没有标注的设置改变时会在警告中列出，已完成的运行也不会带着改变继续。PaddleNLP 自身设置的说明、拒绝和不起作用的原因为英文。"
    ),
    groups={
        "model": "模型与方法",
        "data": "数据",
        "training": "训练",
        "generation": "生成",
        "alignment": "偏好对齐",
        "quant": "量化",
    },
    columns=("设置", "类型", "默认值", "允许的值", "续训时", "由谁读取", "作用"),
    foreign_title="已知但在此没有位置的键",
    foreign_introduction="多为 PaddleNLP 脚本的设置：以关闭值写有它们的文件可以原样运行。",
    foreign_columns=("设置", "关闭值", "否则"),
    synonyms_title="其他工具的名称",
    synonyms_introduction=(
        "含义相同的，读作所列的设置，并在日志中写一行；其余的被拒绝，并说明应当怎样写。同一设置的两个名称取了两个值时被拒绝，"
        "只有 `intokens` 例外：与 PaddleNLP 一样，它优先于 `zero_padding`。上面和本表中都没有的键是未知的，会被拒绝。"
    ),
    synonyms_columns=("名称", "工具", "在此"),
    methods_introduction="其他方法的参数文件由下列键识别，并用一行回答。",
    methods_columns=("方法", "识别依据", "回答"),
    words={
        "may_change": "可以改变",
        "may_grow": "可以增大",
        MODEL_CONFIG: "模型配置",
        PADDLENLP: "PaddleNLP 的训练器",
        LAYOUT: "并行布局",
        "aliases": "也可写作 {}。",
        "only": "仅 {} 可用：{}。",
        "ignored": "不起作用：{}。",
        "refused": "拒绝：{}",
        "without": "不起作用：{}",
        "gpu_only": "在 CPU 上关闭。",
        "otherwise": "否则拒绝：{}",
        "accepted": "接受",
        "others": "其他",
        "default": "默认值",
        "words": "可用的词：{}。",
    },
)


def format_page(language: Language) -> str:
    """The whole document in one language."""
    blocks = [f"# {language.title}", language.introduction]
    for group, title in language.groups.items():
        rows = [_format_row(each, language) for each in known_settings().values() if each.group == group]
        blocks += [f"## {title}", _format_table(language.columns, rows)]
    blocks += [f"## {language.foreign_title}", language.foreign_introduction]
    blocks.append(_format_table(language.foreign_columns, _list_foreign_rows(language)))
    blocks += [f"## {language.synonyms_title}", language.synonyms_introduction]
    blocks.append(_format_table(language.synonyms_columns, _list_synonym_rows(language)))
    blocks += [
        language.methods_introduction,
        _format_table(language.methods_columns, _list_methods(language)),
    ]
    return "\n\n".join(blocks) + "\n"


def _format_row(setting: Setting, language: Language) -> list[str]:
    words = language.words
    allowed = _list_values(setting.choices) or (_format_range(setting.range) if setting.range else "")
    resume = [words[name] for name in ("may_change", "may_grow") if getattr(setting, name)]
    text = setting.help_zh if language is CHINESE and setting.help_zh else language.translate(setting.help)
    notes = [
        (setting.aliases, words["aliases"].format(_list_values(setting.aliases))),
        (setting.words, words["words"].format(_list_values(setting.words))),
        (setting.gpu_only, words["gpu_only"]),
        (
            setting.ignored and not setting.help.startswith("Without effect"),
            words["ignored"].format(language.translate(setting.ignored or "")),
        ),
        (
            setting.working,
            words["only"].format(
                _list_values(setting.working or ()), language.translate(setting.instead or "")
            ),
        ),
        (setting.why, language.translate(setting.why or "")),
    ]
    description = " ".join([text, *(note for is_told, note in notes if is_told)])
    readers = ", ".join(words[reader] for reader in setting.readers)
    default = _list_values([setting.default])
    return [f"`{setting.name}`", setting.type, default, allowed, "".join(resume), readers, description]


def _list_foreign_rows(language: Language) -> list[list[str]]:
    """One row for the settings that share what is said about them."""
    names: dict[tuple[str, str], list[str]] = {}
    for setting in foreign_settings().values():
        if setting.name in read_rows("synonyms.json")["ignored"]:
            continue
        if setting.working is None:
            off, reason = "", language.words["without"].format(language.translate(setting.ignored or ""))
        else:
            off = _list_values([*setting.working, None])
            reason = language.words["refused"].format(language.translate(setting.instead or ""))
        names.setdefault((off, reason), []).append(setting.name)
    return [[_list_values(shared), off, reason] for (off, reason), shared in names.items()]


def _list_synonym_rows(language: Language) -> list[list[str]]:
    is_chinese = language is CHINESE
    rows = [
        [f"`{each.name}`", _list_tools(each.tools, language), _explain_synonym(each, language)]
        for each in known_synonyms().values()
    ]
    for name, row in read_rows("synonyms.json")["ignored"].items():
        reason = language.words["without"].format(row["why_zh" if is_chinese else "why"])
        rows.append([f"`{name}`", _list_tools(row["tools"], language), reason])
    return rows


def _list_tools(tools: Any, language: Language) -> str:
    return ", ".join(language.words.get(tool, tool) for tool in tools)


def _explain_synonym(synonym: Synonym, language: Language) -> str:
    """What each value means here, and what is said to the others."""
    parts = []
    for value, settings in synonym.values.items():
        same = ", ".join(
            f"`{name} {language.words['default'] if each is None else json.dumps(each)}`"
            for name, each in settings.items()
        )
        parts.append(f"`{value}`: {same or language.words['accepted']}")
    if synonym.setting:
        parts.append(f"`{synonym.setting}`")
    elif synonym.instead:
        reason = synonym.instead_zh if language is CHINESE else synonym.instead
        parts.append(language.words["otherwise" if parts else "refused"].format(reason))
    return "; ".join(parts)


def _list_methods(language: Language) -> list[list[str]]:
    return [
        [
            each.name,
            ", ".join(" + ".join(f"`{key}`" for key in keys) for keys in each.needs),
            each.instead_zh if language is CHINESE else each.instead,
        ]
        for each in known_methods()
    ]


def _format_range(allowed: Range) -> str:
    low, high = ("≤" if is_allowed else "<" for is_allowed in (allowed.low_allowed, allowed.high_allowed))
    return f"{allowed.low} {low} x {high} {allowed.high}"


def _list_values(values: Any) -> str:
    return ", ".join(
        f"`{value if isinstance(value, str) and value else json.dumps(value)}`" for value in values
    )


def _format_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    cells = [
        list(columns),
        ["---"] * len(columns),
        *([cell.replace("|", "\\|") for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main() -> int:
    """Write both documents, or with --check say whether they are current."""
    parser = argparse.ArgumentParser(description="Write docs/settings.md and docs/settings_zh.md.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail when a page is not current"
    )
    options = parser.parse_args()
    outdated = False
    for language in (ENGLISH, CHINESE):
        page, text = ROOT / "docs" / language.file, format_page(language)
        outdated |= not page.is_file() or page.read_text(encoding="utf-8") != text
        if not options.check:
            page.write_text(text, encoding="utf-8")
    return int(outdated and options.check)


if __name__ == "__main__":
    sys.exit(main())
