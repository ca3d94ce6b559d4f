"""Runs an exported folder: prompts in, answers out, by Paddle's inference engine.

The graph makes up to N tokens in one call (`finetune.serving.export.generation_graph`). N bounds the room of the
cache, which attention reads whether it is filled or not, and what is lost when an answer ends early; every
call copies the cache once. With someone watching, N is small, so that text appears as it is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.families.context_marks import find_marks
from finetune.serving.decoding.draws import uniform_draws
from finetune.serving.decoding.exported import PROGRAM_FILE, WEIGHTS_FILE, read_facts, read_prefix
from finetune.serving.decoding.exported_weights import check_exported_weights
from finetune.serving.decoding.settings import DecodingSettings

_TOKENS_PER_RUN = 128
_TOKENS_PER_SHOWN_RUN = 8
_GPU_MEMORY_MB = 1000
"""What the engine takes at the start; it grows as needed."""

_LEAST_BYTES_FOR_THREADS = 32_000_000

OnTokens = Callable[[list[list[int]]], None]


class StaticDecoder:
    """An exported model.

    Args:
        folder: Written by export_model.py.
        device: "cpu", "gpu" or "gpu:1".

    Attributes:
        facts: What the folder says of the model.

    Raises:
        UserError: The folder is no export, or its number type does not run on the device.
    """

    def __init__(self, folder: str | Path, *, device: str = "cpu"):
        self.folder = Path(folder)
        self.facts = read_facts(self.folder)
        if device == "cpu" and self.facts.dtype != "float32":
            raise UserError(
                f"{folder} was exported as {self.facts.dtype}, which Paddle cannot multiply on CPU: export it with "
                "--dtype float32, or run it with --device gpu"
            )
        check_exported_weights(self.folder)
        self._prefix = read_prefix(self.folder, self.facts)
        self._predictor = _load(self.folder, device)
        self._input_names = self._predictor.get_input_names()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: DecodingSettings,
        *,
        samples: Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[list[int]]:
        """Answers to a batch of prompts.

        Args:
            prompts: Token ids of each prompt, at least one id; any lengths.
            settings: How to generate.
            samples: Number of each prompt among all that are generated with this seed; it decides the random
                draws, so that an answer does not depend on its batch. 0, 1, 2, ... when not given.
            on_tokens: Called with the new tokens of every row, as they come.

        Returns:
            The ids of each answer, without the one that ended it.

        Raises:
            UserError: A prompt is empty, or too long for the model together with `max_new_tokens`.
        """
        self._check(prompts, settings)
        if not prompts:
            return []
        stop_ids = self.facts.stop_ids if settings.stop_ids is None else settings.stop_ids
        batch = _Batch(prompts, self.facts.pad_token_id)
        samples = range(len(prompts)) if samples is None else samples
        draws = np.stack([_draws(settings, int(sample)) for sample in samples])
        answers: list[list[int]] = [[] for _ in prompts]
        made = 0
        cache = self._first_cache(len(prompts))
        while made < settings.max_new_tokens and not batch.finished.all():
            size = min(_run_size(made, shown=on_tokens is not None), settings.max_new_tokens - made)
            inputs = batch.inputs() | _controls(
                settings, stop_ids, made, filler=self.facts.pad_token_id, prefix=self.facts.num_prefix_tokens
            )
            inputs |= {"draws": draws[:, made : made + size]} | self._marks(batch.texts)
            tokens, cache = self._run(inputs, cache, batch)
            news = [_until(row, stop_ids) for row in tokens.tolist()]
            news = [new if open_ else [] for new, open_ in zip(news, batch.was_open, strict=True)]
            for answer, new in zip(answers, news, strict=True):
                answer.extend(new)
            if on_tokens is not None:
                on_tokens(news)
            made += size
        return answers

    def run(
        self,
        ids: NDArray[Any],
        padding: NDArray[Any],
        draws: NDArray[Any],
        settings: DecodingSettings,
        cache: list[Any] | None = None,
        *,
        texts: Sequence[Sequence[int]],
    ) -> tuple[NDArray[Any], list[Any]]:
        """Goes on with rows by a few tokens, for batches whose rows come and go.

        Args:
            ids: int64 [B, S], tokens that the cache does not hold yet, padded on the left.
            padding: int64 [B], columns in front of a row's first token.
            draws: float32 [B, N], for the tokens to make.
            settings: Of all rows; it penalises no repetition and names its stop ids.
            cache: What the call before returned; None begins.
            texts: All ids of every row so far, those of `ids` included.

        Returns:
            The new tokens [B, N], a row filled up behind its end; and the cache without the last of them, the tensors of
            all layers [1, K, B, T, D].
        """
        assert settings.stop_ids is not None and settings.repetition_penalty == 1
        inputs = {
            "ids": ids,
            "padding": padding,
            "history": ids[:, -1:],
            "finished": np.zeros((len(ids), 1), bool),
            "draws": draws,
        } | _controls(
            settings,
            settings.stop_ids,
            0,
            filler=self.facts.pad_token_id,
            prefix=self.facts.num_prefix_tokens,
        )
        inputs |= self._marks(texts)
        tokens, _, cache = self._call(inputs, self._first_cache(len(ids)) if cache is None else cache)
        return tokens, cache

    def _marks(self, texts: Sequence[Sequence[int]]) -> dict[str, NDArray[Any]]:
        """Where the rows' texts have their marks, for the graphs that ask for it."""
        ids = self.facts.context_marks
        return {"marks": find_marks(texts, ids)} if ids else {}

    def _check(self, prompts: Sequence[Sequence[int]], settings: DecodingSettings) -> None:
        limit = self.facts.max_positions
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {number + 1} is empty: give at least one token")
            if limit is not None and len(prompt) + settings.max_new_tokens > limit:
                raise UserError(
                    f"prompt {number + 1} has {len(prompt)} tokens, with max_new_tokens {settings.max_new_tokens} that "
                    f"is more than the {limit} positions of this model: shorten the prompt, or set "
                    "--max_new_tokens lower"
                )

    def _first_cache(self, num_rows: int) -> list[Any]:
        import paddle

        facts = self.facts
        if self._prefix is None:
            empty = paddle.zeros([1, facts.num_kv_heads, num_rows, 0, facts.head_dim], facts.dtype)
            return [empty] * (2 * facts.num_layers)
        rows = [np.repeat(part[None, :, None], num_rows, axis=2) for part in self._prefix]
        return [paddle.to_tensor(part).astype(facts.dtype) for part in rows]

    def _run(
        self, inputs: dict[str, NDArray[Any]], cache: list[Any], batch: _Batch
    ) -> tuple[NDArray[Any], list[Any]]:
        """One call of the graph; keeps in `batch` what the next one needs."""
        tokens, finished, cache = self._call(inputs, cache)
        batch.extend(tokens, finished)
        return batch.last_tokens, cache

    def _call(
        self, inputs: dict[str, NDArray[Any]], cache: list[Any]
    ) -> tuple[NDArray[Any], NDArray[Any], list[Any]]:
        """Tokens [B, N], finished [B, 1] and the cache."""
        import paddle

        feeds = {name: paddle.to_tensor(array) for name, array in inputs.items()}
        for number in range(self.facts.num_layers):
            feeds[f"past_key_{number}"], feeds[f"past_value_{number}"] = cache[2 * number : 2 * number + 2]
        tokens, finished, *cache = self._predictor.run([feeds[name] for name in self._input_names])
        return tokens.numpy(), finished.numpy(), cache


class _Batch:
    """Rows of a batch between two runs of the graph.

    Attributes:
        finished: [B, 1], rows that have ended.
        was_open: Whether each row was still open when the last run began.
        last_tokens: [B, N] of the last run.
        texts: All ids of every row so far, and what fills it up once it has ended.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], filler: int):
        lengths = np.array([len(prompt) for prompt in prompts])
        columns = np.arange(lengths.max())
        self.padding = lengths.max() - lengths
        mask = columns >= self.padding[:, None]
        self._ids = np.full(mask.shape, filler, np.int64)
        self._ids[mask] = np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts])
        # Padding is no token of the text: a token of the row itself stands there instead.
        self._history = np.where(mask, self._ids, self._ids[:, -1:])
        self.finished = np.zeros((len(prompts), 1), bool)
        self.was_open = [True] * len(prompts)
        self.last_tokens = self._ids[:, :0]
        self.texts = [list(prompt) for prompt in prompts]

    def inputs(self) -> dict[str, NDArray[Any]]:
        """The inputs of the next run that depend on the rows."""
        return {
            "ids": self._ids,
            "padding": self.padding,
            "history": self._history,
            "finished": self.finished,
        }

    def extend(self, tokens: NDArray[Any], finished: NDArray[Any]) -> None:
        """Takes the result of a run over."""
        self.was_open = (~self.finished[:, 0]).tolist()
        self.last_tokens, self.finished = tokens, finished
        self._history = np.concatenate([self._history, tokens], axis=1)
        self._ids = tokens[:, -1:]
        for text, row in zip(self.texts, tokens.tolist(), strict=True):
            text.extend(row)


def _load(folder: Path, device: str) -> Any:
    """The engine with the folder's graph."""
    from paddle import inference

    config = inference.Config(str(folder / PROGRAM_FILE), str(folder / WEIGHTS_FILE))
    config.disable_glog_info()
    if device == "cpu":
        config.disable_gpu()
        # Paddle's own kernels: oneDNN's are slower on a single row and repack the weights.
        config.disable_mkldnn()
        config.set_cpu_math_library_num_threads(_num_threads(folder))
    else:
        config.enable_use_gpu(_GPU_MEMORY_MB, int(device.partition(":")[2] or 0))
    return inference.create_predictor(config)


def _num_threads(folder: Path) -> int:
    """Threads of MKL's products; waking them costs more than they save where matrices are small."""
    if (folder / WEIGHTS_FILE).stat().st_size < _LEAST_BYTES_FOR_THREADS:
        return 1
    return int(os.environ.get("MKL_NUM_THREADS") or 1)


def _draws(settings: DecodingSettings, sample: int) -> NDArray[Any]:
    if settings.is_greedy:
        return np.zeros(settings.max_new_tokens, np.float32)
    return uniform_draws(settings.seed, sample, settings.max_new_tokens)


def _controls(
    settings: DecodingSettings, stop_ids: Sequence[int], made: int, *, filler: int, prefix: int
) -> dict[str, NDArray[Any]]:
    """The inputs that hold the settings; see `GenerationGraph.forward`."""
    # Every probability is kept at 1: rounding must not drop the last.
    top_p = settings.top_p if settings.top_p < 1 else 2.0
    forbidden = settings.min_new_tokens - made if stop_ids else 0
    return {
        "counts": np.array(
            [1 if settings.is_greedy else settings.top_k, forbidden, filler, prefix], np.int64
        ),
        "factors": np.array([settings.temperature or 1.0, top_p, settings.repetition_penalty], np.float32),
        "stop_ids": np.array(stop_ids or [-1], np.int64),
    }


def _run_size(made: int, *, shown: bool) -> int:
    """Tokens of the next run; the first is shown at once."""
    if not shown:
        return _TOKENS_PER_RUN
    return _TOKENS_PER_SHOWN_RUN if made else 1


def _until(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    stop = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:stop]
