"""The two evaluations: loss over the dev set, and generated text against references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from finetune.adapters.base import base_model
from finetune.data.batches.collate import collate_prompts
from finetune.machine.randomness.seeding import derive_seed
from finetune.models.sequence_parallel import follow_row_lengths
from finetune.parallel.sharding.flat_slices import no_grad_no_autocast
from finetune.processes.groups import ProcessGroups
from finetune.storage.dtypes import Array
from finetune.training.loss import LabelPositions, best_tokens, logits_of, token_loss_sum
from finetune.training.metrics import generation_metrics, loss_metrics

if TYPE_CHECKING:
    from finetune.data.batches.rows import Batch, Rows
    from finetune.data.samples.piece_encoding import TextEncoder
    from finetune.data.samples.tokenize import Prompt
    from finetune.parallel.parallel_model import ParallelModel


class Evaluation(Protocol):
    """Something that turns a model into metrics."""

    num_batches: int
    label: str

    def run(self, parallel: ParallelModel, advance: Callable[[], None]) -> dict[str, float]:
        """Evaluates a model that is in evaluation mode; calls `advance` after every batch.

        Every rank calls it and gets the same metrics.
        """
        ...


def batches_by_length(lengths: Sequence[int] | Array, batch_size: int) -> list[Array]:
    """Indices in batches of similar length, longest first, so that little is padding."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def share_of(batches: Sequence[Array], groups: ProcessGroups) -> list[Array]:
    """Every n-th batch, for n ranks that take different samples.

    All get the same number, since every pass is a collective: a rank that is out of batches gets empty ones.
    """
    layout = groups.layout
    mine = list(batches[layout.data_rank(groups.rank) :: layout.data_world])
    most = -(-len(batches) // layout.data_world)
    return mine + [np.zeros(0, np.int64)] * (most - len(mine))


class LossEvaluation:
    """Loss, perplexity and token accuracy over labelled samples.

    Sums are taken per token, so the result depends neither on the batch size nor on packing; the best token
    of each position is picked on the spot and logits are never gathered.

    Args:
        rows: The dev set as rows of batches.
        batch_size: Rows per forward pass.
        label_positions: Restricts logits to labelled positions; None on a pipeline's earlier stages.
        groups: Share out the batches.
    """

    label = "Evaluating"

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        label_positions: LabelPositions | None,
        groups: ProcessGroups | None = None,
    ):
        self.rows = rows
        self.label_positions = label_positions
        self._batches = share_of(batches_by_length(rows.lengths, batch_size), groups or ProcessGroups())
        self.num_batches = len(self._batches)

    def run(self, parallel: ParallelModel, advance: Callable[[], None]) -> dict[str, float]:
        """Returns `loss` (nats per label token), `perplexity` and `accuracy` (0 to 1)."""
        import paddle

        sums = paddle.zeros([3], dtype="float64")  # read once, at the end
        for indices in self._batches:
            batch = (
                self.rows.batch(indices) if len(indices) else self.rows.batch(np.zeros(1, np.int64)).idle()
            )
            counted = self._run_batch(parallel, batch)
            if counted is not None and batch.weight:
                with no_grad_no_autocast():
                    sums = sums + counted
            advance()
        loss_sum, num_tokens, num_correct = parallel.total(sums)
        return loss_metrics(loss_sum, int(num_tokens), int(num_correct))

    def _run_batch(self, parallel: ParallelModel, batch: Batch) -> Any:
        """Loss, label tokens and right tokens of a batch, float64 [3]; None where the logits are not computed."""
        import paddle

        chosen = self.label_positions.only(batch.labels) if self.label_positions else nullcontext()
        with chosen as label_ids:
            outputs = parallel.forward(batch.tensors())
        if outputs is None:
            return None
        assert label_ids is not None, "the ranks that compute logits restrict them to the labels"
        with no_grad_no_autocast():
            logits, group = logits_of(outputs), parallel.logits_group
            loss = token_loss_sum(logits, label_ids, group)
            num_correct = (best_tokens(logits, group) == label_ids).sum()
            counts = (loss, paddle.full([], label_ids.shape[0], "int64"), num_correct)
            return paddle.stack([count.astype("float64").reshape([]) for count in counts])


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
        groups: Share out the prompts.
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
        groups: ProcessGroups | None = None,
    ):
        self.groups = groups or ProcessGroups()
        self.prompts = prompts
        self.encoder = encoder
        self.settings = settings
        self.seed = seed
        self.generations: list[dict[str, str]] = []
        batches = batches_by_length([len(prompt.input_ids) for prompt in prompts], batch_size)
        self._numbers = {int(indices[0]): number for number, indices in enumerate(batches)}
        self._batches = share_of(batches, self.groups)
        self.num_batches = len(self._batches)

    def run(self, parallel: ParallelModel, advance: Callable[[], None]) -> dict[str, float]:
        """Returns `bleu4`, `rouge1`, `rouge2` and `rougel`, each 0 to 1."""
        mine: dict[int, str] = {}
        # Texts end after any number of passes, so ranks could not gather weights layer by layer together.
        with parallel.replicas.whole_parameters():
            for indices, answers in self._generate(parallel.model):
                for index, answer in zip(indices, answers, strict=True):
                    mine[int(index)] = self.encoder.decode(answer)
                advance()
        outputs = [""] * len(self.prompts)
        for texts in self.groups.data.gather_objects(list(mine.items())):
            for index, text in texts:
                outputs[index] = text
        self.generations = [
            {"source": prompt.source, "output": output, "target": prompt.target}
            for prompt, output in zip(self.prompts, outputs, strict=True)
        ]
        return generation_metrics(outputs, [prompt.target for prompt in self.prompts])

    def _generate(self, model: Any) -> Iterator[tuple[Array, list[list[int]]]]:
        """Batches of prompt indices with the token ids of their answers, end token cut off."""
        base = base_model(model)
        generating = model if hasattr(model, "prefix_config") else base
        ends = [self.encoder.eos_token_id, *getattr(self.encoder, "chat_end_ids", ())]
        config = base.config
        split_logits, config.tensor_parallel_output = config.tensor_parallel_output, False
        try:
            with follow_row_lengths(base) as multiple:
                yield from self._generate_batches(generating, ends, multiple)
        finally:
            config.tensor_parallel_output = split_logits

    def _generate_batches(
        self, generating: Any, ends: list[int], multiple: int
    ) -> Iterator[tuple[Array, list[list[int]]]]:
        import paddle

        for indices in self._batches:
            if not len(indices):
                yield indices, []
                continue
            paddle.seed(derive_seed(self.seed, "generate", self._numbers[int(indices[0])]))
            prompts = [self.prompts[i] for i in indices]
            prompts += prompts[-1:] * (-len(prompts) % multiple)
            batch = collate_prompts(prompts, pad_token_id=self.encoder.pad_token_id)
            with paddle.no_grad():
                ids, _ = generating.generate(
                    **{name: paddle.to_tensor(array) for name, array in batch.items()},
                    **self.settings.to_kwargs(),
                    eos_token_id=ends,
                    pad_token_id=self.encoder.pad_token_id,
                )
            yield indices, [_until(row, ends) for row in ids[: len(indices)].tolist()]


def _until(ids: list[int], ends: list[int]) -> list[int]:
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]
