"""The words of a page in two languages, and the button that changes between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from finetune.serving.chat.texts import LANGUAGES, other_language, preferred_language

_QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


class PageWords:
    """Makes components whose words change with the language of the browser or at a click.

    Args:
        texts: Words by language and key.
        language: Of the page before a browser asks for its own.
    """

    def __init__(self, texts: Mapping[str, Mapping[str, str]], language: str = "en"):
        self.texts = texts
        self.initial = language
        self._labelled: list[tuple[Any, Callable[[str], Any]]] = []

    def add(self, component: Any, update: Callable[[str], Any]) -> Any:
        """Has a component changed with the language; `update` gives what Gradio calls an update."""
        self._labelled.append((component, update))
        return component

    def make(
        self,
        kind: type,
        key: str,
        *,
        field: str = "label",
        info: bool = False,
        before: str = "",
        **options: Any,
    ) -> Any:
        """A component whose words change.

        Args:
            kind: Its class.
            key: Of the words; those of its information are at `key` with "_info".
            field: Where the words go.
            info: Whether it has information.
            before: Stands before the words.
            **options: For the component.
        """

        def words(language: str) -> dict[str, str]:
            texts = self.texts[language]
            return {field: before + texts[key]} | ({"info": texts[f"{key}_info"]} if info else {})

        component = kind(**words(self.initial), **options)
        return self.add(component, lambda language: gr.update(**words(language)))

    def build_header(self) -> gr.State:
        """Title and button; the language of the browser tab."""
        with gr.Row(elem_id="header"):
            self.make(gr.Markdown, "title", field="value", before="# ")
            self._switch = gr.Button(size="sm", elem_id="language")
        self.language = gr.State(self.initial)
        self.add(self._switch, lambda code: gr.update(value=LANGUAGES[other_language(code)]))
        return self.language

    def connect(self, blocks: gr.Blocks) -> None:
        """Lets the button and the browser choose; to be called when every component is made."""
        targets = [self.language, *(component for component, _ in self._labelled)]
        self._switch.click(self._change, self.language, targets, **_QUIET)
        blocks.load(self._begin, None, targets, **_QUIET)

    def _change(self, language: str) -> list[Any]:
        return self._updates(other_language(language))

    def _begin(self, request: gr.Request) -> list[Any]:
        return self._updates(preferred_language(request.headers.get("accept-language")))

    def _updates(self, language: str) -> list[Any]:
        return [language, *(update(language) for _, update in self._labelled)]
