"""Answers by PaddleNLP's layers, token by token, with the same settings and draws as an exported graph.

PaddleNLP's own `generate` draws from one random state for the whole batch, so that a sample would depend on
what else is in it, and shows nothing before the end. Here every step is one forward pass with the cache, and
the choice of the token is that of the export (`finetune.serving.decoding.token_choice`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from finetune.data.samples.tokenize import IGNORE_INDEX, Prompt
from finetune.serving.decoding.draws import uniform_draws
from finetune.serving.decoding.settings import DecodingSettings

OnTokens = Callable[[list[list[int]]], None]


class DynamicDecoder:
    """A model, with or without its adapter.

    Args:
        model: PaddleNLP's causal language model, or an adapter on one.
        family: Record of the model.
        stop_ids: Tokens that end an answer where the settings name none.
        pad_token_id: Fills rows.
        device: Where it runs; every thread that generates has to be told.
    """

    def __init__(
        self, model: Any, family: Any, *, stop_ids: Sequence[int], pad_token_id: int, device: str = "cpu"
    ):
        from finetune.adapters.base import base_model
        from finetune.models.layers import find_layer
        from finetune.training.loss import LabelPositions

        self.stop_ids = tuple(stop_ids)
        self._model = model
        self._base = base_model(model)
        self._filler = pad_token_id
        self._device = device
        self._adapter_on = True
        # Of a prompt only the last position is looked at; all its logits would be the largest tensor by far.
        head = find_layer(self._base, family.head_module)
        self._positions = LabelPositions(head, length_first=family.hidden_length_first)

    @property
    def can_switch_off(self) -> bool:
        """Whether the weights of the base are untouched, so that it can answer without the adapter too."""
        config = getattr(self._model, "lora_config", None)
        return hasattr(self._model, "prefix_config") or (
            config is not None and not config.trainable_modules and not config.changes_base
        )

    def without_adapter(self) -> DynamicDecoder:
        """The base with the same weights in memory. The two may take turns, but must not run at the same time."""
        assert self.can_switch_off
        twin = object.__new__(DynamicDecoder)
        twin.__dict__.update(self.__dict__)
        twin._adapter_on = False
        return twin

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: DecodingSettings,
        *,
        samples: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[list[int]]:
        """Answers to a batch of prompts; see `finetune.serving.decoding.decoder.StaticDecoder.generate`."""
        if not prompts:
            return []
        stop_ids = self.stop_ids if settings.stop_ids is None else settings.stop_ids
        samples = range(len(prompts)) if samples is None else samples
        chooser = _Chooser(prompts, settings, stop_ids=stop_ids, samples=samples)
        answers: list[list[int]] = [[] for _ in prompts]
        is_open = [True] * len(prompts)
        with self.inference():
            steps = self._steps(prompts, chooser)
            for tokens in steps:
                news = [[token] if open_ and token not in stop_ids else []
                        for token, open_ in zip(tokens, is_open, strict=True)]  # fmt: skip
                is_open = [bool(new) for new in news]
                for answer, new in zip(answers, news, strict=True):
                    answer.extend(new)
                if on_tokens is not None:
                    on_tokens(news)
                if not any(is_open):
                    break
                for row, open_ in enumerate(is_open):
                    if not open_:
                        tokens[row] = self._filler
        return answers

    def _steps(self, prompts: Sequence[Sequence[int]], chooser: _Chooser) -> Iterator[list[int]]:
        """The next token of every row, again and again; what the caller writes into the list goes on."""
        logits, state = self.read_prompts(prompts)
        tokens: list[int] = []
        for step in range(chooser.num_steps):
            if step:
                logits, state = self.read_tokens(tokens, state)
            tokens = chooser.choose(logits, step)
            yield tokens
            chooser.remember(tokens)

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, dict[str, Any]]:
        """Runs the model over prompts; within `inference`.

        Args:
            prompts: Token ids of each, at least one id; any lengths.

        Returns:
            Logits of the token behind each prompt, float32 [B, vocabulary]; and what `read_tokens` goes on from: the
            cache, ``attention_mask`` [B, tokens so far], where padding stands on the left, and
            ``position_ids`` of the next tokens, [B, 1], and in some families ``context_marks`` [B, 3].
        """
        import paddle

        from finetune.data.batches.collate import collate_prompts

        rows = [Prompt(input_ids=np.asarray(row, np.int32), source="", target="") for row in prompts]
        batch = {name: paddle.to_tensor(array)
                 for name, array in collate_prompts(rows, pad_token_id=self._filler).items()}  # fmt: skip
        ids = batch.pop("input_ids")
        last = np.full(ids.shape, IGNORE_INDEX, np.int64)
        last[:, -1] = 0
        with self._positions.only(last):
            return self._forward(ids, {**batch, "use_cache": True})

    def read_tokens(self, tokens: Sequence[int], state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Runs the model over one more token of every row; see `read_prompts`."""
        import paddle

        logits, state = self._forward(paddle.to_tensor(tokens, "int64").unsqueeze(1), state)
        return logits[:, -1], state

    def _forward(self, ids: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        from finetune.training.loss import logits_of

        # What follows from tokens that are not given again, where a family has such positions.
        if follow := getattr(self._base, "follow_texts", None):
            state = state | follow(ids, **state)
        with self._switched():
            outputs = self._base(**self._prepare()(ids, **state))
        state = self._base.update_model_kwargs_for_generation(outputs, state)
        state["position_ids"] = state["position_ids"][..., -1:]
        return logits_of(outputs).astype("float32"), state

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """What a thread needs in which the model runs: device, and no gradients."""
        import paddle

        paddle.set_device(self._device)
        with paddle.no_grad():
            yield

    def _prepare(self) -> Any:
        if hasattr(self._model, "prefix_config") and self._adapter_on:
            return self._model._prepare_inputs_for_generation
        return self._base.prepare_inputs_for_generation

    @contextlib.contextmanager
    def _switched(self) -> Iterator[None]:
        # For one pass over the model, not longer: in between the same weights may answer with the adapter.
        if self._adapter_on or not hasattr(self._model, "lora_config"):
            yield
            return
        self._model.disable_lora()
        try:
            yield
        finally:
            self._model.enable_lora()


class _Chooser:
    """Picks the tokens of one batch.

    Attributes:
        num_steps: Most tokens of an answer.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        settings: DecodingSettings,
        *,
        stop_ids: Sequence[int],
        samples: Sequence[int],
    ):
        self._settings = settings
        self._stop_ids = list(stop_ids)
        self.num_steps = settings.max_new_tokens
        longest = max(map(len, prompts))
        # Padding is no token of the text: a token of the row itself stands there instead.
        self._history = [[row[-1]] * (longest - len(row)) + list(row) for row in prompts]
        self._draws = np.zeros((len(prompts), self.num_steps), np.float32)
        if not settings.is_greedy:
            self._draws = np.stack(
                [uniform_draws(settings.seed, int(each), self.num_steps) for each in samples]
            )

    def choose(self, logits: Any, step: int) -> list[int]:
        """Tokens of the rows by their logits [B, vocabulary]."""
        import paddle

        from finetune.serving.decoding.token_choice import choose_tokens, forbid_tokens, penalise_repetition

        choice = self._choice()
        place = paddle.to_tensor(step, "int64")
        if self._settings.repetition_penalty != 1:
            logits = penalise_repetition(logits, paddle.to_tensor(self._history, "int64"), choice)
        if self._stop_ids and step < self._settings.min_new_tokens:
            logits = forbid_tokens(logits, place, choice)
        tokens: list[int] = choose_tokens(logits, place, choice).reshape([-1]).tolist()
        return tokens

    def remember(self, tokens: Sequence[int]) -> None:
        """Takes new tokens into what counts as said."""
        for row, token in zip(self._history, tokens, strict=True):
            row.append(int(token))

    def _choice(self) -> Any:
        import paddle

        from finetune.serving.decoding.token_choice import Choice

        settings = self._settings
        counts = [1 if settings.is_greedy else settings.top_k, settings.min_new_tokens, 0, 0]
        # Every probability is kept at 1: rounding must not drop the last.
        top_p = settings.top_p if settings.top_p < 1 else 2.0
        return Choice(
            paddle.to_tensor(counts, "int64"),
            paddle.to_tensor([settings.temperature or 1.0, top_p, settings.repetition_penalty], "float32"),
            paddle.to_tensor(self._stop_ids or [-1], "int64"),
            paddle.to_tensor(self._draws),
        )
