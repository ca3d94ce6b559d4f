"""The text of ``--help``: settings by group with their defaults, in 80 columns."""

import json
from collections.abc import Iterator
from difflib import get_close_matches

from finetune.errors import UserError
from finetune.machine.command_names import TRAIN, usage_name
from finetune.machine.language.choice import language
from finetune.machine.language.columns import count_columns, wrap
from finetune.machine.language.translation import translate, translate_piece
from finetune.settings.records import Setting
from finetune.settings.registry import known_settings

_WIDTH = 80
_KEY_WIDTH = 34
_TITLES = {
    "model": "Model and method",
    "data": "Data",
    "training": "Training (PaddleNLP's TrainingArguments)",
    "generation": "Generation",
    "alignment": "Preference alignment",
    "quant": "Quantisation",
}


def format_help(*, every_setting: bool, command: str = TRAIN) -> str:
    """The help text: everything, or what is commonly set.

    Args:
        every_setting: Whether it is everything.
        command: Whose usage it tells.
    """
    settings = known_settings().values()
    blocks = list(_format_usage(usage_name(command)))
    for group, title in _TITLES.items():
        shown = [each for each in settings if each.group == group and (each.common or every_setting)]
        if shown:
            blocks.append("\n".join([f"{translate_piece(title)}:", *map(_format_setting, shown)]))
    if not every_setting:
        blocks.append(
            translate(f"--help-all shows all {len(settings)} settings, --help WORD those that have the word.")
        )
    return "\n\n".join(blocks)


def _format_usage(name: str) -> Iterator[str]:
    label = translate_piece("usage:") + " "
    lead = " " * count_columns(label)
    yield f"{label}{name} ARGS.json [--key value ...]\n{lead}{name} --key value [--key=value ...]"
    yield wrap(
        translate(
            "Fine-tune a generative language model. Settings come from a file in JSON or YAML (ARGS.yaml), from the "
            "command line, or both; the command line wins. A flag needs no value (--do_train is true; true/false, yes/no, "
            "on/off and 1/0 are read, too), a list takes several words, null stands for the default. Defaults are in "
            "brackets."
        ),
        _WIDTH,
    )


def format_matches(word: str) -> str:
    """The settings whose name, help or choices have a word, in both languages; capitals and dashes do not count.

    Raises:
        UserError: None has it.
    """
    settings = known_settings()
    wanted = word.strip("-").lower().replace("-", "_")
    found = [each for each in settings.values() if wanted in _searched_text(each)]
    if not found or not wanted:
        near = get_close_matches(wanted, settings, n=3, cutoff=0.6)
        hint = f"did you mean {', '.join(near)}?" if near else "--help-all shows every setting"
        raise UserError(f'no setting has "{word}" in its name or help: {hint}')
    noun = "setting has" if len(found) == 1 else "settings have"
    title = translate(f'{len(found)} {noun} "{word}" in name or help:')
    return "\n".join([title, *map(_format_setting, found)])


def _searched_text(setting: Setting) -> str:
    texts = (setting.name, *setting.aliases, setting.help, setting.help_zh, *map(str, setting.choices or ()))
    text = " ".join(texts).lower()
    return f"{text} {text.replace('-', '_')}"


def _format_setting(setting: Setting) -> str:
    key = f"  --{setting.name} [{_format_default(setting)}]"
    choices = f" ({', '.join(setting.choices)})" if setting.choices else ""
    indent = " " * _KEY_WIDTH
    text = setting.help_zh if language() == "zh" and setting.help_zh else translate(setting.help)
    lines = [indent + line for line in wrap(text + choices, _WIDTH - _KEY_WIDTH).split("\n")]
    if len(key) >= _KEY_WIDTH:
        return "\n".join([key, *lines])
    lines[0] = key.ljust(_KEY_WIDTH) + lines[0].lstrip()
    return "\n".join(lines)


def _format_default(setting: Setting) -> str:
    """The default as it stands in an argument file, texts without their quotes."""
    if setting.default == []:
        return "none"
    return str(setting.default) if setting.type == "str" and setting.default else json.dumps(setting.default)
