"""What an export to GGUF refuses, the Modelfile, and tokenizers, all without the format's library."""

from __future__ import annotations

import json

import pytest

from finetune.data.templates.chat_templates import CHAT_FORMATS
from finetune.errors import UserError
from finetune.families.family import families, get_family
from finetune.families.text_patterns import BLOOM_PATTERN, LLAMA3_PATTERN
from finetune.models.tiny.sentencepiece_training import train_sentencepiece
from finetune.serving.gguf.modelfile import fits_quotes, go_template, write_modelfile
from finetune.serving.gguf.run import export_gguf
from finetune.serving.gguf.templates import choose_template, describe_model
from finetune.serving.gguf.vocabulary import Vocabulary, read_vocabulary
from tests.conftest import ROOT
from tests.families.cases import FACTS

LLAMA = get_family("llama")
EXPORTED = ("bloom", "llama", "mistral", "qwen2", "qwen3")


def test_the_families():
    assert sorted(name for name, family in families().items() if family.gguf) == list(EXPORTED)


@pytest.mark.parametrize("name", ["gemma", "opt", "gpt2", "phi3"])
def test_another_family_is_refused_before_weights_are_looked_for(name, tmp_path):
    from finetune.models.tiny.checkpoint import build_tiny

    assert name in FACTS
    folder = build_tiny(name, tmp_path / name, vocab_size=330)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=rf"family {name}, which is not exported to GGUF; allowed: bloom, llama"
    ):
        export_gguf(str(folder), tmp_path / "out", "f16")


LEFT_OUT = object()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm True"),
        ("llama", {"max_position_embeddings": LEFT_OUT}, "lacks max_position_embeddings"),
        ("llama", {"max_position_embeddings": None}, "max_position_embeddings (is )?(None|null)"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}, "reward model"),
    ],
)  # fmt: skip
def test_settings_that_llama_cpp_does_not_compute(name, fields, message, tmp_path):
    from finetune.models.tiny.checkpoint import build_tiny

    folder = build_tiny(name, tmp_path / "model", vocab_size=330)
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {field: value for field, value in config.items() if value is not LEFT_OUT}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        export_gguf(str(folder), tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()


# Tokenizers


def tokenizer_json(folder, **changes):
    """A byte-level tokenizer of three pieces."""
    cut = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    steps = [cut, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "ignore_merges": True}
    content = {
        "model": model,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "added_tokens": [
            {"id": 4, "content": "<s>", "special": True},
            {"id": 3, "content": "</s>", "special": True},
        ],
    }
    for path, value in changes.items():
        *outer, last = path.split("__")
        place = content
        for key in outer:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def test_byte_level_merges(tmp_path):
    found = read_vocabulary(tokenizer_json(tmp_path), LLAMA.tokenizer, 7)
    assert found.tokens == ["a", "b", "ab", "</s>", "<s>", "[PAD5]", "[PAD6]"]
    assert found.types == [1, 1, 1, 3, 3, 5, 5]
    assert (found.model, found.pre, found.merges) == ("gpt2", "llama-bpe", ["a b"])
    assert found.roles == {"bos": 4, "eos": 3, "pad": 3}
    assert found.adds_bos and not found.has_prefix


@pytest.mark.parametrize(
    ("changes", "pre"),
    [
        ({"model__ignore_merges": False}, "smaug-bpe"),
        ({"pre_tokenizer__pretokenizers__0__pattern": {"Regex": BLOOM_PATTERN}, "model__ignore_merges": False},
         "bloom"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}, "model__ignore_merges": False}, "gpt-2"),
        ({"model__merges": [["a", "b"]]}, "llama-bpe"),
        ({"normalizer": {"type": "NFC"}}, "llama-bpe"),
    ],
    ids=str,
)  # fmt: skip
def test_the_names_of_patterns(changes, pre, tmp_path):
    found = read_vocabulary(tokenizer_json(tmp_path, **changes), LLAMA.tokenizer, 5)
    assert (found.pre, found.merges) == (pre, ["a b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pre_tokenizer__pretokenizers__0__pattern": {"Regex": "x+"}},
            r"the pattern 'x\+' with ignore_merges",
        ),
        (
            {"pre_tokenizer__pretokenizers__0__behavior": "Removed"},
            r"pre_tokenizer steps \['Split', 'ByteLevel'\]",
        ),
        ({"pre_tokenizer__pretokenizers__1__add_prefix_space": True}, "without add_prefix_space"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer 'Metaspace'"),
        ({"normalizer": {"type": "NFKC"}}, "normalizer 'NFKC'"),
        ({"model__type": "Unigram"}, "model type 'Unigram'"),
        ({"model__byte_fallback": True}, "byte_fallback True"),
        ({"added_tokens": [{"id": 1, "content": "</s>", "special": True}]}, "id 1 to 'b' and to '</s>'"),
    ],
    ids=str,
)
def test_tokenizers_that_llama_cpp_has_not(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_vocabulary(tokenizer_json(tmp_path, **changes), LLAMA.tokenizer, 9)


def test_roles_that_the_class_has_where_the_files_name_the_token_alone(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    settings = {"added_tokens_decoder": {"3": {"content": "<|endoftext|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"})
    )
    found = read_vocabulary(tmp_path, get_family("qwen2").tokenizer, 4)
    assert found.roles["eos"] == 3 and found.tokens == ["a", "b", "ab", "<|endoftext|>"]
    assert (found.pre, found.merges, found.adds_bos) == ("qwen2", ["a b"], False)


def test_more_tokens_than_rows_and_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="has 5 tokens, but the embedding 4 rows"):
        read_vocabulary(tokenizer_json(tmp_path), LLAMA.tokenizer, 4)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer that GGUF can have"):
        read_vocabulary(tmp_path, LLAMA.tokenizer, 4)
    (tmp_path / "tokenizer.model").write_text("YQ== 0\n")
    with pytest.raises(UserError, match="is no SentencePiece file"):
        read_vocabulary(tmp_path, LLAMA.tokenizer, 4)


def test_added_tokens_behind_pieces(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(
        train_sentencepiece(ROOT / "data" / "dev.json", vocab_size=300)
    )
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<mark>": 300, "<|im_end|>": 302}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": ["<|im_end|>"]})
    )
    found = read_vocabulary(tmp_path, LLAMA.tokenizer, 304)
    assert found.tokens[300:] == ["<mark>", "[PAD301]", "<|im_end|>", "[PAD303]"]
    assert found.types[300:] == [4, 5, 3, 5] and found.scores[300:] == [-1000.0, -10000.0, -1000.0, -10000.0]
    assert found.roles["eos"] == 2 and found.adds_bos and found.has_prefix


def test_sentencepiece_models_that_llama_cpp_spells_otherwise(tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(train_sentencepiece(ROOT / "data" / "dev.json", vocab_size=300))
    model.trainer_spec.model_type = 1
    model.normalizer_spec.precompiled_charsmap = b"x"
    model.normalizer_spec.name = "nmt_nfkc"
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(UserError) as caught:
        read_vocabulary(tmp_path, LLAMA.tokenizer, 300)
    assert "model type UNIGRAM" in str(caught.value) and "normaliser nmt_nfkc" in str(caught.value)


# The Modelfile


def test_a_template_of_chatml():
    assert go_template(CHAT_FORMATS["chatml"], bos="", eos="</s>") == (
        "{{ if $.System }}<|im_start|>system\n{{ $.System }}<|im_end|>\n{{ end }}"
        "{{ $begun := false }}{{ range $i, $_ := .Messages }}"
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n{{ $begun = true }}'
        '{{ else if eq .Role "tool" }}<|im_start|>tool\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
        "{{ $begun = true }}"
        '{{ else if eq .Role "assistant" }}{{ .Content }}'
        "{{ if gt (len (slice $.Messages $i)) 1 }}<|im_end|>\n{{ end }}{{ end }}{{ end }}"
    )


def test_the_first_token_is_left_to_ollama():
    llama2 = go_template(CHAT_FORMATS["llama2"], bos="<s>", eos="</s>")
    assert (
        llama2.startswith("{{ $begun := false }}") and llama2.count("{{ if $begun }}<s>{{ end }}[INST] ") == 2
    )
    assert "{{ if not $begun }}{{ if $.System }}<<SYS>>\n{{ $.System }}\n<</SYS>>" in llama2
    assert "{{ .Content }} {{ if gt (len (slice $.Messages $i)) 1 }}</s>{{ end }}" in llama2
    gemma = go_template(CHAT_FORMATS["gemma"], bos="<bos>", eos="<eos>")
    assert "<bos>" not in gemma
    assert go_template(CHAT_FORMATS["gemma"], bos="<s>", eos="<eos>").startswith("<bos>")


@pytest.mark.parametrize("name", sorted(CHAT_FORMATS))
def test_every_format_has_one_unless_it_counts(name):
    template = go_template(CHAT_FORMATS[name], bos="<s>", eos="</s>")
    assert (template is None) == ("{round}" in CHAT_FORMATS[name].user)
    if template:
        opened = sum(template.count("{{ " + word) for word in ("if ", "range "))
        assert opened == template.count("{{ end }}") and fits_quotes(template)


def test_what_stands_in_a_modelfile():
    text = write_modelfile(
        "a.gguf", template=None, notes=["why"], system="Sei kurz.", stops=["</s>", "</s>", "结束"]
    )
    assert text == (
        'FROM ./a.gguf\n# why\nSYSTEM """Sei kurz."""\nPARAMETER stop "</s>"\nPARAMETER stop "结束"\n'
    )
    assert not fits_quotes('a """ b') and not fits_quotes('a "b"') and fits_quotes('"a" b')


def test_jinja_of_others_is_left_in_the_file(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    chosen = choose_template(tmp_path, LLAMA)
    assert (chosen.jinja, chosen.chat) == ("{{ messages[0]['content'] }}", None)
    vocabulary = Vocabulary("llama", ["<unk>", "<s>", "</s>"], [2, 3, 3], roles={"bos": 1, "eos": 2})
    text = describe_model("model.gguf", chosen, vocabulary, LLAMA)
    assert 'TEMPLATE "' not in text and "# The chat template is jinja text" in text
    assert text.endswith('PARAMETER stop "</s>"\n')


def test_plain_text_is_passed_on(tmp_path):
    (tmp_path / "trained_template.json").write_text(json.dumps({"chat_template": "none"}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    chosen = choose_template(tmp_path, LLAMA)
    vocabulary = Vocabulary("llama", ["<unk>", "<s>", "</s>"], [2, 3, 3], roles={"bos": 1, "eos": 2})
    assert chosen.jinja is None
    assert 'TEMPLATE """{{ .Prompt }}"""' in describe_model("model.gguf", chosen, vocabulary, LLAMA)
