"""The static decoder: ends, pieces, sampling, limits."""

from __future__ import annotations

import subprocess
import sys

import pytest

from finetune.errors import UserError
from finetune.serving.decoding import decoder as module
from finetune.serving.decoding.decoder import StaticDecoder
from finetune.serving.decoding.settings import DecodingSettings
from tests.conftest import ROOT
from tests.serving.export.builders import dynamic_model, dynamic_text, prompts

OPEN_END = DecodingSettings(max_new_tokens=40, stop_ids=())
SAMPLED = DecodingSettings(max_new_tokens=20, stop_ids=(), top_k=0, top_p=0.9, temperature=0.8, seed=5)


@pytest.fixture(scope="module")
def decoder(exported_llama) -> StaticDecoder:
    return StaticDecoder(exported_llama)


def test_rows_end_at_stop_ids_each_at_its_own_place(decoder, sharp_llama):
    free = decoder.generate(prompts(), OPEN_END)
    stops = (free[0][4], free[1][11])
    ended = decoder.generate(prompts(), DecodingSettings(max_new_tokens=40, stop_ids=stops))
    for row, full in zip(ended, free, strict=True):
        end = next((place for place, token in enumerate(full) if token in stops), len(full))
        assert row == full[:end]
    assert len({len(row) for row in ended}) > 1
    model = dynamic_model(sharp_llama)
    assert ended == dynamic_text(model, prompts(), OPEN_END, stop_ids=stops)


def test_no_end_before_the_least_number_of_tokens(decoder):
    free = decoder.generate(prompts([7]), OPEN_END)[0]
    settings = DecodingSettings(max_new_tokens=40, min_new_tokens=9, stop_ids=(free[3],))
    row = decoder.generate(prompts([7]), settings)[0]
    assert row[:3] == free[:3] and len(row) >= 9 and free[3] not in row


@pytest.mark.parametrize("settings", [OPEN_END, SAMPLED])
def test_the_size_of_the_runs_changes_nothing(decoder, settings, monkeypatch):
    whole = decoder.generate(prompts(), settings)
    monkeypatch.setattr(module, "_TOKENS_PER_RUN", 7)
    assert decoder.generate(prompts(), settings) == whole


def test_tokens_are_shown_as_they_come(decoder):
    free = decoder.generate(prompts(), OPEN_END)
    settings = DecodingSettings(max_new_tokens=40, stop_ids=(free[0][4],))
    pieces: list = []
    answers = decoder.generate(prompts(), settings, on_tokens=pieces.append)
    assert [len(row) for row in pieces[0]] == [1] * len(answers)
    for row, answer in enumerate(answers):
        assert [token for piece in pieces for token in piece[row]] == answer
    assert answers == decoder.generate(prompts(), settings)


def test_sampling_depends_on_seed_and_sample_and_not_on_the_batch(decoder):
    rows = prompts()
    together = decoder.generate(rows, SAMPLED)
    assert decoder.generate(rows, SAMPLED) == together
    alone = [decoder.generate([row], SAMPLED, samples=[number])[0] for number, row in enumerate(rows)]
    assert alone == together
    assert decoder.generate(rows, DecodingSettings(**vars(SAMPLED) | {"seed": 6})) != together
    same_prompt = decoder.generate([rows[0], rows[0]], SAMPLED)
    assert same_prompt[0] != same_prompt[1]


def test_greedy_by_temperature_0(decoder):
    cold = DecodingSettings(max_new_tokens=40, stop_ids=(), top_k=50, temperature=0)
    assert decoder.generate(prompts(), cold) == decoder.generate(prompts(), OPEN_END)


def test_the_models_own_stop_ids_are_the_default(decoder):
    assert DecodingSettings().stop_ids is None and decoder.facts.stop_ids == (2,)
    assert all(2 not in row for row in decoder.generate(prompts(), DecodingSettings(max_new_tokens=40)))


def test_too_long_and_empty_prompts_are_refused(decoder):
    with pytest.raises(
        UserError, match=r"prompt 2 has 250 tokens, with max_new_tokens 40 .* the 256 positions"
    ):
        decoder.generate([[5], [7] * 250], OPEN_END)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        decoder.generate([[]], OPEN_END)
    assert decoder.generate([], OPEN_END) == []


def test_wrong_settings_are_all_named():
    with pytest.raises(UserError) as error:
        DecodingSettings(max_new_tokens=0, top_p=1.5, temperature=-1.0, repetition_penalty=0.0)
    names = {fault.split()[0] for fault in error.value.faults}
    assert names >= {"max_new_tokens", "top_p", "temperature", "repetition_penalty"}
    assert "top_p is 1.5 but must be above 0 and at most 1: change --top_p" in error.value.faults


def test_decoding_needs_no_paddlenlp(exported_llama):
    script = (
        "import sys; sys.modules['paddlenlp'] = None\n"
        "from finetune.serving.decoding.decoder import StaticDecoder\n"
        "from finetune.serving.decoding.settings import DecodingSettings\n"
        f"decoder = StaticDecoder({str(exported_llama)!r})\n"
        "print(decoder.generate([[5, 6, 7]], DecodingSettings(max_new_tokens=5, stop_ids=())))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    expected = StaticDecoder(exported_llama).generate(
        [[5, 6, 7]], DecodingSettings(max_new_tokens=5, stop_ids=())
    )
    assert result.stdout.splitlines()[-1] == str(expected)
