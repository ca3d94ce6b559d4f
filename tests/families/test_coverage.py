"""Each claim of the page of families is shown for every registered family, by tests that run for it."""

from __future__ import annotations

import pytest

from finetune.families.family import families
from tests.families.coverage import CLAIMS, Proof


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.english)
def test_every_family_is_shown_or_named_with_a_reason(claim):
    shown = claim.families()
    assert shown == {*families()} - {*claim.exceptions}
    assert all(all(reasons) for reasons in claim.exceptions.values())


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.english)
def test_every_test_of_a_claim_runs_for_all_of_its_families_but_those_that_compare_with_a_reference(claim):
    """References are of two kinds, each with a test of its own; elsewhere one test must do for all."""
    for proof in claim.proofs:
        if not proof.test.startswith("tests/reference/"):
            assert proof.families() == claim.families(), proof.test


def test_no_test_leaves_a_family_out_while_it_runs():
    """Those of the matrices may skip what stands in the results of an earlier run."""
    proofs = [proof for claim in CLAIMS for proof in claim.proofs]
    assert [proof.test for proof in proofs if proof.skips and not proof.is_marked] == []
    assert Proof("tests/families/test_shared_prompts.py::test_a_window_counts_the_tokens_of_a_text").skips


def test_a_claim_is_made_once():
    for texts in ([claim.english for claim in CLAIMS], [claim.chinese for claim in CLAIMS]):
        assert [
            text for text in texts if texts.count(text) > 1 and "same" not in text and "同上" not in text
        ] == []


def families_of(example: str) -> set[str]:
    return Proof(f"tests/families/test_coverage.py::{example}").families()


def test_tests_are_read_as_pytest_reads_them():
    assert families_of("example_with_values") == {"opt", "bloom"}
    assert families_of("example_with_a_fixture_of_a_fixture") == {*families()}
    assert families_of("example_without_families") == set()


@pytest.mark.parametrize(
    ("number", "family"),
    [(1, "opt"), pytest.param(2, "llama", marks=pytest.mark.skip), pytest.param(3, "bloom")],
)
def example_with_values(number, family):
    """No test: values in the place of the fixture of that name, one of them skipped."""


@pytest.mark.parametrize("folder", ["plain"], indirect=True)
def example_with_a_fixture_of_a_fixture(folder):
    """No test: families by what a fixture asks for."""


@pytest.fixture
def folder(family):
    """Of the example above."""
    return family.name


@pytest.mark.parametrize("family", [1, 2])
def example_without_families(family, tmp_path):
    """No test: a parameter that only has the name of the fixture."""


def test_marked_tests_are_told_from_ordinary_ones():
    marked = {proof.test.partition("::")[0] for claim in CLAIMS for proof in claim.proofs if proof.is_marked}
    assert "tests/distributed/test_matrix.py" in marked and "tests/families/test_behaviour.py" not in marked
