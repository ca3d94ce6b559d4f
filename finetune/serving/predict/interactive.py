"""A conversation on a terminal: text as it is generated, commands that begin with a slash."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from finetune.errors import UserError
from finetune.machine.screen import print_text
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.responder import Responder

HELP = "/clear begins a new conversation, /system TEXT sets the system text, /exit or Ctrl-D leaves; Ctrl-C stops an answer."


class Terminal:
    """Asks, answers, and remembers the conversation.

    Args:
        responder: The model.
        settings: How to generate.
        output: Where answers go.
        ask: Shows its argument and returns a line; raises EOFError at the end.
    """

    def __init__(
        self,
        responder: Responder,
        settings: DecodingSettings,
        *,
        output: TextIO | None = None,
        ask: Callable[[str], str] = input,
    ):
        self._responder = responder
        self._settings = settings
        self._output = output if output is not None else sys.stdout
        self._ask = ask
        self._turns: list[tuple[str, str]] = []
        self._system: str | None = None

    def run(self, prompt: str = "> ") -> None:
        """Until the input ends or /exit."""
        while True:
            try:
                line = self._ask(prompt)
            except EOFError:
                return
            except KeyboardInterrupt:
                self._write(f"\n{HELP}\n")
                continue
            if line.strip() in ("/exit", "/quit"):
                return
            if line.strip():
                self._handle(line)

    def _handle(self, line: str) -> None:
        command, _, rest = line.strip().partition(" ")
        if command == "/clear":
            self._turns.clear()
            self._write("A new conversation.\n")
        elif command == "/system":
            self._system = rest.strip() or None
            self._turns.clear()
            self._write("System text set; a new conversation.\n")
        elif command.startswith("/") and command[1:].isalpha():
            self._write(HELP + "\n")
        else:
            self._answer(line)

    def _answer(self, message: str) -> None:
        shown: list[str] = []

        def show(text: str) -> None:
            shown.append(text)
            self._write(text)

        try:
            with _interruptible():
                self._responder.answer(
                    self._turns, message, self._settings, system=self._system, on_text=show
                )
        except KeyboardInterrupt:
            self._write(" [stopped]")
        except UserError as error:
            self._write(f"{error}\n")
            return
        self._write("\n")
        if self._responder.keeps_history:
            self._turns.append((message, "".join(shown)))

    def _write(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises here, whatever the libraries have installed meanwhile."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def converse(responder: Responder, settings: DecodingSettings) -> None:
    """Talks with the person at the terminal; without one, answers each line of the input."""
    for stream in (sys.stdin, sys.stdout):
        with contextlib.suppress(AttributeError):  # a stand-in of a test or a notebook
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not sys.stdin.isatty():
        Terminal(responder, settings).run(prompt="")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` line editing and its history)
    print_text(HELP, stream=sys.stderr)
    if not responder.keeps_history:
        print_text("Without a chat template every line stands alone.", stream=sys.stderr)
    Terminal(responder, settings).run()
