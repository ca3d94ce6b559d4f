"""Which language a person reads: `FINETUNE_LANG`, or that of the system's locale."""

from __future__ import annotations

import os

LANGUAGE_VARIABLE = "FINETUNE_LANG"
_LOCALE_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")  # the first that is set decides, as in gettext


def language() -> str:
    """The code of the language: "zh" or "en".

    `FINETUNE_LANG` takes these two, longer forms of them ("zh_CN.UTF-8") and nothing else: another value counts as
    English. Without it the locale decides.
    """
    for name in (LANGUAGE_VARIABLE, *_LOCALE_VARIABLES):
        if value := os.environ.get(name):
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"
