"""InTokens packing through the entry script: the same samples, fewer rows, the same loss."""

from __future__ import annotations

import json

import pytest

from tests.conftest import read_log, run_entry


@pytest.fixture
def train(write_run):
    """Runs a training with some settings and gives its output folder."""

    def run(name: str, **settings):
        arguments, out = write_run(name, **{"max_length": 256, "do_eval": True} | settings)
        assert run_entry(arguments) == 0
        return out

    return run


def results(out):
    return json.loads((out / "all_results.json").read_text())


@pytest.mark.parametrize("name", ["intokens", "zero_padding"])
def test_packed_evaluation_equals_the_unpacked_one(train, name):
    packed = results(train("packed", do_train=False, **{name: True}))
    plain = results(train("plain", do_train=False))
    for metric in ("eval_loss", "eval_perplexity", "eval_accuracy"):
        assert packed[metric] == pytest.approx(plain[metric], rel=1e-6)


@pytest.mark.parametrize("neftune", [False, True])
def test_an_epoch_in_one_packed_batch_has_the_loss_of_the_unpacked_epoch(train, neftune):
    # One optimizer step over the whole set: the order no longer matters, only loss and gradients do.
    settings = {"max_steps": 1, "per_device_train_batch_size": 40, "neftune": neftune}
    packed = read_log(train("packed", intokens=True, **settings))[0]
    plain = read_log(train("plain", **settings))[0]
    assert packed["num_tokens"] == plain["num_tokens"]
    assert packed["num_label_tokens"] == plain["num_label_tokens"]
    assert packed["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert packed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_packing_trains_in_fewer_steps_and_learns(train):
    out = train("packed", intokens=True, max_steps=-1, num_train_epochs=3, per_device_train_batch_size=2)
    records = read_log(out)
    plain_rows = 40
    assert len(records) < 3 * plain_rows / 2 * 0.8
    assert records[-1]["loss"] < records[0]["loss"] - 0.1
