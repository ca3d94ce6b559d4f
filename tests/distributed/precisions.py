"""Runs in bfloat16 and float16 in many layouts, on CPU processes that round as a GPU does.

A case is a family, a method, a precision and a layout. Its run is compared with float32, with one process in the same
precision, with itself resumed from its middle, and with its middle resumed in another layout.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.layouts import (
    COMMON,
    LAYOUTS,
    METHODS,
    ONE,
    LayoutCase,
    build_data,
    build_model,
    curve_from,
)
from tests.distributed.server_runs import Curve, Kill, RankServer, Run
from tests.families.cases import FACTS
from tests.reference.expert_rounding import expert_tolerances

FAMILIES = ("llama", "chatglm2", "qwen", "bloom", "opt")
OTHER_FAMILIES = tuple(name for name in FACTS if name not in FAMILIES)
"""Families that run in one precision, in each way of dividing a model."""
LAYOUT_NAMES = (
    "one", "dp2", "tp2", "pp2", "sharding2 stage1", "sharding2 stage2", "sharding2 stage3", "tp2 x pp2",
)  # fmt: skip
# Small enough that no step of these runs overflows: a skipped step would shift the curve by one.
_SCALE = {"scale_loss": 256.0}
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16 O1": {"bf16": True, "fp16_opt_level": "O1"},
    "bf16 O2": {"bf16": True, "fp16_opt_level": "O2"},
    "fp16 O1": {"fp16": True, "fp16_opt_level": "O1"} | _SCALE,
    "fp16 O2": {"fp16": True, "fp16_opt_level": "O2"} | _SCALE,
}
MASTER_GRADIENTS = "bf16 O2, amp_master_grad"
_SETTINGS = PRECISIONS | {MASTER_GRADIENTS: PRECISIONS["bf16 O2"] | {"amp_master_grad": True}}

LEARNING_RATES = {"sft": 3e-3, "lora": 1e-2, "pt": 3e-2}
"""Large enough for a loss to fall in a few steps, so that what is saved and merged matters."""

NUM_STEPS, SAVED = 6, 3
NUM_TRAIN, NUM_DEV = 17, 4
"""17 samples leave one for the last batch of an epoch: steps 3 and 6 find one of two ranks without a sample."""

TOLERANCES = {
    "bf16": {"float32": 2e-3, "loss": 1.5e-3, "eval_loss": 1.5e-3, "grad_norm": 4e-2},
    "fp16": {"float32": 5e-4, "loss": 2.5e-4, "eval_loss": 2.5e-4, "grad_norm": 5e-3},
}
"""Largest relative differences: of a step's loss from float32, and of three figures from one process in half precision.

A number in bfloat16 is one of 2^7 between two powers of two, in float16 one of 2^10: steps of up to 8e-3 and 1e-3 of it.
Where a sum is divided over processes in another way, some of its results come out one step away, up or down, and so do
some of the activations and gradients that follow. A loss averages over all label tokens of a step, so that little of a
step is left. The norm of a gradient hangs on its largest elements, each of which may be a step away; the gradient of a
prefix, which is the sum over all tokens that see it of small terms of both signs, is off the most.
"""
EXACT = ("learning_rate", "num_tokens", "num_label_tokens", "loss_scale")


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        family: Of the model.
        method: sft, lora or pt.
        precision: A key of `PRECISIONS`, or `MASTER_GRADIENTS`.
        layout: A name in `LAYOUT_NAMES`.
    """

    family: str
    method: str
    precision: str
    layout: str

    @property
    def place(self) -> LayoutCase:
        """The layout's degrees and batch sizes."""
        return ONE if self.layout == "one" else LAYOUTS[self.layout]

    def other_layout(self) -> str:
        """A layout in which the checkpoint of this case is resumed; over all cases each pair occurs."""
        turn = (*FAMILIES, *OTHER_FAMILIES).index(self.family) + 2 * list(METHODS).index(self.method)
        turn += list(_SETTINGS).index(self.precision)
        return LAYOUT_NAMES[(LAYOUT_NAMES.index(self.layout) + 1 + turn % 7) % len(LAYOUT_NAMES)]

    def kill(self) -> Kill | None:
        """When the run is killed, if it is one of those: one for each method and precision."""
        return _KILLS.get(self)


def _plan_kills() -> dict[Case, Kill]:
    pairs = [(method, precision) for method in METHODS for precision in PRECISIONS]
    return {
        Case(
            FAMILIES[number % len(FAMILIES)], method, precision, LAYOUT_NAMES[number % len(LAYOUT_NAMES)]
        ): Kill(f"tmp-checkpoint-{NUM_STEPS}" if number % 2 else f"checkpoint-{SAVED}")
        for number, (method, precision) in enumerate(pairs)
    }


_KILLS = _plan_kills()


class PrecisionBench:
    """Models, data and the runs that several cases are compared with, each made when it is first asked for.

    Args:
        folder: Where everything is written.
        server: Runs the cases.
    """

    def __init__(self, folder: Path, server: RankServer):
        self.folder, self.server = folder, server
        self._float32: dict[tuple[str, str], Curve] = {}
        self._shared: dict[Case, Run] = {}

    def model(self, family: str) -> Path:
        """A family's model folder."""
        path = self.folder / "models" / family
        return path if path.exists() else build_model(family, path, num_layers=2)

    def data(self) -> Path:
        """The data folder."""
        path = self.folder / "data"
        return path if path.exists() else build_data(path, NUM_TRAIN, NUM_DEV)

    def settings(self, family: str, method: str, precision: str | None) -> dict[str, Any]:
        """The arguments of a run, but for the layout.

        Args:
            family: Of the model.
            method: sft, lora or pt.
            precision: None for float32.
        """
        half = {**_SETTINGS[precision], "rehearse_half_precision": True} if precision else {}
        places = {"model_name_or_path": str(self.model(family)), "dataset_name_or_path": str(self.data())}
        lengths = {
            "max_steps": NUM_STEPS, "eval_steps": SAVED, "save_steps": SAVED, "save_strategy": "steps",
            "learning_rate": LEARNING_RATES[method], "warmup_steps": 2, "max_grad_norm": 0.5, "weight_decay": 0.1,
        }  # fmt: skip
        return {**COMMON, **lengths, **METHODS[method], **half, **places}

    def float32(self, family: str, method: str) -> Curve:
        """The curve of one process in float32."""
        key = (family, method)
        if key not in self._float32:
            settings = self.settings(family, method, None) | ONE.arguments() | {"save_strategy": "no"}
            self._float32[key] = self.server.run(settings).check().curve()
        return self._float32[key]

    def case_settings(self, case: Case) -> dict[str, Any]:
        """The arguments of a case; checkpoints of two tensor-parallel ranks are a file for each."""
        files = {"unified_checkpoint": False} if case.layout == "tp2" else {}
        return self.settings(case.family, case.method, case.precision) | case.place.arguments() | files

    def first_run(self, case: Case) -> Run:
        """The run of a case from the first step to the last; those that others need are kept."""
        if case in self._shared:
            return self._shared[case]
        run = self.server.run(self.case_settings(case), case.place.world).check()
        if case.layout in ("one", "tp2"):
            self._shared[case] = run
        return run

    def one(self, case: Case) -> Run:
        """The run of one process in the same precision."""
        return self.first_run(Case(case.family, case.method, case.precision, "one"))

    def resume(self, case: Case, checkpoint: Path, layout: str) -> Curve:
        """The curve of a run that goes on from a checkpoint in some layout."""
        there = Case(case.family, case.method, case.precision, layout)
        more = {"resume_from_checkpoint": str(checkpoint), "save_strategy": "no"}
        run = self.server.run(self.case_settings(there) | more, there.place.world).check()
        curve = run.curve()
        self.drop(run)
        return curve

    def kill_and_restart(self, case: Case, kill: Kill) -> Curve:
        """The curve of a run whose processes were killed, and which was started again with the same command."""
        settings, world = self.case_settings(case), case.place.world
        killed = self.server.run(settings, world, kill=kill)
        assert killed.killed and set(killed.codes) == {-9}, killed.tails()
        again = self.server.run(settings, world, folder=killed.folder).check()
        assert f"Continuing from {killed.folder}/checkpoint-{SAVED}" in again.logs[0], again.tails()
        curve = again.curve()
        self.drop(again)
        return curve

    def drop(self, run: Run) -> None:
        """Removes what a run left, unless other cases need it: hundreds of runs would fill a disk."""
        if run not in self._shared.values():
            shutil.rmtree(run.folder, ignore_errors=True)

    def forget(self, keep: tuple[str, str, str]) -> None:
        """Removes the runs that no case of this family, method and precision needs."""
        for case in [case for case in self._shared if (case.family, case.method, case.precision) != keep]:
            shutil.rmtree(self._shared.pop(case).folder, ignore_errors=True)


def measure(bench: PrecisionBench, case: Case) -> dict[str, Any]:
    """Runs a case in all its forms.

    Returns:
        `float32` (of each figure the largest relative difference from float32), `one` (from one process in the same
        precision), `resumed` (from the run itself), `other` (of the run resumed in `other_layout`, from one process)
        and, where the run was also killed, `killed` (from the run itself).
    """
    run = bench.first_run(case)
    curve, one = run.curve(), bench.one(case).curve()
    checkpoint, other = run.folder / f"checkpoint-{SAVED}", case.other_layout()
    found = {
        "float32": differences(curve, bench.float32(case.family, case.method)),
        "one": differences(curve, one),
        "resumed": differences(bench.resume(case, checkpoint, case.layout), curve_from(curve, SAVED + 1)),
        "other_layout": other,
        "other": differences(bench.resume(case, checkpoint, other), curve_from(one, SAVED + 1)),
    }
    if kill := case.kill():
        found["killed"] = differences(bench.kill_and_restart(case, kill), curve)
    bench.drop(run)
    return found


def differences(curve: Curve, expected: Curve) -> dict[str, float]:
    """The largest relative difference of each figure that both have.

    Raises:
        AssertionError: A step or an evaluation is missing on one side.
    """
    assert {"loss", "grad_norm", "learning_rate", "eval_loss"} <= curve.keys() & expected.keys()
    found = {}
    for name in sorted(curve.keys() & expected.keys()):
        assert list(curve[name]) == list(expected[name]), (name, curve[name], expected[name])
        found[name] = max(_relative(value, expected[name][step]) for step, value in curve[name].items())
    return found


def _relative(value: float, expected: float) -> float:
    if not (math.isfinite(value) and math.isfinite(expected)):
        return math.inf
    return abs(value - expected) / max(abs(expected), 1e-12)


def tolerances_of(precision: str, family: str = "", method: str = "") -> dict[str, float]:
    """`TOLERANCES` of a precision; in bf16 O2 those of families with experts are measured of transformers."""
    limits = TOLERANCES[precision[:4]]
    return expert_tolerances(family, method, limits) if precision.startswith("bf16 O2") else limits


def faults_of(found: dict[str, Any], precision: str, family: str = "", method: str = "") -> list[str]:
    """What of a case's measurements is not as it should be."""
    limits = tolerances_of(precision, family, method)
    faults = []
    if not found["float32"]["loss"] <= limits["float32"]:
        faults.append(f"loss is {found['float32']['loss']:.1e} from float32")
    if found["float32"]["loss"] == 0:
        faults.append("nothing was rounded: the losses are those of float32")
    for form in ("one", "other"):
        faults += [
            f"{form}: {name} is {found[form][name]:.1e} from one process"
            for name in ("loss", "eval_loss", "grad_norm")
            if not found[form][name] <= limits[name]
        ]
    for form in ("float32", "one", "other"):
        faults += [f"{form}: {name} differs" for name in EXACT if found[form].get(name, 0.0) > 0]
    for form in ("resumed", "killed"):
        faults += [
            f"{form}: {name} is {value:.1e} away" for name, value in found.get(form, {}).items() if value
        ]
    return faults
