"""The chat itself: columns, message, controls, and what their buttons do.

One model answers, or two side by side answer the same messages at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from finetune.errors import UserError
from finetune.serving.chat.page_words import PageWords
from finetune.serving.chat.texts import TEXTS
from finetune.serving.chat.toasts import fault_toast
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.answer_stream import Answerer, AnswerThread
from finetune.serving.predict.responder import Responder

MAX_MESSAGE_CHARACTERS = 40_000
MAX_SYSTEM_CHARACTERS = 20_000
MAX_TURNS = 200
_MAX_NEW_TOKENS = 2048
_STATE_SECONDS = 86_400
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


class ChatPanel:
    """Columns, message and controls, made where a page is being put together.

    Args:
        sides: One model or two.
        defaults: Where the controls stand at first.
        words: Of the page.
        num_columns: How many models there will be, where they come later (`show`).
    """

    def __init__(
        self,
        sides: Sequence[Side],
        defaults: DecodingSettings,
        words: PageWords,
        *,
        num_columns: int | None = None,
    ):
        self.sides = tuple(sides)
        self._defaults = defaults
        self._words = words
        self._num_columns = len(self.sides) if num_columns is None else num_columns
        self._thread = AnswerThread()
        self._stops: dict[str, threading.Event] = {}
        self._build()

    def send(
        self,
        message: str,
        turns: Turns,
        system: str | None,
        *values: Any,
        session: str = "",
        language: str = "en",
    ) -> Iterator[tuple[Turns, list[list[dict[str, str]]]]]:
        """Answers a message by every model, all at once.

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
        sides = self.sides
        if not sides:
            raise UserError(words["no_model"])
        stop = self._stops[session] = threading.Event()
        past = [list(each) for each in turns]
        answers = [""] * len(sides)
        now = [[*each, (message, "")] for each in past]
        yield now, _messages(now)
        try:
            asked = [Answerer(side.responder, each) for side, each in zip(sides, past, strict=False)]
            for number, text in self._thread.stream(
                asked, message, settings, system=(system or "").strip() or None, stop=stop
            ):
                answers[number] += text
                now[number] = [*past[number], (message, answers[number])]
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

    def show(self, sides: Sequence[Side]) -> None:
        """Takes other models; none takes them away."""
        self.sides = tuple(sides)

    def shown(self, language: str) -> list[Any]:
        """Updates of `model_components` after `show`."""
        labels = [side.label(language) for side in self.sides] or [""] * self._num_columns
        most = self._most_tokens()
        return [*(gr.update(label=label) for label in labels), gr.update(maximum=most, value=min(128, most))]

    def _most_tokens(self) -> int:
        limits = [each.responder.position_limit for each in self.sides if each.responder.position_limit]
        return max(1, min([_MAX_NEW_TOKENS, *(limit - 1 for limit in limits)]))

    def _build(self) -> None:
        words = self._words
        language = words.language
        turns = gr.State([[] for _ in range(self._num_columns)], time_to_live=_STATE_SECONDS)
        with gr.Row():
            bots = [self._chatbot(number) for number in range(self._num_columns)]
        if not all(side.responder.keeps_history for side in self.sides):
            words.make(gr.Markdown, "no_history", field="value")
        message = self._message_box()
        with gr.Row():
            send = words.make(gr.Button, "send", field="value", variant="primary", elem_id="send")
            stop = words.make(gr.Button, "stop", field="value", variant="stop", elem_id="stop")
            clear = words.make(gr.Button, "clear", field="value", elem_id="clear")
        with words.make(gr.Accordion, "settings", open=False, elem_id="settings"):
            system = words.make(
                gr.Textbox, "system", info=True, lines=2, elem_id="system", max_length=MAX_SYSTEM_CHARACTERS
            )
            controls = self._controls()
            markdown = words.make(gr.Checkbox, "markdown", info=True, value=False, elem_id="markdown")
        markdown.change(
            lambda on: [gr.update(render_markdown=on)] * len(bots) if len(bots) > 1 else gr.update(render_markdown=on),
            markdown, bots, queue=False, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        self.model_components = [*bots, controls[list(_CONTROLS).index("max_new_tokens")]]
        self._connect(
            [message, turns, language, system, *controls], bots, sends=send, stops=stop, clears=clear
        )

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
                raise fault_toast(error, language) from None

        def on_stop(request: gr.Request) -> None:
            self.stop(request.session_hash or "")

        def on_clear(request: gr.Request) -> Any:
            self.stop(request.session_hash or "")
            empty: Turns = [[] for _ in bots]
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

    def _chatbot(self, number: int) -> Any:
        def label(language: str) -> str:
            return self.sides[number].label(language) if self.sides else ""

        # As it is: the data's own "#" and "*" must not become headings and italics.
        bot = gr.Chatbot(
            label=label(self._words.initial), height=460, elem_id=f"answers{number}", buttons=["copy"],
            render_markdown=False, feedback_options=None,
        )  # fmt: skip
        return self._words.add(bot, lambda language: gr.update(label=label(language)))

    def _message_box(self) -> Any:
        def words(language: str) -> dict[str, str]:
            texts = self._words.texts[language]
            return {"label": texts["message"], "placeholder": texts["placeholder"]}

        box = gr.Textbox(
            **words(self._words.initial), lines=1, max_lines=8, elem_id="message", autofocus=True,
            max_length=MAX_MESSAGE_CHARACTERS,
        )  # fmt: skip
        return self._words.add(box, lambda language: gr.update(**words(language)))

    def _controls(self) -> list[Any]:
        most = self._most_tokens()
        made = []
        with gr.Row():
            for name, (kind, options) in _CONTROLS.items():
                value = getattr(self._defaults, name)
                if name == "max_new_tokens":
                    options = options | {"maximum": most}
                    value = min(value, most if most == _MAX_NEW_TOKENS else max(1, most // 2))
                made.append(
                    self._words.make(
                        kind, name, info=True, value=value, min_width=280, elem_id=name, **options
                    )
                )
        return made


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
