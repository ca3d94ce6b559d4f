"""What decoding may be set to: the last allowed values and the first that are not."""

from __future__ import annotations

import pytest

from finetune.errors import UserError
from finetune.serving.decoding.settings import MAX_SEED, DecodingSettings

ALLOWED = [
    {"max_new_tokens": 1},
    {"max_new_tokens": 4, "min_new_tokens": 4},
    {"top_k": 0},
    {"top_p": 1.0},
    {"top_p": 1e-6},
    {"temperature": 0.0},
    {"repetition_penalty": 1e-6},
    {"seed": 0},
    {"seed": MAX_SEED},
]
REFUSED = [
    ({"max_new_tokens": 0, "min_new_tokens": 0}, "max_new_tokens is 0 but must be at least 1"),
    (
        {"max_new_tokens": 4, "min_new_tokens": 5},
        r"min_new_tokens is 5 but must be 0 to max_new_tokens \(4\)",
    ),
    ({"min_new_tokens": -1}, "min_new_tokens is -1"),
    ({"top_k": -1}, "top_k is -1 but must be 0 or more"),
    ({"top_p": 0.0}, "top_p is 0.0 but must be above 0 and at most 1"),
    ({"top_p": 1.001}, "top_p is 1.001"),
    ({"temperature": -0.1}, "temperature is -0.1 but must be 0 or more"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0 but must be above 0"),
    ({"seed": -1}, "seed is -1 but must be 0 to"),
    ({"seed": MAX_SEED + 1}, "seed is .* but must be 0 to"),
]


@pytest.mark.parametrize("given", ALLOWED, ids=str)
def test_the_last_allowed_value_is_taken(given):
    assert vars(DecodingSettings(**given)).items() >= given.items()


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=str)
def test_the_first_value_beyond_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        DecodingSettings(**given)


def test_faults_are_told_together():
    with pytest.raises(UserError) as error:
        DecodingSettings(top_k=-1, temperature=-1.0)
    assert len(error.value.faults) == 2


@pytest.mark.parametrize(
    ("given", "greedy"), [({}, True), ({"top_k": 0}, False), ({"top_k": 5, "temperature": 0.0}, True)]
)
def test_greedy_is_one_candidate_or_no_temperature(given, greedy):
    assert DecodingSettings(**given).is_greedy is greedy
