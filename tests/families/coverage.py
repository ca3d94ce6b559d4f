"""What is shown of every family, by which test, and the families that a claim leaves out.

A test tells for which families it runs by its parameters, which are read here as pytest reads them; so a claim cannot name
a test that looks at fewer families than it says, and a new family is missed where no test takes it up.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.families.family import families, find_family
from tests import tiny_models
from tests.reference import chatglm2_qwen_curves, curves, gradients, logits

MARKED = "slow_distributed"
"""The mark of tests that are run by name, whose results stand in tables of the documentation."""

FamilyOf = Callable[[Any], "str | None"]


def _named(value: Any) -> str | None:
    """The family of a parameter: its name, a record, or a case of one."""
    name = getattr(value, "family", None) or getattr(value, "name", None) or value
    return name if isinstance(name, str) and name in families() else None


def _family_of_logits(name: str) -> str | None:
    """By what the golden checkpoint says, as a run would find it."""
    config = json.loads(logits.GOLDEN_CHECKPOINTS.read_text())["checkpoints"][name]["config"]
    return find_family(logits.CASES[name].form.config_of(config)).name


def _of_cases(cases: Mapping[str, Any], *, lora: bool) -> FamilyOf:
    return lambda name: cases[name].family if cases[name].lora is lora else None


@dataclass(frozen=True)
class Proof:
    """A test that runs for families.

    Attributes:
        test: Path of the file and name of the function, as pytest writes them.
        family_of: A parameter -> the family that it stands for; None where it stands for none.
    """

    test: str
    family_of: FamilyOf = _named

    @property
    def is_marked(self) -> bool:
        """Whether it is left out unless it is asked for."""
        module, function = self._load()
        marks = [*_marks(module), *_marks(function)]
        return any(mark.name == MARKED for mark in marks)

    def families(self) -> set[str]:
        """The families that the test runs for."""
        module, function = self._load()
        found = {self.family_of(value) for value in _values(module, function)}
        return {name for name in found if name}

    def _load(self) -> tuple[Any, Any]:
        path, _, name = self.test.partition("::")
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        return module, getattr(module, name)


def _marks(owner: Any) -> list[Any]:
    marks = getattr(owner, "pytestmark", [])
    return marks if isinstance(marks, list) else [marks]


def _values(module: Any, function: Any) -> Iterator[Any]:
    """All values of the parameters of a test and of the fixtures that it asks for, skipped ones left out."""
    for mark in _marks(function):
        for row in mark.args[1] if mark.name == "parametrize" else ():
            values = getattr(row, "values", row)
            if not any(each.name in ("skip", "xfail") for each in getattr(row, "marks", ())):
                yield from values if isinstance(values, tuple) else (values,)
    for name in inspect.signature(inspect.unwrap(function)).parameters:
        fixture = getattr(module, name, None) or getattr(tiny_models, name, None)
        marker = getattr(fixture, "_fixture_function_marker", None)
        if marker is not None:
            yield from marker.params or ()
            yield from _values(module, fixture)


@dataclass(frozen=True)
class Claim:
    """Something that holds for every family.

    Attributes:
        english: The claim, as the page of families says it.
        chinese: The same.
        proofs: Together they run for every family but the exceptions.
        exceptions: Families for which it does not hold, and why.
    """

    english: str
    chinese: str
    proofs: tuple[Proof, ...]
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def families(self) -> set[str]:
        """The families that its tests run for."""
        return set().union(*(proof.families() for proof in self.proofs))


def _proofs(*tests: str, family_of: FamilyOf = _named) -> tuple[Proof, ...]:
    return tuple(Proof(test, family_of) for test in tests)


_CURVES = "tests/reference/test_curves.py::test_curve_equals_the_golden_one"
_WRITTEN = "tests/reference/test_chatglm2_qwen.py"
_BEHAVIOUR = "tests/families/test_behaviour.py"


def _curve_claim(english: str, chinese: str, *, lora: bool) -> Claim:
    proofs = (
        Proof(_CURVES, _of_cases(curves.CASES, lora=lora)),
        Proof(
            f"{_WRITTEN}::test_curve_equals_the_golden_one", _of_cases(chatglm2_qwen_curves.CASES, lora=lora)
        ),
    )
    return Claim(english, chinese, proofs)


def _gradient_claim(english: str, chinese: str, *, lora: bool) -> Claim:
    test = "tests/reference/test_gradients.py::test_gradients_equal_the_golden_ones"
    return Claim(english, chinese, (Proof(test, _of_cases(gradients.CASES, lora=lora)),))


CLAIMS = (
    Claim(
        "logits are the reference's, to 1e-5", "logits 与参照相同，误差在 1e-5 以内",
        (
            Proof("tests/reference/test_logits.py::test_logits_equal_the_golden_ones", _family_of_logits),
            Proof(f"{_WRITTEN}::test_logits_equal_the_reference"),
        ),
    ),
    _gradient_claim("every tensor's gradient is the reference's, to 1e-5: all weights",
                    "每个张量的梯度与参照相同，误差在 1e-5 以内：全部权重", lora=False),
    _gradient_claim("the same: LoRA", "同上：LoRA", lora=True),
    _curve_claim("20 steps of training have the reference's losses, to 1e-4: all weights",
                 "20 步训练的损失与参照相同，误差在 1e-4 以内：全部权重", lora=False),
    _curve_claim("the same: LoRA", "同上：LoRA", lora=True),
)  # fmt: skip
