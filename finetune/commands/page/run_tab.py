"""The second tab: how far a run is, its curve, its log; stop and go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from finetune.commands.page.controller import RunController
from finetune.commands.page.drawing import draw_curve, draw_lines, draw_log, draw_state
from finetune.commands.page.handlers import QUIET, telling
from finetune.commands.page.run_folder import FAILED, RUNNING, STARTING, STOPPED, read_log_end
from finetune.serving.chat.page_words import PageWords

_SECONDS = 3.0
"""Between two looks at a run; an address may ask 120 times a minute."""


class RunTab:
    """Components of the tab and their handlers.

    Args:
        words: Of the page.
        controller: Finds runs.
    """

    def __init__(self, words: PageWords, controller: RunController):
        self._words, self._controller = words, controller
        self.name = words.make(gr.Dropdown, "run", info=True, choices=[], elem_id="run")
        self._known = gr.State([])
        self._state = gr.HTML(elem_id="state")
        with gr.Row():
            self._stop = words.make(
                gr.Button, "stop_run", field="value", variant="stop", interactive=False, elem_id="stop_run"
            )
            self._resume = words.make(gr.Button, "resume", field="value", interactive=False, elem_id="resume")
        self._curve = gr.HTML(elem_id="curve")
        words.make(gr.Markdown, "log", field="value", before="#### ")
        self._log = gr.HTML(elem_id="log")

    @property
    def choosers(self) -> list[Any]:
        """Components that `choose` updates."""
        return [self.name, self._known]

    def choose(self, name: str | None) -> list[Any]:
        """Has a run shown; None takes the one that was started last."""
        names = self._controller.names()
        chosen = name if name in names else next(iter(names), None)
        return [gr.update(choices=names, value=chosen), names]

    def refreshing(self) -> dict[str, Any]:
        """The event that shows how far the run is."""
        return {
            "fn": self._refresh,
            "inputs": [self._words.language, self.name, self._known],
            "outputs": [*self.choosers, self._state, self._curve, self._log, self._stop, self._resume],
            **QUIET,
        }

    def connect(self, before_resume: Callable[[], None]) -> None:
        """Connects the buttons.

        Args:
            before_resume: Called before a run goes on, to make room.
        """

        def on_resume(language: str, name: str | None) -> None:
            before_resume()
            self._controller.resume(name or "", language=language)
            gr.Info(self._words.texts[language]["started"].format(name=name))

        def on_stop(language: str, name: str | None) -> None:
            self._controller.stop(name or "")
            gr.Info(self._words.texts[language]["stop_told"])

        for button, handler in ((self._stop, on_stop), (self._resume, on_resume)):
            button.click(telling(handler), [self._words.language, self.name], None, **QUIET).then(
                **self.refreshing()
            )
        self.name.input(**self.refreshing())
        gr.Timer(_SECONDS).tick(**self.refreshing())

    def begin(self, blocks: gr.Blocks) -> None:
        """Shows the newest run when a browser opens the page, after the page's language is known."""
        blocks.load(lambda: self.choose(None), None, self.choosers, **QUIET).then(**self.refreshing())

    def _refresh(self, language: str, name: str | None, known: list[str]) -> list[Any]:
        words = self._words.texts[language]
        names = self._controller.names()
        chosen = name if name in names else next(iter(names), None)
        is_new = names != known or chosen != name
        choosers = [gr.update(choices=names, value=chosen), names] if is_new else [gr.skip(), gr.skip()]
        if chosen is None:
            off = gr.update(interactive=False)
            return [*choosers, draw_lines([words["no_run"]]), "", "", off, off]
        state = self._controller.state(chosen)
        return [
            *choosers,
            draw_state(state, words),
            draw_curve(state, words),
            draw_log(read_log_end(self._controller.folder(chosen))),
            gr.update(interactive=state.kind in (STARTING, RUNNING)),
            gr.update(interactive=state.kind in (STOPPED, FAILED)),
        ]
