"""The chat page: one model, or two side by side that answer the same messages.

The page loads nothing from elsewhere: system fonts, no analytics, and a content security policy that makes
the browser refuse whatever a library might still ask for. Who may ask it for what is `finetune.serving.chat.guard`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from fastapi import FastAPI

from finetune.errors import UserError
from finetune.serving.chat.guard import Access, Guard
from finetune.serving.chat.texts import LANGUAGES, TEXTS, other_language, preferred_language
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.answer_stream import AnswerThread
from finetune.serving.predict.responder import Responder

MAX_MESSAGE_CHARACTERS = 40_000
MAX_SYSTEM_CHARACTERS = 20_000
MAX_TURNS = 200
_MAX_WAITING = 32
_STATE_SECONDS = 86_400
_FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "sans-serif",
)
_CSS = """
footer { display: none !important }
.gradio-container { width: 100% !important; max-width: 1200px !important; margin: 0 auto !important }
#header { align-items: center; flex-wrap: nowrap }
#header h1 { margin: 0 }
#language { flex-grow: 0; min-width: 6em }
[id^=answers] { border: 1px solid var(--border-color-primary) }
"""
_CONTROLS: dict[str, tuple[type, dict[str, Any]]] = {
    "temperature": (gr.Slider, {"minimum": 0, "maximum": 2, "step": 0.05}),
    "top_p": (gr.Slider, {"minimum": 0.05, "maximum": 1, "step": 0.05}),
    "top_k": (gr.Slider, {"minimum": 0, "maximum": 200, "step": 1}),
    "repetition_penalty": (gr.Slider, {"minimum": 0.8, "maximum": 2, "step": 0.05}),
    "max_new_tokens": (gr.Slider, {"minimum": 1, "step": 1}),
    "seed": (gr.Number, {"precision": 0}),
}
Turns = list[list[tuple[str, str]]]


@dataclass(frozen=True)
class Side:
    """One model of the page.

    Attributes:
        responder: The model.
        name: Path or name that is shown.
        role: Key of the words before the name: "model", "before" or "after".
    """

    responder: Responder
    name: str
    role: str = "model"

    def label(self, language: str) -> str:
        """Heading of the column."""
        return f"{TEXTS[language][self.role]}: {self.name}"


class ChatPage:
    """The page and what its buttons do.

    Args:
        sides: One model or two.
        defaults: Where the controls stand at first.
        language: Of the page at first; the browser's own is taken when it asks for one.
    """

    def __init__(self, sides: Sequence[Side], defaults: DecodingSettings, language: str = "en"):
        self._sides = tuple(sides)
        self._defaults = defaults
        self._thread = AnswerThread()
        self._stops: dict[str, threading.Event] = {}
        self._labelled: list[tuple[Any, Callable[[str], Any]]] = []
        self._language = language
        self.blocks = self._build()

    def send(
        self,
        message: str,
        turns: Turns,
        system: str | None,
        *values: Any,
        session: str = "",
        language: str = "en",
    ) -> Iterator[tuple[Turns, list[list[dict[str, str]]]]]:
        """Answers a message by every model in turn.

        Args:
            message: What the person wrote.
            turns: Of each model, the turns so far.
            system: System text; empty leaves it to the template.
            *values: Of the controls.
            session: Names the browser tab, for `stop`.
            language: Of what is said about the message.

        Yields:
            Turns and messages to show, again at every new stretch of text.

        Raises:
            UserError: There is no room for such an answer, or a text or value is out of its range.
        """
        words = TEXTS[language]
        check_lengths(message, system or "", max(map(len, turns), default=0), words)
        settings = self._settings(values, words)
        stop = self._stops[session] = threading.Event()
        past = [list(each) for each in turns]
        now = [[*each, (message, "")] for each in past]
        yield now, _messages(now)
        try:
            for number, side in enumerate(self._sides):
                answer = ""
                for text in self._thread.stream(
                    side.responder,
                    past[number],
                    message,
                    settings,
                    system=(system or "").strip() or None,
                    stop=stop,
                ):
                    answer += text
                    now[number] = [*past[number], (message, answer)]
                    yield now, _messages(now)
        finally:
            if self._stops.get(session) is stop:
                del self._stops[session]

    def stop(self, session: str = "") -> None:
        """Ends the answer of a tab where it is."""
        if event := self._stops.get(session):
            event.set()

    def _settings(self, values: Sequence[Any], words: dict[str, str]) -> DecodingSettings:
        chosen: dict[str, Any] = dict(zip(_CONTROLS, values, strict=True))
        for name, value in chosen.items():
            whole = name in ("top_k", "max_new_tokens", "seed")
            try:
                chosen[name] = int(value or 0) if whole else float(value or 0)
            except (TypeError, ValueError, OverflowError):
                raise UserError(words["no_number"].format(name=words[name], value=repr(value)[:40])) from None
        least = min(self._defaults.min_new_tokens, chosen["max_new_tokens"])
        return replace(self._defaults, min_new_tokens=least, **chosen)

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="Chat 对话", analytics_enabled=False) as blocks:
            with gr.Row(elem_id="header"):
                self._words(gr.Markdown, "title", field="value", before="# ")
                switch = gr.Button(size="sm", elem_id="language")
            language = gr.State(self._language)
            self._labelled.append((switch, lambda code: gr.update(value=LANGUAGES[other_language(code)])))
            turns = gr.State([[] for _ in self._sides], time_to_live=_STATE_SECONDS)
            with gr.Row():
                bots = [self._chatbot(number, side) for number, side in enumerate(self._sides)]
            if not all(side.responder.keeps_history for side in self._sides):
                self._words(gr.Markdown, "no_history", field="value")
            message = self._message_box()
            with gr.Row():
                send = self._words(gr.Button, "send", field="value", variant="primary", elem_id="send")
                stop = self._words(gr.Button, "stop", field="value", variant="stop", elem_id="stop")
                clear = self._words(gr.Button, "clear", field="value", elem_id="clear")
            with self._words(gr.Accordion, "settings", open=False, elem_id="settings"):
                system = self._words(
                    gr.Textbox,
                    "system",
                    info=True,
                    lines=2,
                    elem_id="system",
                    max_length=MAX_SYSTEM_CHARACTERS,
                )
                controls = self._controls()
                markdown = self._words(gr.Checkbox, "markdown", info=True, value=False, elem_id="markdown")
            markdown.change(
                lambda on: [gr.update(render_markdown=on)] * len(bots) if len(bots) > 1 else gr.update(render_markdown=on),
                markdown, bots, queue=False, show_progress="hidden", api_visibility="private",
            )  # fmt: skip
            self._connect(
                [message, turns, language, system, *controls], bots, sends=send, stops=stop, clears=clear
            )
            targets = [component for component, _ in self._labelled]
            quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
            switch.click(self._switch, language, [language, *targets], **quiet)
            blocks.load(self._initial_texts, None, [language, *targets], **quiet)
        return blocks

    def _connect(self, inputs: list[Any], bots: list[Any], *, sends: Any, stops: Any, clears: Any) -> None:
        message, turns = inputs[:2]

        def on_send(
            request: gr.Request, text: str, past: Turns, language: str, system: str | None, *values: Any
        ) -> Iterator[Any]:
            if not text.strip():
                yield [gr.skip() for _ in range(2 + len(bots))]
                return
            session = request.session_hash or ""
            try:
                for now, shown in self.send(text, past, system, *values, session=session, language=language):
                    yield ["", now, *shown]
            except UserError as error:
                yield [text, past, *_messages(past)]
                raise gr.Error(str(error), print_exception=False) from None

        def on_stop(request: gr.Request) -> None:
            self.stop(request.session_hash or "")

        def on_clear(request: gr.Request) -> Any:
            self.stop(request.session_hash or "")
            empty: Turns = [[] for _ in self._sides]
            return [empty, *_messages(empty)]

        outputs = [message, turns, *bots]
        sending = gr.on(
            [sends.click, message.submit], on_send, inputs, outputs,
            trigger_mode="once", concurrency_limit=8, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        stops.click(on_stop, None, None, queue=False, api_visibility="private")
        gr.on(
            [clears.click, *(bot.clear for bot in bots)], on_clear, None, [turns, *bots],
            queue=False, cancels=[sending], show_progress="hidden", api_visibility="private",
        )  # fmt: skip

    def _chatbot(self, number: int, side: Side) -> Any:
        # As it is: the data's own "#" and "*" must not become headings and italics.
        bot = gr.Chatbot(
            label=side.label(self._language), height=460, elem_id=f"answers{number}", buttons=["copy"],
            render_markdown=False, feedback_options=None,
        )  # fmt: skip
        self._labelled.append((bot, lambda language: gr.update(label=side.label(language))))
        return bot

    def _message_box(self) -> Any:
        words = TEXTS[self._language]
        box = gr.Textbox(
            label=words["message"], placeholder=words["placeholder"], lines=1, max_lines=8,
            elem_id="message", autofocus=True, max_length=MAX_MESSAGE_CHARACTERS,
        )  # fmt: skip
        self._labelled.append((
            box,
            lambda code: gr.update(label=TEXTS[code]["message"], placeholder=TEXTS[code]["placeholder"]),
        ))  # fmt: skip
        return box

    def _controls(self) -> list[Any]:
        limits = [each.responder.position_limit for each in self._sides if each.responder.position_limit]
        most = max(1, min([2048, *(limit - 1 for limit in limits)]))
        made = []
        with gr.Row():
            for name, (kind, options) in _CONTROLS.items():
                value = getattr(self._defaults, name)
                if name == "max_new_tokens":
                    options = options | {"maximum": most}
                    value = min(value, max(1, most // 2) if limits else most)
                made.append(
                    self._words(kind, name, info=True, value=value, min_width=280, elem_id=name, **options)
                )
        return made

    def _words(
        self,
        kind: type,
        key: str,
        *,
        field: str = "label",
        info: bool = False,
        before: str = "",
        **options: Any,
    ) -> Any:
        """A component whose words change with the language."""

        def words(language: str) -> dict[str, str]:
            texts = TEXTS[language]
            return {field: before + texts[key]} | ({"info": texts[f"{key}_info"]} if info else {})

        component = kind(**words(self._language), **options)
        self._labelled.append((component, lambda language: gr.update(**words(language))))
        return component

    def _switch(self, language: str) -> list[Any]:
        return self._texts_in(other_language(language))

    def _initial_texts(self, request: gr.Request) -> list[Any]:
        return self._texts_in(preferred_language(request.headers.get("accept-language")))

    def _texts_in(self, language: str) -> list[Any]:
        """The language and the words of all components in it."""
        return [language, *(update(language) for _, update in self._labelled)]


def build_app(page: ChatPage, access: Access | None = None) -> FastAPI:
    """The page as a web application.

    Args:
        page: What it shows.
        access: Who may use it; by default who calls it by an address or as localhost.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    app.add_middleware(Guard, access=access or Access())
    theme = gr.themes.Soft(font=_FONTS, font_mono=("ui-monospace", "Consolas", "monospace"))
    page.blocks.queue(api_open=False, max_size=_MAX_WAITING)
    served: FastAPI = gr.mount_gradio_app(
        app, page.blocks, path="/", footer_links=[], ssr_mode=False, theme=theme, css=_CSS, pwa=False
    )
    return served


def check_lengths(message: str, system: str, num_turns: int, words: dict[str, str]) -> None:
    """Refuses what a browser would not have let through, and a conversation without end.

    Raises:
        UserError: A text is too long, or there are too many turns; in the words of a language.
    """
    for text, name, limit in (
        (message, "message", MAX_MESSAGE_CHARACTERS),
        (system, "system", MAX_SYSTEM_CHARACTERS),
    ):
        if len(text) > limit:
            raise UserError(words["too_long"].format(name=words[name], num=len(text), limit=limit))
    if num_turns >= MAX_TURNS:
        raise UserError(words["too_many_turns"].format(limit=MAX_TURNS))


def _messages(turns: Turns) -> list[list[dict[str, str]]]:
    """What each column shows."""
    return [
        [
            {"role": role, "content": text}
            for asked, said in each
            for role, text in (("user", asked), ("assistant", said))
        ]
        for each in turns
    ]
