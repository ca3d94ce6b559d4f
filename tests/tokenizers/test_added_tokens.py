"""Tokens beside the vocabulary: which file counts, and where a name in a text is met."""

from __future__ import annotations

import json

import pytest

from finetune.families.family import get_family
from finetune.tokenizers.added_tokens import AddedToken, read_folder_tokens
from finetune.tokenizers.encoder import FamilyEncoder, end_ids, load_encoder
from finetune.tokenizers.fast_encoder import load_fast_encoder
from finetune.tokenizers.loading import load_tokenizer
from finetune.tokenizers.token_splitter import TokenSplitter

FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def edit(path, **fields):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **fields}))


def split(splitter, text):
    return [part.token if part.token >= 0 else part.text for part in splitter.split(text)]


@pytest.mark.parametrize(
    ("flags", "text", "expected"),
    [
        ({}, "a <t> b", ["a ", 7, " b"]),
        ({}, "<t><t>", [7, 7]),
        ({}, "", []),
        ({"lstrip": True}, "a \u3000<t> b", ["a", 7, " b"]),
        ({"rstrip": True}, "a <t> \n<t> b", ["a ", 7, 7, "b"]),
        ({"lstrip": True, "rstrip": True}, " <t>\x1c ", [7, "\x1c "]),
        ({"single_word": True}, "a<t> <t>_ <t>, <t>b", ["a<t> <t>_ ", 7, ", <t>b"]),
        ({"single_word": True}, "<t>\u0301 <t>\u200d <t>\u24b6", ["<t>\u0301 <t>\u200d <t>\u24b6"]),
        ({"single_word": True}, "\u2460<t>\u00b2", ["\u2460", 7, "\u00b2"]),
        ({"behind": "]"}, "<t>]<t>", ["<t>]", 7]),
        ({"behind": None}, "<t>", ["<t>"]),
    ],
)
def test_where_a_name_is_met(flags, text, expected):
    assert split(TokenSplitter([AddedToken("<t>", **flags)], {"<t>": 7}), text) == expected


def test_a_name_in_the_blanks_of_the_token_before_it_counts_too():
    tokens = [AddedToken("<t>", rstrip=True), AddedToken("\n")]
    assert split(TokenSplitter(tokens, {"<t>": 7, "\n": 8}), "<t> \nx") == [7, 8, "x"]


def test_the_longest_name_counts():
    tokens = [AddedToken("<t>"), AddedToken("<t>x"), AddedToken("<")]
    splitter = TokenSplitter(tokens, {"<t>": 7, "<t>x": 8, "<": 9})
    assert split(splitter, "<t>xy<t>z<") == [8, "y", 7, "z", 9]


def test_normalised_names_need_the_blank_that_normalising_puts_in_front():
    splitter = TokenSplitter([AddedToken("<t>", normalized=True)], {"<t>": 7}, prefixed=True)
    assert list(splitter.split("a<t>")) == [("a<t>", -1, False)]
    assert split(splitter, "<t> a <t>b") == [7, " a", 7, "b"]
    assert [part.inner for part in splitter.split("a <t>")] == [True, False]


def test_a_decoder_of_added_tokens_counts_alone(tmp_path):
    write(
        tmp_path,
        "tokenizer_config.json",
        {"eos_token": "<a>", "added_tokens_decoder": {"9": {"content": "<a>", **FLAGS, "special": False}}},
    )
    write(tmp_path, "special_tokens_map.json", {"eos_token": "<b>"})
    write(tmp_path, "added_tokens.json", {"<c>": 12})
    found = read_folder_tokens(tmp_path)
    assert (found.roles, found.ids) == ({"eos_token": "<a>"}, {"<a>": 9})
    assert found.tokens["<a>"].special, "a token with a role is special"


def test_without_one_the_other_files_count(tmp_path):
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<a>", "pad_token": "<p>"})
    write(
        tmp_path,
        "special_tokens_map.json",
        {
            "eos_token": {"content": "<b>", **FLAGS, "rstrip": True},
            "additional_special_tokens": ["<d>", "<d>"],
        },
    )
    write(tmp_path, "added_tokens.json", {"<c>": 12, "<d>": 13})
    found = read_folder_tokens(tmp_path, {"eos_token": "</s>", "unk_token": "<unk>"})
    assert found.roles == {"eos_token": "<b>", "pad_token": "<p>", "unk_token": "<unk>"}
    assert [name for name, token in found.tokens.items() if not token.special] == ["<c>"]
    assert found.tokens["<c>"].normalized and found.tokens["<b>"].rstrip
    known = {"<b>": 2, "<unk>": 0}
    assert found.number(known.get, 10) == {"<c>": 12, "<d>": 13, "<b>": 2, "<unk>": 0, "<p>": 14}


def test_empty_names_and_nulls_name_nothing(tmp_path):
    write(tmp_path, "tokenizer_config.json", {"bos_token": "", "eos_token": "", "pad_token": None})
    assert read_folder_tokens(tmp_path, {"eos_token": "</s>"}).roles == {"eos_token": "</s>"}


def test_lists_of_transformers_5(tmp_path):
    write(tmp_path, "tokenizer_config.json", {"extra_special_tokens": ["<x>"]})
    assert read_folder_tokens(tmp_path).tokens["<x>"].special
    write(tmp_path, "tokenizer_config.json", {"extra_special_tokens": {"image_token": "<y>"}})
    assert list(read_folder_tokens(tmp_path).tokens) == ["<y>"]


@pytest.fixture
def thinking(llama_folder):
    """A folder whose tokenizer has an ordinary token, a special one and another end than its vocabulary's."""
    size = json.loads((llama_folder / "config.json").read_text())["vocab_size"]
    names = {"<think>": False, "</think>": False, "[INST]": True, "<|im_end|>": True}
    decoder = {
        str(size + place): {"content": name, **FLAGS, "special": special}
        for place, (name, special) in enumerate(names.items())
    }
    edit(llama_folder / "tokenizer_config.json", eos_token="<|im_end|>", added_tokens_decoder=decoder)
    return llama_folder, {name: size + place for place, name in enumerate(names)}


@pytest.mark.parametrize("fast", [True, False])
def test_tokens_in_data_and_in_templates(thinking, fast):
    folder, ids = thinking
    family = get_family("llama")
    made = load_fast_encoder(folder, family)[0] if fast else None
    encoder = FamilyEncoder(load_tokenizer(folder, family), family, made)
    think, end = ids["<think>"], ids["</think>"]
    text = "a<think>red dress</think>上衣"
    assert [index for index in encoder.encode(text) if index in (think, end)] == [think, end]
    assert encoder.decode(encoder.encode(text)) == text
    assert list(encoder.encode_many([text, "x"])[0]) == encoder.encode(text)
    assert not {ids["[INST]"], ids["<|im_end|>"]} & set(encoder.encode("[INST] x<|im_end|>"))
    assert encoder.encode_special("[INST]<|im_end|>") == [ids["[INST]"], ids["<|im_end|>"]]
    assert encoder.eos_token_id == ids["<|im_end|>"]
    assert encoder.names_special("x [INST]") and not encoder.names_special("x <think>")


@pytest.mark.parametrize("fast", [True, False])
def test_special_tokens_in_data_become_ids_on_request(thinking, fast):
    folder, ids = thinking
    family = get_family("llama")
    made = load_fast_encoder(folder, family, splits_special=False)[0] if fast else None
    encoder = FamilyEncoder(load_tokenizer(folder, family), family, made, splits_special=False)
    assert encoder.encode("[INST]<|im_end|>") == [ids["[INST]"], ids["<|im_end|>"]]


def test_generation_ends_where_the_files_say(thinking):
    folder, ids = thinking
    write(folder, "generation_config.json", {"eos_token_id": [2, ids["<|im_end|>"], 5]})
    encoder = load_encoder(folder, get_family("llama"))
    assert (encoder.eos_token_id, encoder.chat_end_ids) == (ids["<|im_end|>"], (2, 5))
    write(folder, "generation_config.json", {"eos_token_id": 4})
    assert end_ids([folder, folder]) == (4,)
    write(folder, "generation_config.json", {"eos_token_id": None})
    assert end_ids([folder]) == ()


@pytest.mark.parametrize(("stated", "expected"), [([7, 3], (7, 3)), (7, ()), (None, ())])
def test_without_generation_settings_the_ends_are_those_that_the_configuration_lists(
    tmp_path, stated, expected
):
    write(tmp_path, "config.json", {"eos_token_id": stated})
    assert end_ids([tmp_path]) == expected
    write(tmp_path, "generation_config.json", {"eos_token_id": 5})
    assert end_ids([tmp_path]) == (5,)


@pytest.mark.parametrize("value", ["</s>", [1, "2"], True])
def test_ends_that_are_no_numbers_are_refused(tmp_path, value):
    from finetune.errors import UserError

    write(tmp_path, "generation_config.json", {"eos_token_id": value})
    with pytest.raises(UserError, match="eos_token_id must be a number or a list of numbers"):
        end_ids([tmp_path])
