"""Writes the rewards of the answers in a file: encoded as in training, longest first, kept as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.data.batches.reward_rows import RewardRows
from finetune.data.preference.encoding import Dropped, PreferenceBuilder
from finetune.data.preference.sample import PreferenceSample
from finetune.data.reading.records import FaultCollector
from finetune.data.samples.dataset import with_system
from finetune.machine.screen import print_text
from finetune.models.reward_head import REWARD_HEAD

if TYPE_CHECKING:
    from finetune.serving.predict.journal import Journal
    from finetune.serving.predict.loading import PlannedModel
    from finetune.serving.predict.scored_rows import ScoredRow

_NO_LIMIT = 2**24


@dataclass
class Scorer:
    """A reward model, with or without its adapter, and its tokenizer.

    Attributes:
        plan: How it was found.
        encoder: The tokenizer.
        model: In evaluation mode.
    """

    plan: PlannedModel
    encoder: Any
    model: Any
    _positions: Any = None

    def encode(self, rows: Sequence[ScoredRow]) -> list[PreferenceSample]:
        """All answers of all rows behind their prompts.

        Raises:
            UserError: Answers that are empty, or that the template cannot write, or that have no room.
        """
        options = self.plan.options
        system = options.system_text()
        builder = PreferenceBuilder(
            self.encoder,
            self.plan.template,
            src_length=options.src_length,
            max_length=self.plan.position_limit or _NO_LIMIT,
            reads_ends=True,
        )
        answers = with_system([each for row in rows for each in row.answers], system)
        faults, samples = FaultCollector(), []
        for made in builder.build(answers):
            if isinstance(made, Dropped):
                faults.add(f"{made.conversation.place}: {made.error or made.reason}")
            else:
                samples.append(made)
        faults.raise_if_any()
        return samples

    def rewards(self, rows: RewardRows, numbers: Any) -> list[float]:
        """The value of each of some answers."""
        import paddle

        from finetune.adapters.base import base_model
        from finetune.models.layers import find_layer
        from finetune.training.loss import LabelPositions, logits_of
        from finetune.training.preference.reward_objective import answer_rewards

        if self._positions is None:
            head = find_layer(base_model(self.model), REWARD_HEAD)
            length_first = self.plan.resolved.family.hidden_length_first
            self._positions = LabelPositions(head, length_first=length_first)
        batch = rows.batch(numbers)
        with paddle.no_grad(), self._positions.only(batch.labels):
            values = logits_of(self.model(**batch.tensors()))
        return [float(f"{value:.7g}") for value in answer_rewards(batch, values).tolist()]


def score_rows(
    scorer: Scorer,
    rows: Sequence[ScoredRow],
    journal: Journal,
    *,
    batch_size: int,
    show_message: Callable[[str], None] = lambda line: print_text(line, stream=sys.stderr),
) -> None:
    """Computes what the journal does not hold yet, and writes the output.

    Args:
        scorer: The reward model.
        rows: All lines of the input.
        journal: Of the output; it holds a text for each answer.
        batch_size: Answers of a forward pass.
        show_message: Tells a person.

    Raises:
        UserError: Answers that cannot be encoded; the disk is full.
    """
    from finetune.reporting.progress import ProgressReporter
    from finetune.training.evaluation import batches_by_length

    samples = scorer.encode(rows)
    if num_cut := sum(bool(each.num_cut_prompt or each.num_cut_answer) for each in samples):
        show_message(f"{num_cut} of {len(samples)} texts were cut to the positions of the model.")
    open_ = [number for number in range(len(samples)) if number not in journal.answers]
    if journal.answers:
        show_message(f"Going on: {len(journal.answers)} of {len(samples)} rewards are there.")
    made = RewardRows(samples, pad_token_id=scorer.encoder.pad_token_id, mask=None)
    batches = batches_by_length(made.lengths[open_], batch_size)
    with ProgressReporter(0).evaluating(len(batches), "Scoring") as advance:
        for places in batches:
            numbers = [open_[place] for place in places]
            found = scorer.rewards(made, numbers)
            journal.add(dict(zip(numbers, map(repr, found), strict=True)))
            advance()
    results, start = [], 0
    for row in rows:
        stop = start + len(row.answers)
        results.append(row.result([float(journal.answers[number]) for number in range(start, stop)]))
        start = stop
    journal.finish(results)
    show_message(_summary(journal, rows, results))


def _summary(journal: Journal, rows: Sequence[ScoredRow], results: Sequence[dict[str, Any]]) -> str:
    from finetune.serving.predict.scored_rows import CHOSEN, REJECTED

    pairs = [each for row, each in zip(rows, results, strict=True) if row.is_pair]
    line = f"{journal.output}: {len(rows)} lines with rewards"
    if not pairs:
        return f"{line}."
    rejected = [each[REJECTED] if isinstance(each[REJECTED], list) else [each[REJECTED]] for each in pairs]
    margins = [each[CHOSEN] - other for each, others in zip(pairs, rejected, strict=True) for other in others]
    right = sum(margin > 0 for margin in margins)
    return (
        f"{line}; of {len(margins)} pairs the chosen answer has the larger reward in {right} "
        f"({right / len(margins):.1%}), mean margin {sum(margins) / len(margins):.4f}."
    )
