"""The page: three tabs to prepare a run, to watch it, and to try out what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from finetune.commands.page.controller import RunController
from finetune.commands.page.drawing import CSS
from finetune.commands.page.handlers import QUIET
from finetune.commands.page.prepare_tab import PrepareTab
from finetune.commands.page.run_tab import RunTab
from finetune.commands.page.texts import TEXTS
from finetune.commands.page.try_tab import TryTab
from finetune.serving.chat.page_words import PageWords

_SHOW_RUN = "() => { document.querySelectorAll('#steps button[role=tab]')[1].click() }"
"""In the browser: Gradio 6.17 does not show another tab when it is told to select it."""


class TrainingPage:
    """The page and what its parts tell each other.

    Args:
        controller: Starts and finds runs.
        folder: Models and data below it are offered.
        language: Of the page at first; the browser's own is taken when it asks for one.
    """

    css = CSS

    def __init__(self, controller: RunController, folder: Path, language: str = "en"):
        words = PageWords(TEXTS, language)
        with gr.Blocks(title="Fine-tuning 微调", analytics_enabled=False) as self.blocks:
            words.build_header()
            with gr.Tabs(elem_id="steps"):
                with words.make(gr.Tab, "tab_prepare"):
                    self.prepare = PrepareTab(words, controller, folder)
                with words.make(gr.Tab, "tab_run"):
                    self.run = RunTab(words, controller)
                with words.make(gr.Tab, "tab_try"):
                    self.trial = TryTab(words, controller, self.run.name)
            started: Any = self.prepare.start(before=self.trial.unload)
            started.success(self.run.choose, self.prepare.name, self.run.choosers, **QUIET).success(
                **self.run.refreshing()
            ).success(None, js=_SHOW_RUN, **QUIET).success(**self.prepare.naming())
            self.run.connect(before_resume=self.trial.unload)
            words.connect(self.blocks)
            self.run.begin(self.blocks)
            self.blocks.load(**self.prepare.naming())
