"""The third tab: the model before and after a finished run, side by side, both answering at once."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from typing import Any

import gradio as gr
from anyio import to_thread

from finetune.commands.page.controller import RunController
from finetune.commands.page.drawing import draw_lines
from finetune.commands.page.handlers import telling
from finetune.commands.page.trial import chat_options
from finetune.errors import UserError
from finetune.machine.stop_signals import renew_handlers
from finetune.serving.chat.page_words import PageWords
from finetune.serving.chat.panel import ChatPanel
from finetune.serving.chat.run import load_sides
from finetune.serving.decoding.settings import DecodingSettings


class TryTab:
    """Components of the tab and their handlers.

    Args:
        words: Of the page.
        controller: Finds runs.
        name: Component with the chosen run.
    """

    def __init__(self, words: PageWords, controller: RunController, name: Any):
        self._words, self._controller = words, controller
        self._loading = threading.Lock()
        words.make(gr.Markdown, "load_note", field="value")
        with gr.Row():
            load = words.make(gr.Button, "load", field="value", variant="primary", elem_id="load")
            unload = words.make(gr.Button, "unload", field="value", elem_id="unload")
        self._told = gr.HTML(elem_id="loaded")
        self.panel = ChatPanel((), DecodingSettings(temperature=0.0, top_k=0), words, num_columns=2)
        load.click(
            self._load_beside, [words.language, name], [self._told, *self.panel.model_components],
            trigger_mode="once", concurrency_limit=1, api_visibility="private",
        )  # fmt: skip
        unload.click(
            telling(self._unload),
            words.language,
            [self._told, *self.panel.model_components],
            api_visibility="private",
        )

    def unload(self) -> None:
        """Gives the memory of the models back."""
        self.panel.show(())
        gc.collect()

    async def _load_beside(self, language: str, name: str | None) -> list[Any]:
        """Loads in a thread, while the page answers others."""
        try:
            return await to_thread.run_sync(telling(self._load), language, name)
        finally:
            renew_handlers()  # in the main thread, where coroutines run

    def _load(self, language: str, name: str | None) -> list[Any]:
        words = self._words.texts[language]
        if not name or not self._controller.state(name).can_be_tried:
            raise UserError(words["not_finished"].format(name=name or ""))
        if self._controller.current() is not None:
            raise UserError(words["is_training"])
        with self._loading:
            self.unload()
            before, after = load_sides(chat_options(self._controller.folder(name).output))
            self.panel.show((before, replace(after, name=name)))
        return [draw_lines([words["loaded"].format(name=name)], sign="✓ "), *self.panel.shown(language)]

    def _unload(self, language: str) -> list[Any]:
        self.unload()
        return [draw_lines([self._words.texts[language]["unloaded"]]), *self.panel.shown(language)]
