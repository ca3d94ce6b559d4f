"""What the tests of all families share: one row per family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Pieces = list[tuple[int, str]]


@dataclass(frozen=True)
class Framing:
    """How "a red dress" -> "fits well 上衣" is framed: what a reader checks against the published tokenizer.

    Ids with their text, those of the tiny tokenizer of 330 tokens: what opens the prompt, the prompt, the
    answer, its end; then the token that fills rows, and others that end answers in conversations.
    """

    frame: Pieces
    source: Pieces
    target: Pieces
    end: tuple[int, str]
    pad_token_id: int
    chat_ends: tuple[str, ...] = ()


SENTENCEPIECE = Framing(
    frame=[(1, "<s>")],
    source=[(260, "a"), (274, "red"), (275, "dress")],
    target=[(287, "f"), (261, "it"), (300, "s"), (267, "w"), (292, "ell"), (272, "上衣")],
    end=(2, "</s>"),
    pad_token_id=2,
)
"""The frame of Llama's tokenizer, and of those that are like it."""


@dataclass(frozen=True)
class FamilyCase:
    """A family, options of its tiny checkpoint, and what must come out."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    num_kv_heads: int = 4
    framing: Framing = SENTENCEPIECE
    fused_layers: bool = False
    bfloat16_on_cpu: bool = True

    @property
    def prefix(self) -> tuple[str, ...]:
        """Tokens that open a prompt."""
        return tuple(text for _, text in self.framing.frame)

    @property
    def end_of_answer(self) -> str:
        return self.framing.end[1]


CASES = (
    FamilyCase("llama", fused_layers=True),
    FamilyCase("llama", {"num_key_value_heads": 2}, num_kv_heads=2, fused_layers=True),
    FamilyCase(
        "chatglm2",
        {"num_key_value_heads": 2},
        num_kv_heads=2,
        bfloat16_on_cpu=False,
        framing=Framing(
            frame=[(322, "[gMASK]"), (324, "sop")],
            source=[(260, "a"), (276, "red"), (277, "dress")],
            target=[
                *[(290, "▁"), (105, "f"), (261, "it"), (295, "s"), (268, "w")],
                *[(291, "e"), (263, "ll"), (274, "上衣")],
            ],
            end=(2, "</s>"),
            pad_token_id=0,
        ),
    ),
    FamilyCase(
        "qwen",
        {"vocab_size": 520},
        framing=Framing(
            frame=[],
            source=[(64, "a"), (286, " red"), (287, " dress")],
            target=[(295, "fit"), (82, "s"), (276, " w"), (294, "ell"), (220, " "), (264, "上衣")],
            end=(312, "<|endoftext|>"),
            pad_token_id=312,
            chat_ends=("<|im_end|>",),
        ),
    ),
    FamilyCase(
        "qwen2",
        {"num_key_value_heads": 2},
        num_kv_heads=2,
        fused_layers=True,
        framing=Framing(
            frame=[],
            source=[(64, "a"), (286, " red"), (287, " dress")],
            target=[(300, "fit"), (82, "s"), (276, " w"), (299, "ell"), (220, " "), (265, "上衣")],
            end=(327, "<|endoftext|>"),
            pad_token_id=327,
            chat_ends=("<|im_end|>",),
        ),
    ),
    FamilyCase(
        "bloom",
        framing=Framing(
            frame=[],
            source=[(68, "a"), (290, " red"), (291, " dress")],
            target=[(304, "fit"), (86, "s"), (280, " w"), (303, "ell"), (224, " "), (268, "上衣")],
            end=(2, "</s>"),
            pad_token_id=3,
        ),
    ),
    FamilyCase(
        "opt",
        framing=Framing(
            frame=[(2, "</s>")],  # the token that ends a text also opens it; only the end is learned
            source=[(68, "a"), (290, " red"), (291, " dress")],
            target=[(299, "fit"), (86, "s"), (280, " w"), (298, "ell"), (224, " "), (268, "上衣")],
            end=(2, "</s>"),
            pad_token_id=1,
        ),
    ),
    FamilyCase("mistral", {"num_key_value_heads": 2}, num_kv_heads=2),
    FamilyCase(
        "gemma",
        {"num_key_value_heads": 1},
        num_kv_heads=1,
        framing=Framing(
            frame=[(2, "<bos>")],
            source=[(261, "a"), (275, "red"), (276, "dress")],
            target=[(288, "f"), (262, "it"), (300, "s"), (268, "w"), (293, "ell"), (273, "上衣")],
            end=(1, "<eos>"),
            pad_token_id=0,
        ),
    ),
)
IDS = [f"{case.name}-kv{case.num_kv_heads}" for case in CASES]
