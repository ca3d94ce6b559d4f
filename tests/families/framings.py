"""How the tiny tokenizers of the families frame a prompt and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

Pieces = list[tuple[int, str]]


@dataclass(frozen=True)
class Framing:
    """How "a red dress" -> "fits well 上衣" is framed: what a reader checks against the published tokenizer.

    Ids with their text, those of the tiny tokenizer of 330 tokens: what opens the prompt, the prompt, the
    answer, its end; then the token that fills rows, others that end answers in conversations, and what stands between
    prompt and answer.
    """

    frame: Pieces
    source: Pieces
    target: Pieces
    end: tuple[int, str]
    pad_token_id: int
    chat_ends: tuple[str, ...] = ()
    opening: Pieces = field(default_factory=list)

    @property
    def prompt(self) -> Pieces:
        """All that stands before the answer."""
        return [*self.frame, *self.source, *self.opening]


SENTENCEPIECE = Framing(
    frame=[(1, "<s>")],
    source=[(260, "a"), (274, "red"), (275, "dress")],
    target=[(287, "f"), (261, "it"), (300, "s"), (267, "w"), (292, "ell"), (272, "上衣")],
    end=(2, "</s>"),
    pad_token_id=2,
)
"""The frame of Llama's tokenizer, and of those that are like it."""


BARE = replace(SENTENCEPIECE, frame=[], pad_token_id=0)
"""The same where nothing opens a text and the unknown token fills rows."""


QWEN2 = Framing(
    frame=[],
    source=[(64, "a"), (286, " red"), (287, " dress")],
    target=[(300, "fit"), (82, "s"), (276, " w"), (299, "ell"), (220, " "), (265, "上衣")],
    end=(327, "<|endoftext|>"),
    pad_token_id=327,
    chat_ends=("<|im_end|>",),
)

OPT = Framing(
    frame=[(2, "</s>")],  # the token that ends a text also opens it; only the end is learned
    source=[(68, "a"), (290, " red"), (291, " dress")],
    target=[(299, "fit"), (86, "s"), (280, " w"), (298, "ell"), (224, " "), (268, "上衣")],
    end=(2, "</s>"),
    pad_token_id=1,
)

GPT2 = Framing(
    frame=[],
    source=[(64, "a"), (286, " red"), (287, " dress")],
    target=[(295, "fit"), (82, "s"), (276, " w"), (294, "ell"), (220, " "), (264, "上衣")],
    end=(329, "<|endoftext|>"),
    pad_token_id=329,
)

FALCON = Framing(
    frame=[],
    source=[(66, "a"), (288, " red"), (289, " dress")],
    target=[(297, "fit"), (84, "s"), (278, " w"), (296, "ell"), (222, " "), (266, "上衣")],
    end=(1, "<|endoftext|>"),
    pad_token_id=1,
)

GRANITE = Framing(
    frame=[],
    source=[(67, "a"), (289, " red"), (290, " dress")],
    target=[(298, "fit"), (85, "s"), (279, " w"), (297, "ell"), (223, " "), (267, "上衣")],
    end=(0, "<|end_of_text|>"),
    pad_token_id=0,
)

SMOLLM3 = replace(QWEN2, end=(327, "<|end_of_text|>"))

GEMMA = Framing(
    frame=[(2, "<bos>")],
    source=[(261, "a"), (275, "red"), (276, "dress")],
    target=[(288, "f"), (262, "it"), (300, "s"), (268, "w"), (293, "ell"), (273, "上衣")],
    end=(1, "<eos>"),
    pad_token_id=0,
)
INTERNLM = replace(
    SENTENCEPIECE,
    source=[(262, "a"), (276, "red"), (277, "dress")],
    target=[(289, "f"), (263, "it"), (300, "s"), (269, "w"), (294, "ell"), (274, "上衣")],
    chat_ends=("<eoa>",),
)
INTERNLM2 = replace(
    SENTENCEPIECE,
    source=[(301, "a"), (274, " red"), (275, " dress")],
    target=[(326, "f"), (293, "its"), (268, " w"), (290, "ell"), (295, " "), (264, "上衣")],
    chat_ends=("<|im_end|>",),
)

CHATGLM1 = Framing(
    frame=[],
    opening=[(5, "[gMASK]"), (8, "<sop>")],
    source=[(273, "a"), (287, "red"), (288, "dress")],
    target=[
        *[(295, "▁"), (326, "f"), (274, "it"), (300, "s"), (280, "w")],
        *[(296, "e"), (276, "ll"), (285, "上衣")],
    ],
    end=(9, "<eop>"),
    pad_token_id=3,
)
CHATGLM4 = Framing(
    frame=[(318, "[gMASK]"), (320, "<sop>")],
    source=[(64, "a"), (286, " red"), (287, " dress")],
    target=[(295, "fit"), (82, "s"), (276, " w"), (294, "ell"), (220, " "), (264, "上衣")],
    end=(316, "<|endoftext|>"),
    pad_token_id=316,
    chat_ends=("<|user|>", "<|observation|>"),
)

CHATGLM = Framing(
    frame=[(322, "[gMASK]"), (324, "sop")],
    source=[(260, "a"), (276, "red"), (277, "dress")],
    target=[
        *[(290, "▁"), (105, "f"), (261, "it"), (295, "s"), (268, "w")],
        *[(291, "e"), (263, "ll"), (274, "上衣")],
    ],
    end=(2, "</s>"),
    pad_token_id=0,
)
