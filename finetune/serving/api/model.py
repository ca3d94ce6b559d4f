"""The model as requests see it: text to tokens, limits, and rows of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune.data.reading.conversation import Conversation, make_conversation
from finetune.errors import UserError
from finetune.serving.api.errors import ApiError, InvalidRequest

if TYPE_CHECKING:
    from finetune.serving.api.requests import Wishes
    from finetune.serving.batching.engine import BatchMaker
    from finetune.serving.batching.row import SamplingSettings
    from finetune.serving.predict.loading import PlannedModel
    from finetune.serving.predict.responder import Responder

_NO_LIMIT = 2**31 - 1
"""Prompts are refused, not cut."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What holds where a request says nothing, and bounds.

    Attributes:
        max_new_tokens: Most tokens of an answer that a request may ask for, and gets if it names no number.
        temperature: Of sampling.
        top_p: Of sampling.
    """

    max_new_tokens: int
    temperature: float
    top_p: float


class ServedModel:
    """A loaded model.

    Args:
        name: By which requests name it.
        responder: What is loaded; its tokenizer turns texts into tokens, in one thread at a time.
        defaults: Of requests.
        decode: Ids to text, with a tokenizer of its own: used by the thread that decodes.
        vocab_size: Token ids are below.

    Raises:
        UserError: The tokenizer lacks special tokens of the chat template.
    """

    def __init__(
        self,
        name: str,
        responder: Responder,
        *,
        defaults: Defaults,
        decode: Callable[[Sequence[int]], str],
        vocab_size: int,
    ):
        from finetune.data.samples.tokenize import SampleBuilder
        from finetune.data.templates.template import PlainTemplate
        from finetune.serving.predict.responder import stop_ids

        self.name, self.decode = name, decode
        self._responder, self._defaults, self._vocab_size = responder, defaults, vocab_size
        self._stop_ids = stop_ids(responder.encoder, responder.template)
        self._chat_builder, self._text_builder = (
            SampleBuilder(responder.encoder, template, src_length=_NO_LIMIT)
            for template in (responder.template, PlainTemplate())
        )

    def check_name(self, name: str) -> None:
        """Makes sure that a request means this model.

        Raises:
            ApiError: 404.
        """
        if name != self.name:
            raise ApiError(
                404,
                f"The model {name[:200]} does not exist: this server has {self.name}.",
                param="model",
                code="model_not_found",
            )

    def encode_conversation(self, conversation: Conversation) -> list[int]:
        """The tokens of a conversation that waits for an answer.

        Raises:
            InvalidRequest: The template cannot write it.
        """
        from finetune.data.templates.pieces import RefusedConversationError

        responder = self._responder
        if len(conversation.turns) > 1 and not responder.keeps_history:
            raise InvalidRequest(
                "This model has no chat template that could say who said what, so it answers single messages only: "
                "send one, or start the server with --chat_template.",
                "messages",
            )
        if conversation.system is None and responder.system is not None:
            conversation = replace(conversation, system=responder.system)
        try:
            prompt = self._chat_builder.prompt(conversation)
        except RefusedConversationError as error:
            raise InvalidRequest(f"The chat template refuses these messages: {error}.", "messages") from None
        except UserError as error:
            raise InvalidRequest(error.faults[0], "messages") from None
        return [] if prompt is None else prompt.input_ids.tolist()

    def encode_text(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a text that is to be continued; ids are taken as they are.

        Raises:
            InvalidRequest: An id is none of this model's.
        """
        if not isinstance(prompt, str):
            if wrong := [token for token in prompt if not 0 <= token < self._vocab_size]:
                raise InvalidRequest(
                    f"prompt has the token id {str(wrong[0])[:30]}, this model has 0 to {self._vocab_size - 1}.",
                    "prompt",
                )
            return prompt
        found = self._text_builder.prompt(make_conversation([(prompt, "")]))
        return [] if found is None else found.input_ids.tolist()

    def settings(self, wishes: Wishes, prompts: Sequence[Sequence[int]], param: str) -> SamplingSettings:
        """How the answers to some prompts are made.

        Raises:
            InvalidRequest: A prompt is empty or too long, or the answer would be.
        """
        from finetune.serving.batching.row import SamplingSettings

        if not all(prompts):
            raise InvalidRequest(f"{param} is empty: there is nothing to answer.", param)
        longest = max(map(len, prompts))
        own, limit = self._defaults, self._responder.position_limit
        if longest > self._responder.src_length:
            raise _too_long(f"{longest} tokens of prompt, {self._responder.src_length} are allowed", param)
        wanted = wishes.max_tokens
        if wanted is not None and wanted > own.max_new_tokens:
            raise InvalidRequest(
                f"max_tokens is {wanted}, this server makes at most {own.max_new_tokens} tokens of an answer.",
                "max_tokens",
            )
        if limit is not None and longest + (wanted or 1) > limit:
            raise _too_long(
                f"{longest} tokens of prompt and {wanted or 1} of an answer, the model has {limit} positions",
                param,
            )
        room = own.max_new_tokens if limit is None else min(own.max_new_tokens, limit - longest)
        return SamplingSettings(
            max_new_tokens=wanted or room,
            temperature=own.temperature if wishes.temperature is None else wishes.temperature,
            top_p=own.top_p if wishes.top_p is None else wishes.top_p,
            seed=wishes.seed,
            stop_ids=self._stop_ids,
            stop=wishes.stop,
        )


def _too_long(what: str, param: str) -> InvalidRequest:
    return InvalidRequest(f"The request is too long: {what}.", param, "context_length_exceeded")


def load_served(plan: PlannedModel, name: str, defaults: Defaults) -> tuple[ServedModel, BatchMaker]:
    """Loads a model, and runs it once.

    Raises:
        UserError: Weights, tokenizer or adapter cannot be used, or do not belong together.
    """
    from finetune.serving.batching.dynamic_batch import DynamicRows
    from finetune.serving.batching.static_batch import StaticRows
    from finetune.serving.predict.loading import load_responder
    from finetune.tokenizers.encoder import load_encoder

    responder = load_responder(plan)
    decoding = load_encoder(plan.tokenizer, plan.resolved.family, models=[plan.resolved.folder])
    maker: Any
    if plan.options.is_static:
        maker = StaticRows(responder.decoder)  # type: ignore[arg-type]
    else:
        maker = DynamicRows(responder.decoder)  # type: ignore[arg-type]
        with maker.inference():
            maker.form  # noqa: B018 - a model whose rows cannot be moved is found out before it is offered
    size = len(responder.encoder.tokenizer)
    own = plan.resolved.family.adapt_config(plan.resolved.config).get("vocab_size")
    model = ServedModel(
        name,
        responder,
        defaults=defaults,
        decode=decoding.decode,
        vocab_size=min(size, own) if isinstance(own, int) else size,
    )
    return model, maker
