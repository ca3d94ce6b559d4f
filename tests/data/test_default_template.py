"""The model's own template where nobody names one: who gets it, and what is noted of it."""

from __future__ import annotations

import json

import pytest

from finetune.data.reading.formats import read_conversations
from finetune.data.samples.dataset import load_samples
from finetune.data.templates.default_template import DefaultTemplate
from finetune.data.templates.template import PlainTemplate, load_template
from finetune.data.templates.trained_template import (
    carry_template,
    record_default,
    template_source,
    trained_system,
    trained_template,
)
from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.fast_encoder import load_fast_encoder

JINJA = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
JSON = {"conversation": ["Q{{user}}", "A{{bot}}"], "query": "Q{{query}}"}
SHAPES = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "query": {"query": "q", "response": "a"},
    "alpaca": {"instruction": "q", "output": "a"},
    "lists": {"src": ["q"], "tgt": ["a"]},
}
PAIR = {"src": "q", "tgt": "a"}


def give_template(folder, form):
    if form == "json":
        (folder / "chat_template.json").write_text(json.dumps(JSON))
        return
    if form == "file":
        (folder / "chat_template.jinja").write_text(JINJA)
        return
    path = folder / "tokenizer_config.json"
    source = (
        JINJA
        if form == "string"
        else [{"name": "tool_use", "template": "x"}, {"name": "default", "template": JINJA}]
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": source}))


def read(tmp_path, record):
    (tmp_path / "train.json").write_text(json.dumps(record) + "\n")
    return read_conversations([tmp_path / "train.json"])


def text_of(template, conversation):
    return "".join(piece.text for piece in template.render(conversation))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["string", "list", "file"])
def test_conversations_get_the_models_own_template(llama_folder, tmp_path, form, shape):
    give_template(llama_folder, form)
    (conversation,) = read(tmp_path, SHAPES[shape])
    template = load_template(None, llama_folder)
    assert text_of(template, conversation) == "[user] q</s>[assistant] a</s>"
    assert text_of(load_template("none", llama_folder), conversation) == "qa"


def test_pairs_stay_plain_unless_the_folder_is_paddlenlps(llama_folder, tmp_path):
    (pair,) = read(tmp_path, PAIR)
    give_template(llama_folder, "string")
    assert text_of(load_template(None, llama_folder), pair) == "qa"
    assert text_of(load_template("tokenizer", llama_folder), pair) == "[user] q</s>[assistant] a</s>"
    give_template(llama_folder, "json")
    assert text_of(load_template(None, llama_folder), pair) == "QqAa"


def test_the_familys_own_form_serves_a_folder_without_a_template(tmp_path):
    folder = build_tiny("xverse", tmp_path / "model", vocab_size=330, num_layers=1, hidden_size=32)
    (conversation,), (pair,) = (read(tmp_path, record) for record in (SHAPES["messages"], PAIR))
    assert text_of(load_template(None, folder), conversation) == "Human: q\n\nAssistant: a"
    assert text_of(load_template(None, folder), pair) == "qa"
    run = tmp_path / "run"
    run.mkdir()
    for uses_own, name in ((True, "xverse"), (False, "none")):
        record_default(run, folder, uses_own=uses_own)
        assert trained_template(run) == name
    give_template(folder, "string")
    record_default(run, folder, uses_own=True)
    assert trained_template(run) == "tokenizer"
    assert text_of(load_template(None, folder), conversation).startswith("[user] q")


def test_functions_on_offer_choose_the_template_for_them(llama_folder, tmp_path):
    path = llama_folder / "tokenizer_config.json"
    named = [
        {"name": "default", "template": JINJA},
        {"name": "tool_use", "template": "{{ tools | length }}" + JINJA},
    ]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    (plain,) = read(tmp_path, SHAPES["messages"])
    (offering,) = read(tmp_path, {**SHAPES["messages"], "tools": [{"name": "f"}]})
    for name in (None, "tokenizer"):
        template = load_template(name, llama_folder)
        assert text_of(template, plain) == "[user] q</s>[assistant] a</s>"
        assert text_of(template, offering) == "1[user] q</s>[assistant] a</s>"


def test_without_a_template_everything_is_plain(llama_folder):
    assert isinstance(load_template(None, llama_folder), PlainTemplate)
    assert isinstance(load_template(None), PlainTemplate)


def test_a_folder_is_a_template(llama_folder, tmp_path):
    give_template(llama_folder, "file")
    (conversation,) = read(tmp_path, SHAPES["query"])
    assert text_of(load_template(str(llama_folder)), conversation) == "[user] q</s>[assistant] a</s>"
    with pytest.raises(UserError, match=f"chat_template is the folder {tmp_path}, which has none"):
        load_template(str(tmp_path))


def test_a_faulty_template_hinders_only_those_who_need_it(llama_folder, tmp_path):
    (llama_folder / "chat_template.jinja").write_text("{% if %}")
    template = load_template(None, llama_folder)
    (pair,) = read(tmp_path, PAIR)
    assert text_of(template, pair) == "qa"
    (conversation,) = read(tmp_path, SHAPES["query"])
    with pytest.raises(UserError, match=r"(?s)no valid jinja.*set chat_template to none"):
        template.render(conversation)


def test_the_report_says_it_in_one_line(llama_folder, tmp_path):
    give_template(llama_folder, "string")
    encoder, _ = load_fast_encoder(llama_folder, get_family("llama"))
    (tmp_path / "train.json").write_text(
        "\n".join(json.dumps({"query": query, "response": "a"}) for query in ("q", "</s>[INST]"))
    )
    template = load_template(None, llama_folder)
    assert isinstance(template, DefaultTemplate)
    samples, report = load_samples([tmp_path / "train.json"], encoder, template, src_length=50, max_length=80)
    assert (report.num_in_own_template, report.num_naming_special) == (2, 1)
    said = report.describe()
    assert "the model's own chat template (chat_template none for plain text): 2 examples" in said
    assert "names of special tokens in the texts (see split_special_tokens): 1 example" in said
    assert [index for index in samples[0].labels if index >= 0][-1] == encoder.eos_token_id


def test_what_was_trained_is_found_and_carried(llama_folder, tmp_path):
    run, merged, exported = (tmp_path / name for name in ("run", "merged", "exported"))
    for folder in (run, merged, exported):
        folder.mkdir()
    settings = {"chat_template": None, "system": "Be brief.", "model_name_or_path": str(llama_folder)}
    (run / "arguments.json").write_text(json.dumps(settings))
    assert trained_template(run) == "none", "runs of earlier versions trained plain text"
    record_default(run, llama_folder, uses_own=True)
    checkpoint = run / "checkpoint-3"
    checkpoint.mkdir()
    for folder in (run, checkpoint):
        assert (trained_template(folder), trained_system(folder)) == ("tokenizer", "Be brief.")
    carry_template([run], merged)
    carry_template([merged], exported)
    assert (trained_template(exported), trained_system(exported)) == ("tokenizer", "Be brief.")


def test_the_system_text_goes_into_the_template_for_transformers(llama_folder, tmp_path):
    from finetune.data.templates.jinja_environment import make_environment

    (tmp_path / "own.jinja").write_text(JINJA)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": JINJA}))
    for name in ("chatml", str(tmp_path / "own.jinja"), "tokenizer"):
        (tmp_path / "arguments.json").write_text(json.dumps({"chat_template": name, "system": 'Say "x".'}))
        source = template_source(tmp_path, get_family("qwen2").tokenizer)
        write = make_environment().from_string(source)
        asked = [{"role": "user", "content": "q"}]
        own = [{"role": "system", "content": "Own."}, *asked]
        assert 'Say "x".' in write.render(messages=asked, eos_token="</s>")
        assert 'Say "x".' not in write.render(messages=own, eos_token="</s>")


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("internlm", ["<eoa>"]),
        ("internlm2", ["<|im_start|>", "<|im_end|>"]),
        ("baichuan", ["<reserved_102>", "<reserved_103>"]),
        ("baichuan2", ["<reserved_106>", "<reserved_107>"]),
    ],
)
def test_names_in_a_vocabulary_are_written_by_the_familys_form_alone(name, tokens, tmp_path):
    """A sample that spells the names of these tokens gets no more of them."""
    folder = build_tiny(name, tmp_path / "model", vocab_size=400, num_layers=1, hidden_size=32)
    encoder, reason = load_fast_encoder(folder, get_family(name))
    assert encoder is not None, reason
    counts = []
    for question in ("q", f"q {' '.join(tokens)}"):
        record = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]}
        read(tmp_path, record)
        (sample,), report = load_samples(
            [tmp_path / "train.json"], encoder, load_template(None, folder), src_length=90, max_length=120
        )
        assert report.num_in_own_template == 1
        row = [*sample.input_ids, sample.labels[-1]]
        ids = [encoder.encode_special(token) for token in tokens]
        assert all(len(found) == 1 for found in ids)
        counts.append([row.count(found[0]) for found in ids])
    assert counts[0] == counts[1] and all(counts[0])
