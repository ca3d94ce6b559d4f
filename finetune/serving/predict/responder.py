"""A model that answers conversations: template, tokenizer and decoder behind one face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from finetune.data.reading.conversation import Conversation, make_conversation
from finetune.data.samples.tokenize import Prompt, SampleBuilder
from finetune.errors import UserError
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.text_stream import TextStream

if TYPE_CHECKING:
    from finetune.data.templates.pieces import Template
    from finetune.tokenizers.encoder import FamilyEncoder

_PROBE = "response"


class Decoder(Protocol):
    """What generates: `DynamicDecoder` or `StaticDecoder`."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: DecodingSettings,
        *,
        samples: Sequence[int] | None = None,
        on_tokens: Callable[[list[list[int]]], None] | None = None,
    ) -> list[list[int]]:
        """Token ids of the answers."""
        ...


@dataclass
class Responder:
    """Everything between the text of a conversation and the text of its answer.

    Attributes:
        encoder: The model's tokenizer.
        template: How conversations are written.
        decoder: What generates.
        src_length: Most tokens of a prompt.
        position_limit: Most tokens of prompt and answer, None without a limit.
        system: System text of conversations that have none; None leaves it to the template.
    """

    encoder: FamilyEncoder
    template: Template
    decoder: Decoder
    src_length: int
    position_limit: int | None = None
    system: str | None = None

    def prompt(self, conversation: Conversation, settings: DecodingSettings) -> Prompt | None:
        """Tokens before the last answer, cut on the left to the room there is; None where there are none.

        Raises:
            UserError: The model has no positions for an answer of that length.
        """
        room = self.prompt_room(settings)
        if conversation.system is None and self.system is not None:
            conversation = replace(conversation, system=self.system)
        return SampleBuilder(self.encoder, self.template, src_length=room).prompt(conversation)

    def prompt_room(self, settings: DecodingSettings) -> int:
        """Most tokens of a prompt whose answer is generated with these settings.

        Raises:
            UserError: There is no room beside the answer.
        """
        if self.position_limit is None:
            return self.src_length
        check_room(self.position_limit, settings)
        return min(self.src_length, self.position_limit - settings.max_new_tokens)

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: DecodingSettings,
        *,
        samples: Sequence[int] | None = None,
    ) -> list[str]:
        """Texts of the answers to a batch."""
        rows = [prompt.input_ids.tolist() for prompt in prompts]
        found = self.decoder.generate(rows, self._with_stop_ids(settings), samples=samples)
        return [self.encoder.decode(ids) for ids in found]

    def answer(
        self,
        turns: Sequence[tuple[str, str]],
        message: str,
        settings: DecodingSettings,
        *,
        system: str | None = None,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> str:
        """Answers a message after earlier turns.

        Args:
            turns: Messages and their answers.
            message: The new one.
            settings: How to generate.
            system: System text of this conversation.
            on_text: Called with each new stretch of text; whatever it raises ends the generation.

        Returns:
            The answer.

        Raises:
            UserError: The message has no token, or there is no room for an answer.
        """
        # A template puts its own blanks around answers.
        past = [(asked, said.strip()) for asked, said in turns] if self.keeps_history else []
        conversation = make_conversation([*past, (message, "")], system)
        prompt = self.prompt(conversation, settings)
        if prompt is None:
            raise UserError("the message is empty: write something")
        stream = TextStream(self.encoder.decode)

        def show(news: list[list[int]]) -> None:
            if text := stream.push(news[0]):
                on_text(text)

        rows = [prompt.input_ids.tolist()]
        ids = self.decoder.generate(rows, self._with_stop_ids(settings), on_tokens=show)[0]
        if rest := stream.finish():
            on_text(rest)
        return self.encoder.decode(ids)

    @property
    def keeps_history(self) -> bool:
        """Whether the template can write several turns so that the model sees who said what."""
        from finetune.data.templates.template import PlainTemplate

        return not isinstance(self.template, PlainTemplate)

    def _with_stop_ids(self, settings: DecodingSettings) -> DecodingSettings:
        if settings.stop_ids is not None:
            return settings
        return replace(settings, stop_ids=stop_ids(self.encoder, self.template))


def check_room(position_limit: int | None, settings: DecodingSettings) -> None:
    """Makes sure that a model has a position for a prompt beside the longest answer.

    Raises:
        UserError: It has none.
    """
    if position_limit is not None and settings.max_new_tokens >= position_limit:
        raise UserError(
            f"max_new_tokens is {settings.max_new_tokens}, but this model has positions for "
            f"{position_limit} tokens of prompt and answer together: lower --max_new_tokens"
        )


def stop_ids(encoder: Any, template: Template) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's, the family's, and the one by which the template ends it."""
    found = [encoder.eos_token_id, *encoder.chat_end_ids]
    learned = [piece for piece in template.render(make_conversation([("question", _PROBE)])) if piece.learned]
    ends = [
        piece.text.rpartition(_PROBE)[2].strip()
        for piece in learned[-2:]
        if piece.special or _PROBE in piece.text
    ]
    for end in filter(None, ends):
        ids = encoder.encode_special(end)
        if len(ids) == 1 and ids[0] != getattr(encoder.tokenizer, "unk_token_id", None):
            found.append(ids[0])
    return tuple(dict.fromkeys(found))
