"""Messages that a page shows for some seconds."""

from __future__ import annotations

import html

import gradio as gr

from finetune.errors import UserError
from finetune.machine.language.translation import chinese


def fault_toast(error: UserError, language: str) -> gr.Error:
    """What a handler raises to tell a fault, in the language of the page.

    Gradio shows messages as HTML. Faults quote what was typed and what stands in files, so they are escaped.
    """
    faults = error.faults if language == "en" else [chinese().translate_piece(each) for each in error.faults]
    return gr.Error("<br>".join(map(html.escape, faults)), print_exception=False)
