"""The reference of a preference run: which model it is, and what it gives to every answer, asked for once.

Three models can be it (setting `reference_model`):

- start: the weights as the run finds them, with the adapter that it starts from. They are in memory anyway, and are
  asked before the first step.
- base: the same weights without any adapter.
- a model of its own, by folder or name.

A model other than the start is loaded, asked and released before the model of the run is loaded: the memory that a run
takes is that of the larger of the two, never of both. Log-probabilities are kept in the output folder
(`REFERENCE_FILE`), from where a run that continues takes them to the last digit.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.run.adapter_source import adapter_folder
from finetune.run.alignment import build_preference_rows
from finetune.run.reference_model import (
    OtherModel,
    find_other_model,
    load_reference,
    matching_tokenizer,
    release_memory,
)
from finetune.settings.alignment import BASE, has_reference
from finetune.storage.files import write_atomically

if TYPE_CHECKING:
    from finetune.data.batches.preference_rows import PreferenceRows
    from finetune.models.resolve import ResolvedModel
    from finetune.processes.groups import ProcessGroups
    from finetune.processes.phases import PhaseRecord
    from finetune.run.data import RunData
    from finetune.run.directory import RunDirectory
    from finetune.run.tokenizer import TokenizerPair
    from finetune.settings.arguments import Arguments
    from finetune.training.preference.objective import PreferenceObjective
    from finetune.training.preference.passes import PreferencePasses
    from finetune.training.preference.reward_objective import RewardObjective
    from finetune.training.trainer import FinetuneTrainer

REFERENCE_FILE = "reference_log_probabilities.npz"
"""In the output folder: what the reference model gives to every answer, by split, hash of the data, and model."""

Tables = dict[str, NDArray[Any]]


class Reference:
    """The reference of a run.

    Args:
        args: The settings of the run.
        other: The model, where it is not the start of the run.
    """

    def __init__(self, args: Arguments, other: OtherModel | None = None):
        self._args, self._other = args, other
        self._known: Tables = {}

    def ask_other(
        self,
        run: RunDirectory,
        data: RunData,
        pair: TokenizerPair,
        *,
        groups: ProcessGroups,
        phases: PhaseRecord,
    ) -> None:
        """Loads a reference of its own, asks it about all answers that are not known, and releases it.

        Raises:
            UserError: The model reads the ids of the run's tokenizer otherwise, or has no positions for the longest.
        """
        if has_reference(vars(self._args.alignment)) and not self._is_fresh(run):
            self._known = _read_known(run.path / REFERENCE_FILE, groups)
        other = self._other
        if other is None:
            return
        unknown = self._find_unknown(other, data, pair)
        if not unknown:
            return
        own_pair = matching_tokenizer(other, self._args, pair, data)
        phases.enter("reference model")
        trainer = load_reference(other, run, data, own_pair, groups=groups, phases=phases)
        for key, rows in unknown.items():
            table = _ask(_passes(other.args, rows, trainer), trainer)
            self._keep(run, groups, {key: table})
        del trainer
        release_memory()

    def add(self, run: RunDirectory, trainer: FinetuneTrainer) -> list[str]:
        """Gives the losses of a run their log-probabilities; the start of the run is asked for those not known.

        Returns:
            What the person should know.
        """
        objective = trainer.parts.objective
        if objective is None or not objective.settings.uses_reference:
            return []
        notes = []
        for split, (passes, each) in _splits(self._args, trainer).items():
            key = self._key(split, passes.rows.fingerprint())
            if key not in self._known:
                trainer.parts.phases.enter("reference model")
                table = _ask(passes, trainer)
                notes += self._notes_on_missing(split, is_fresh=self._is_fresh(run))
                self._keep(run, trainer.groups, {key: table})
            each.reference = self._known[key]
        return notes

    def describe(self) -> list[str]:
        """One line that says which model it is, where a loss asks one."""
        if not has_reference(vars(self._args.alignment)):
            return []
        if self._other is None:
            adapter = adapter_folder(self._args)
            what = f"the model as the run finds it{f', with the adapter of {adapter}' if adapter else ''}"
            if adapter:
                what += " (reference_model base takes the model without it)"
        elif self._other.identity == BASE:
            what = "the model without its adapter"
        else:
            what = f"{self._other.resolved.name}, asked before training and released"
        return [f"Reference: {what}"]

    def _find_unknown(
        self, other: OtherModel, data: RunData, pair: TokenizerPair
    ) -> dict[str, PreferenceRows]:
        """The rows of each split that the file does not know, by the key that it will have there."""
        from finetune.run.trainer import padding_of

        found = {}
        for split, samples in (("train", data.train), ("dev", data.dev)):
            if len(samples):
                padding = padding_of(other.args, pair)
                rows = build_preference_rows(other.args, samples, other.resolved, padding=padding)
                found[self._key(split, rows.fingerprint())] = rows
        return {key: rows for key, rows in found.items() if key not in self._known}

    def _key(self, split: str, fingerprint: str) -> str:
        return " ".join([split, fingerprint, *([self._other.identity] if self._other else [])])

    def _is_fresh(self, run: RunDirectory) -> bool:
        return self._args.training.do_train and run.resume is None and not run.trained

    def _keep(self, run: RunDirectory, groups: ProcessGroups, found: Tables) -> None:
        """Writes the file anew after each split: what was asked is not asked again."""
        self._known |= found
        if groups.is_first and self._args.training.do_train:
            content = io.BytesIO()
            np.savez(content, **self._known)
            write_atomically(run.path / REFERENCE_FILE, content.getvalue())

    def _notes_on_missing(self, split: str, *, is_fresh: bool) -> list[str]:
        if is_fresh:
            return []
        if self._args.training.do_train:
            return [f"the reference log-probabilities of {split} are not in the output folder: computed anew"]
        return [
            f"{REFERENCE_FILE} in the output folder does not know these data: the model is compared with itself, so that "
            "rewards are 0; give the model that it was aligned from as reference_model (base: without the adapter)"
        ]


def find_reference(args: Arguments, resolved: ResolvedModel) -> Reference:
    """The reference that the settings ask for, compared with the layout before processes meet.

    Raises:
        UserError: See `find_other_model`.
    """
    return Reference(args, find_other_model(args, resolved))


def _passes(args: Arguments, rows: PreferenceRows, trainer: FinetuneTrainer) -> PreferencePasses:
    from finetune.training.preference.passes import PreferencePasses

    return PreferencePasses(
        rows,
        batch_size=args.training.per_device_eval_batch_size,
        label_positions=trainer.parts.label_positions,
        groups=trainer.groups,
    )


def _splits(
    args: Arguments, trainer: FinetuneTrainer
) -> dict[str, tuple[PreferencePasses, PreferenceObjective | RewardObjective]]:
    from finetune.data.batches.batch_source import PreferenceSource
    from finetune.training.preference.evaluation import PreferenceEvaluation

    found: dict[str, tuple[PreferencePasses, PreferenceObjective | RewardObjective]] = {}
    if isinstance(trainer.batches, PreferenceSource) and trainer.parts.objective:
        found["train"] = _passes(args, trainer.batches.groups, trainer), trainer.parts.objective
    if isinstance(trainer.evaluation, PreferenceEvaluation):
        found["dev"] = trainer.evaluation.passes, trainer.evaluation.objective
    return found


def _ask(passes: PreferencePasses, trainer: FinetuneTrainer) -> NDArray[Any]:
    """Log-probabilities under the weights as they are."""
    from finetune.training.preference.passes import reference_log_probabilities

    trainer.model.eval()
    with (
        trainer.training_log.evaluating(passes.num_batches, "Reference") as advance,
        trainer.autocast_smart_context_manager(),
    ):
        table = reference_log_probabilities(passes, trainer.parallel, advance)
    trainer.model.train()
    return table


def _read_known(path: Path, groups: ProcessGroups) -> Tables:
    """What the file holds, the same on all ranks though the first one alone may see it; nothing of a damaged file."""
    from finetune.processes.joint_steps import on_first

    def read() -> Mapping[str, Any]:
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name].tolist() for name in file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return {}

    return {name: np.array(rows, dtype=np.float32) for name, rows in on_first(groups, read).items()}
