"""One answer that is being made: its settings, its tokens, the text that is handed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from finetune.serving.batching.stop_strings import StopStrings
from finetune.serving.decoding.draws import uniform_draws
from finetune.serving.predict.text_stream import TextStream

STOP, LENGTH = "stop", "length"
"""Why an answer ended: at a stop token or stop string, or because it has all the tokens that were asked for."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the tokens of a request are chosen.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        temperature: Logits are divided by it; 0 takes the most probable token.
        top_p: Sample among the most probable tokens that hold this much of the probability.
        seed: Of sampling.
        stop_ids: Tokens that end an answer.
        stop: Texts that end it, and do not stand in it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True)
class Update:
    """News of an answer.

    Attributes:
        text: What comes behind the text so far.
        finish: Why it is finished, None while it is not.
        num_tokens: Tokens of the answer so far, without the one that ended it.
        error: What kept it from being finished.
    """

    text: str = ""
    finish: str | None = None
    num_tokens: int = 0
    error: BaseException | None = None


class Row:
    """An answer; used by the thread that decodes, but for `cancel`.

    Args:
        prompt: Token ids, at least one.
        settings: How tokens are chosen.
        sample: Number of the answer among those of its request; decides the draws together with the seed.
        decode: Ids to text.
        on_update: Told of new text and of the end, by the thread that decodes. What it raises cancels the row.

    Attributes:
        tokens: Of the answer so far.
        draws: Numbers in [0, 1) for every token of the answer, float32 [max_new_tokens]; None if greedy.
        started: When it was let in, `time.monotonic`; 0.0 before.
        was_in_failure: Whether a step over this row and others failed; it then runs without others.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        settings: SamplingSettings,
        *,
        sample: int,
        decode: Callable[[Sequence[int]], str],
        on_update: Callable[[Update], None],
    ):
        self.prompt = tuple(prompt)
        self.settings = settings
        self.tokens: list[int] = []
        self.draws: NDArray[Any] | None = None
        if not settings.is_greedy:
            self.draws = uniform_draws(settings.seed, sample, settings.max_new_tokens)
        self.started = 0.0
        self.was_in_failure = False
        self._stream = TextStream(decode)
        self._stops = StopStrings(settings.stop)
        self._on_update = on_update
        self._is_cancelled = False

    @property
    def num_left(self) -> int:
        """Tokens that may still come."""
        return self.settings.max_new_tokens - len(self.tokens)

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._is_cancelled

    @property
    def all_ids(self) -> tuple[int, ...]:
        """The prompt and the answer so far."""
        return (*self.prompt, *self.tokens)

    def cancel(self) -> None:
        """Ends the row before the next step; nothing more is told of it. May be called by any thread."""
        self._is_cancelled = True

    def take(self, ids: Sequence[int]) -> bool:
        """Takes the next tokens; whether the row is finished. What fails here fails this row alone."""
        if self._is_cancelled:
            return True
        try:
            text, finish = self._read(ids)
            if text or finish:
                self._on_update(Update(text, finish, len(self.tokens)))
        except Exception as error:
            self.fail(error)
            return True
        return finish is not None

    def fail(self, error: BaseException) -> None:
        """Tells that the answer cannot be finished."""
        if self._is_cancelled:
            return
        self._is_cancelled = True
        try:
            self._on_update(Update("", None, len(self.tokens), error))
        except Exception:  # nobody is there to be told: the loop that listened has ended
            return

    def _read(self, ids: Sequence[int]) -> tuple[str, str | None]:
        """New text, and why the answer is finished."""
        shown: list[str] = []
        finish = None
        for token in ids:
            if token in self.settings.stop_ids:
                finish = STOP
                break
            self.tokens.append(token)
            shown.append(self._stops.push(self._stream.push([token])))
            if self._stops.is_met:
                return "".join(shown), STOP
            if not self.num_left:
                finish = LENGTH
                break
        if finish:
            shown.append(self._stops.push(self._stream.finish()))
            finish = STOP if self._stops.is_met else finish
            shown.append(self._stops.finish())
        return "".join(shown), finish
