"""The first tab: model, data, method, settings; what would be learned, what it would take, and the start."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from finetune.commands.page.choices import (
    METHODS,
    OFFERED,
    Choices,
    argument_files,
    choose_arguments,
    compose_arguments,
    file_defaults,
    find_offers,
    in_language,
    look,
)
from finetune.commands.page.controller import RunController
from finetune.commands.page.drawing import draw_lines, draw_preview, draw_text
from finetune.commands.page.handlers import QUIET, telling
from finetune.commands.page.looks import show_plan, show_preview
from finetune.errors import UserError
from finetune.serving.chat.page_words import PageWords

_FIRST_FILE = "llama/lora"
_MAX_NUMBER = 30


class PrepareTab:
    """Components of the tab and their handlers.

    Args:
        words: Of the page.
        controller: Starts runs.
        folder: Models and data below it are offered.
    """

    def __init__(self, words: PageWords, controller: RunController, folder: Path):
        self._words, self._controller = words, controller
        models, data = find_offers(folder)
        self.model = self._path("model_folder", models)
        self.data = self._path("data_path", data)
        looked = words.make(gr.Button, "look", field="value", elem_id="look")
        self._findings = gr.HTML(elem_id="findings")
        self.method = self._method()
        self.file = words.make(
            gr.Dropdown,
            "argument_file",
            info=True,
            choices=argument_files(),
            value=_FIRST_FILE,
            elem_id="argument_file",
        )
        self._settings = self._make_settings()
        self.name = words.make(
            gr.Textbox,
            "run_name",
            info=True,
            max_length=64,
            elem_id="run_name",
        )
        with gr.Row():
            preview = words.make(gr.Button, "preview", field="value", elem_id="preview")
            plan = words.make(gr.Button, "plan", field="value", elem_id="plan")
            self._start = words.make(gr.Button, "start", field="value", variant="primary", elem_id="start")
        self._shown = gr.HTML(elem_id="shown")
        self._connect(looked, preview, plan)

    @property
    def _chosen(self) -> list[Any]:
        return [self.model, self.data, self.file, *self._settings]

    def naming(self) -> dict[str, Any]:
        """The event that proposes a name for the next run."""
        return {"fn": lambda: time.strftime("run-%m%d-%H%M%S"), "inputs": None, "outputs": self.name, **QUIET}

    def start(self, before: Callable[[], None]) -> Any:
        """Connects the button that starts; the event goes on where the run has started.

        Args:
            before: Called before, to make room.
        """

        def on_start(language: str, name: str, *chosen: Any) -> None:
            arguments = compose_arguments(_choices(*chosen)).values
            before()
            self._controller.start(name.strip(), arguments, language=language)
            gr.Info(self._words.texts[language]["started"].format(name=name.strip()))

        return self._start.click(
            telling(on_start), [self._words.language, self.name, *self._chosen], None,
            trigger_mode="once", show_progress="hidden", api_visibility="private",
        )  # fmt: skip

    def _path(self, key: str, offers: list[str]) -> Any:
        return self._words.make(
            gr.Dropdown,
            key,
            info=True,
            choices=offers,
            value=offers[0] if offers else "",
            allow_custom_value=True,
            elem_id=key,
        )

    def _method(self) -> Any:
        def options(language: str) -> dict[str, Any]:
            words = self._words.texts[language]
            choices = [(words[f"method_{name}"], name) for name in METHODS]
            return {"label": words["method"], "info": words["method_info"], "choices": choices}

        radio = gr.Radio(value=METHODS[0], elem_id="method", **options(self._words.initial))
        return self._words.add(radio, lambda language: gr.update(**options(language)))

    def _make_settings(self) -> list[Any]:
        made = []
        defaults = file_defaults(_FIRST_FILE)
        with self._words.make(gr.Accordion, "run_settings", open=False, elem_id="run_settings"), gr.Row():
            for name in OFFERED:
                options: dict[str, Any] = {
                    "placeholder": _shown(defaults[name]),
                    "min_width": 260,
                    "elem_id": name,
                }
                made.append(self._words.make(gr.Textbox, name, info=True, max_length=_MAX_NUMBER, **options))
        return made

    def _connect(self, looked: Any, preview: Any, plan: Any) -> None:
        language = self._words.language
        looked.click(
            telling(self._look), [language, self.model, self.data], [self._findings, self.method, self.file, *self._settings],
            api_visibility="private",
        )  # fmt: skip
        self.method.input(
            telling(self._choose_method),
            [language, self.method, self.file],
            [self.file, *self._settings],
            **QUIET,
        )
        self.file.input(lambda name: _placeholders(name), self.file, self._settings, **QUIET)
        for button, show in ((preview, show_preview), (plan, show_plan)):
            button.click(
                telling(self._showing(show)), [language, *self._chosen], self._shown,
                trigger_mode="once", concurrency_limit=1, concurrency_id="looks", api_visibility="private",
            )  # fmt: skip

    def _look(self, language: str, model: str | None, data: str | None) -> list[Any]:
        finding = look(model or "", data or "")
        file = choose_arguments(finding.family, finding.method)
        lines = [in_language(line, language) for line in finding.lines]
        return [
            draw_lines(lines, sign="✓ "),
            gr.update(value=finding.method),
            gr.update(value=file),
            *_placeholders(file),
        ]

    def _choose_method(self, language: str, method: str, file: str) -> list[Any]:
        name = choose_arguments((file or _FIRST_FILE).partition("/")[0], method)
        return [gr.update(value=name), *_placeholders(name)]

    def _showing(self, show: Callable[..., str]) -> Callable[..., Any]:
        def on_show(language: str, *chosen: Any) -> str:
            first = compose_arguments(_choices(*chosen))
            notes = draw_lines([in_language(note, language) for note in first.notes])
            shown = show(first.values, language=language)
            if show is show_preview:
                return notes + draw_lines([self._words.texts[language]["preview_note"]]) + draw_preview(shown)
            return notes + draw_text(shown)

        return on_show


def _choices(model: str | None, data: str | None, file: str | None, *settings: str | None) -> Choices:
    """What the components say.

    Raises:
        UserError: A text is no text.
    """
    texts = [model or "", data or "", file or "", *(setting or "" for setting in settings)]
    if not all(isinstance(text, str) for text in texts):
        raise UserError("what was entered is no text: write it again")
    return Choices(
        model=texts[0], data=texts[1], arguments=texts[2], settings=dict(zip(OFFERED, texts[3:], strict=True))
    )


def _placeholders(file: str) -> list[Any]:
    if file not in argument_files():
        return [gr.skip() for _ in OFFERED]
    return [gr.update(placeholder=_shown(value)) for value in file_defaults(file).values()]


def _shown(value: Any) -> str:
    return "" if value is None else str(value)
