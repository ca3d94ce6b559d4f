"""`train_on` "each": every answer in a sample of its own, behind what a model is given when it is asked for it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from finetune.data.reading.conversation import make_conversation
from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.samples.dataset import load_samples
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.data.templates.jinja_templates import JinjaTemplate
from finetune.data.templates.template import load_template
from finetune.errors import UserError
from tests.conftest import run_entry
from tests.data.test_bulk_encoding import BulkCharacterEncoder

# As Qwen3's: the thoughts of earlier answers are left out, the last answer gets a place for them.
PARTS_THOUGHTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
THREE_ROUNDS = make_conversation([("q1", "a1"), ("q2", ""), ("q3", "a3")])
LENGTHS = {"src_length": 500, "max_length": 1000}


def texts(samples, encoder):
    """The text of each sample, what is learned in braces."""
    shown = []
    for sample in samples:
        ids = [*sample.input_ids, sample.labels[-1]]
        learned = [False, *(sample.labels != IGNORE_INDEX)]
        marked = (
            ("{%s}" if each else "%s") % encoder.decode([i]) for i, each in zip(ids, learned, strict=True)
        )
        shown.append("".join(marked).replace("}{", ""))
    return shown


@pytest.fixture
def encoder():
    return BulkCharacterEncoder(prefix_ids=())


def test_every_answer_stands_behind_what_it_is_asked_with(encoder):
    template = JinjaTemplate(PARTS_THOUGHTS, "t", {})
    samples, report = load_samples([THREE_ROUNDS], encoder, template, train_on="each", **LENGTHS)
    first, last = (text.rsplit("{", 1) for text in texts(samples, encoder))
    assert first[0] == "user:q1\nassistant:" and first[1].startswith("<think></think>a1\n")
    assert last[0] == "user:q1\nassistant:a1\nuser:q2\nassistant:\nuser:q3\nassistant:"
    assert last[1].startswith("<think></think>a3\n")
    for sample, rounds in zip(samples, (1, 3), strict=True):
        asked = make_conversation([("q1", "a1"), ("q2", ""), ("q3", "a3")][:rounds])
        prompt = "".join(piece.text for piece in template.render_prompt(asked))
        assert encoder.decode(sample.input_ids).startswith(prompt)
    assert report.num_lines == 1 and report.num_samples == 2
    assert any("each answer is a sample" in rule for rule in report.notes.rules)


def test_without_rewriting_the_answers_are_those_of_one_sample(encoder):
    template = load_template("vicuna")
    conversation = make_conversation([("q1", "a1"), ("q2", "a2")])
    apart, _ = load_samples([conversation], encoder, template, train_on="each", **LENGTHS)
    (whole,), _ = load_samples([conversation], encoder, template, **LENGTHS)
    assert len(apart) == 2
    learned = np.concatenate([sample.labels[sample.labels != IGNORE_INDEX] for sample in apart])
    assert learned.tolist() == whole.labels[whole.labels != IGNORE_INDEX].tolist()
    assert np.array_equal(apart[1].input_ids, whole.input_ids)


def test_answers_that_are_too_long_are_counted_or_stop_the_run(encoder):
    template = JinjaTemplate(PARTS_THOUGHTS, "t", {})
    limits = {"src_length": 500, "max_length": 60, "train_on": "each"}
    samples, report = load_samples([THREE_ROUNDS], encoder, template, truncation="drop", **limits)
    assert len(samples) == 1 and any("too long" in rule for rule in report.notes.rules)
    with pytest.raises(UserError, match="60"):
        load_samples([THREE_ROUNDS], encoder, template, truncation="error", **limits)


def test_many_at_once_are_those_of_one_at_a_time(encoder):
    template = JinjaTemplate(PARTS_THOUGHTS, "t", {})
    conversations = [make_conversation([(f"q{i}{j}", f"a{i}{j}") for j in range(i)]) for i in range(1, 5)]
    made = []
    builder = BulkBuilder(encoder, template, train_on="each", **LENGTHS)
    store = builder.build(
        conversations, lambda *_: made.append(None), lambda _, count, __: made.append(count)
    )
    assert made == [1, 2, 3, 4] and len(store) == 10
    single = [builder.build([each], lambda *_: None) for each in conversations]
    assert texts(store, encoder) == [text for each in single for text in texts(each, encoder)]


def test_conversations_that_are_written_anew_are_divided_unasked(encoder):
    template = JinjaTemplate(PARTS_THOUGHTS, "t", {})
    one = make_conversation([("q", "a")])
    asked, _ = load_samples([THREE_ROUNDS, one], encoder, template, train_on="each", **LENGTHS)
    samples, report = load_samples([THREE_ROUNDS, one], encoder, template, **LENGTHS)
    assert texts(samples, encoder) == texts(asked, encoder) and len(samples) == 3
    assert report.notes.rules["conversations divided so that each answer is a sample of its own"] == 1


@pytest.mark.parametrize("lazy", [False, True])
def test_a_run_divides_conversations(lazy, tiny_llama, tmp_path):
    lines = [
        {
            "messages": [
                {"role": role, "content": f"{role} {i}"} for i in (1, 2) for role in ("user", "assistant")
            ]
        }
    ]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines * 8)))
    (tmp_path / "template.jinja").write_text(PARTS_THOUGHTS)
    settings = {
        "model_name_or_path": str(tiny_llama), "dataset_name_or_path": str(tmp_path), "device": "cpu",
        "output_dir": str(tmp_path / "out"), "do_train": True, "max_steps": 1, "save_strategy": "no", "lazy": lazy,
        "max_length": 200, "src_length": 100, "chat_template": str(tmp_path / "template.jinja"), "per_device_train_batch_size": 4,
    }  # fmt: skip
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps(settings))
    assert run_entry(path) == 0
