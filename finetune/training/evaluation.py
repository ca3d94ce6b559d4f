"""The two evaluations: loss over the dev set, and generated text against references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from finetune.data.collate import collate_prompts
from finetune.training.loss import LabelPositions, logits_of, token_loss_sum
from finetune.training.metrics import generation_metrics, loss_metrics
from finetune.training.seeding import derive_seed

if TYPE_CHECKING:
    from finetune.data.tokenize import Prompt, TextEncoder
    from finetune.training.rows import Rows


class Evaluation(Protocol):
    """Something that turns a model into metrics."""

    num_batches: int
    label: str

    def run(self, model: Any, advance: Callable[[], None]) -> dict[str, float]:
        """Evaluates a model that is in evaluation mode; calls `advance` after every batch."""
        ...


def batches_by_length(lengths: Sequence[int] | np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Indices in batches of similar length, longest first, so that little is padding."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class LossEvaluation:
    """Loss, perplexity and token accuracy over labelled samples.

    Sums are taken per token, so the result depends neither on the batch size nor on packing; the best token
    of each position is picked on the spot and logits are never gathered.

    Args:
        rows: The dev set as rows of batches.
        batch_size: Rows per forward pass.
        label_positions: Restricts logits to labelled positions.
    """

    label = "Evaluating"

    def __init__(self, rows: Rows, *, batch_size: int, label_positions: LabelPositions):
        self.rows = rows
        self.label_positions = label_positions
        self._batches = batches_by_length(rows.lengths, batch_size)
        self.num_batches = len(self._batches)

    def run(self, model: Any, advance: Callable[[], None]) -> dict[str, float]:
        """Returns `loss` (nats per label token), `perplexity` and `accuracy` (0 to 1)."""
        import paddle

        loss_sum, num_tokens, num_correct = 0.0, 0, 0
        for indices in self._batches:
            batch = self.rows.batch(indices)
            with paddle.no_grad(), self.label_positions.only(paddle.to_tensor(batch.labels)) as labels:
                logits = logits_of(model(**batch.tensors()))
            loss_sum += float(token_loss_sum(logits, labels))
            num_correct += int((logits.argmax(axis=-1) == labels).sum())
            num_tokens += int(labels.shape[0])
            advance()
        return loss_metrics(loss_sum, num_tokens, num_correct)


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated; `top_k` of 1 is greedy search."""

    max_new_tokens: int
    top_k: int = 1
    top_p: float = 1.0
    temperature: float = 1.0

    def to_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of PaddleNLP's `generate`."""
        if self.top_k == 1:
            return {"max_new_tokens": self.max_new_tokens, "decode_strategy": "greedy_search"}
        return {
            "max_new_tokens": self.max_new_tokens,
            "decode_strategy": "sampling",
            "top_k": self.top_k,
            "top_p": self.top_p,
            "temperature": self.temperature,
        }


class GenerationEvaluation:
    """BLEU-4 and ROUGE of generated answers; keeps the answers in `generations`.

    Args:
        prompts: The dev set.
        batch_size: Prompts per generated batch.
        encoder: The model's tokenizer.
        settings: How to generate.
        seed: Seed of the run, for sampling.
    """

    label = "Generating"

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        batch_size: int,
        encoder: TextEncoder,
        settings: GenerationSettings,
        seed: int,
    ):
        self.prompts = prompts
        self.encoder = encoder
        self.settings = settings
        self.seed = seed
        self.generations: list[dict[str, str]] = []
        self._batches = batches_by_length([len(prompt.input_ids) for prompt in prompts], batch_size)
        self.num_batches = len(self._batches)

    def run(self, model: Any, advance: Callable[[], None]) -> dict[str, float]:
        """Returns `bleu4`, `rouge1`, `rouge2` and `rougel`, each 0 to 1."""
        outputs = [""] * len(self.prompts)
        for indices, answers in self._generate(model):
            for index, answer in zip(indices, answers, strict=True):
                outputs[index] = self.encoder.decode(answer)
            advance()
        self.generations = [
            {"source": prompt.source, "output": output, "target": prompt.target}
            for prompt, output in zip(self.prompts, outputs, strict=True)
        ]
        return generation_metrics(outputs, [prompt.target for prompt in self.prompts])

    def _generate(self, model: Any) -> Iterator[tuple[np.ndarray, list[list[int]]]]:
        """Batches of prompt indices with the token ids of their answers, end token cut off."""
        import paddle

        generating = model if hasattr(model, "prefix_config") else getattr(model, "model", model)
        ends = [self.encoder.eos_token_id, *getattr(self.encoder, "chat_end_ids", ())]
        for number, indices in enumerate(self._batches):
            paddle.seed(derive_seed(self.seed, "generate", number))
            batch = collate_prompts(
                [self.prompts[i] for i in indices], pad_token_id=self.encoder.pad_token_id
            )
            with paddle.no_grad():
                ids, _ = generating.generate(
                    **{name: paddle.to_tensor(array) for name, array in batch.items()},
                    **self.settings.to_kwargs(),
                    eos_token_id=ends,
                    pad_token_id=self.encoder.pad_token_id,
                )
            yield indices, [_until(row, ends) for row in ids.tolist()]


def _until(ids: list[int], ends: list[int]) -> list[int]:
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]
