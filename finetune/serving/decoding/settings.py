"""How answers are generated, in one object for the dynamic and the static way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """Settings of one generation.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        min_new_tokens: An answer does not end before it has this many tokens.
        top_k: Sample among this many tokens; 1 is greedy search, 0 all tokens.
        top_p: Sample among the most probable tokens that hold this much of the probability.
        temperature: Logits are divided by it before sampling; 0 is greedy search.
        repetition_penalty: Divides the logit of tokens that stand in the prompt or the answer already
            (multiplies it where negative); 1 changes nothing.
        seed: Of sampling; with the number of the sample and the place of the token it decides the draw.
        stop_ids: Tokens that end an answer; None: those of the model.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    top_k: int = 1
    top_p: float = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)} but must be {allowed}: change --{name}"
            for name, allowed, is_right in (
                ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
                ("min_new_tokens", f"0 to max_new_tokens ({self.max_new_tokens})",
                 0 <= self.min_new_tokens <= self.max_new_tokens),
                ("top_k", "0 or more", self.top_k >= 0),
                ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
                ("temperature", "0 or more", self.temperature >= 0),
                ("repetition_penalty", "above 0", self.repetition_penalty > 0),
                ("seed", f"0 to {MAX_SEED}", 0 <= self.seed <= MAX_SEED),
            )
            if not is_right
        ]  # fmt: skip
        if faults:
            raise UserError(faults)

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.top_k == 1 or self.temperature == 0

    def to_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of PaddleNLP's `generate`; stop ids and padding come from the tokenizer."""
        kwargs: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            # Else a folder's old limits take the place of a new one that has PaddleNLP's default, 20 and 0.
            "max_length": 0,
            "min_length": 0,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.is_greedy:
            return kwargs | {"decode_strategy": "greedy_search"}
        return kwargs | {
            "decode_strategy": "sampling",
            "top_k": self.top_k,
            "top_p": self.top_p,
            "temperature": self.temperature,
        }
