import base64
import json
import os
import shutil

import pytest

from finetune.errors import UserError
from finetune.families.family import families, get_family
from finetune.families.special_tokens import token_id
from finetune.families.tiny_recipe import ByteLevelKind
from finetune.merge.hf_out import write_tokenizer_files
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.encoder import FamilyEncoder
from finetune.tokenizers.loading import load_tokenizer
from finetune.tokenizers.saving import save_tokenizer

TEXTS = [
    "类型#上衣*版型#显瘦",
    "The red dress, 12 pieces.",
    "emoji 😀👍🏽 and rare 饕餮",
    "two\nlines\n\nand\ttabs\r\n",
    "  blanks  around  ",
    " ",
    "",
]


@pytest.fixture(scope="module")
def encoder(case, tiny_folder):
    return FamilyEncoder(load_tokenizer(tiny_folder), get_family(case.name))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_unchanged(encoder, text):
    assert encoder.decode(encoder.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_ids_are_those_of_paddlenlp(encoder, text):
    expected = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoder.encode(text) == list(expected)


def test_frame_of_a_prompt(case, encoder):
    tokens = [encoder.tokenizer.convert_ids_to_tokens(index) for index in encoder.prefix_ids]
    assert tuple(tokens) == case.prefix
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.eos_token_id) == case.end_of_answer
    assert 0 <= encoder.pad_token_id < len(encoder.tokenizer)


def test_special_text_in_the_data_is_only_text(case, encoder):
    text = f"a {case.end_of_answer} b{''.join(case.prefix)}"
    ids = encoder.encode(text)
    assert not {encoder.eos_token_id, *encoder.prefix_ids} & set(ids)
    assert encoder.decode(ids) == text


def test_decoding_leaves_the_frame_out(encoder):
    ids = [*encoder.prefix_ids, *encoder.encode("上衣"), encoder.eos_token_id, encoder.pad_token_id]
    assert encoder.decode(ids) == "上衣"
    assert encoder.decode(encoder.prefix_ids) == ""


def test_missing_token_is_an_error():
    with pytest.raises(UserError, match=r"the tokenizer has no token 'pad'"):
        token_id(type("Empty", (), {"pad_token_id": None})(), "pad")


def test_hugging_face_file_name_is_read(llama_folder):
    expected = load_tokenizer(llama_folder)("上衣 red")["input_ids"]
    (llama_folder / "sentencepiece.bpe.model").unlink()
    tokenizer = load_tokenizer(llama_folder)
    assert tokenizer("上衣 red")["input_ids"] == expected
    assert tokenizer.pad_token == "</s>"


PIECE_FAMILIES = sorted(
    name
    for name, family in families().items()
    if "tokenizer.model" in family.tokenizer.vocab_files
    and not isinstance(family.tiny.tokenizer, ByteLevelKind)  # PolyLM's, whose tiny one is GPT-2's
)


@pytest.mark.parametrize("name", PIECE_FAMILIES)
def test_published_name_of_the_vocabulary_is_enough(name, corpus, tmp_path):
    """Also of what a run saves beside its weights, and of a merge in Hugging Face's form."""
    family = get_family(name)
    folder = build_tiny(name, tmp_path / "model", corpus=corpus, vocab_size=340, num_layers=1)
    expected = load_tokenizer(folder, family)("上衣 red")["input_ids"]
    saved, theirs = tmp_path / "saved", tmp_path / "theirs"
    for each in (saved, theirs):
        each.mkdir()
    others = [
        file
        for file in family.tokenizer.vocab_files
        if file != "tokenizer.model" and (folder / file).is_file()
    ]
    for file in others:
        (folder / file).unlink()
    tokenizer = load_tokenizer(folder, family)
    save_tokenizer(tokenizer, saved)
    for path in saved.iterdir():
        shutil.copyfile(path, theirs / path.name)
    write_tokenizer_files(theirs, family)
    assert (theirs / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert not any((theirs / file).exists() for file in others)
    for each in (tokenizer, load_tokenizer(saved, family), load_tokenizer(theirs, family)):
        assert each("上衣 red")["input_ids"] == expected


def test_folder_without_tokenizer_config(llama_folder):
    (llama_folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(llama_folder).eos_token_id == 2


def test_a_padding_token_of_the_folder_is_kept(llama_folder):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = llama_folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<unk>"}))
    tokenizer = load_tokenizer(llama_folder)
    assert FamilyEncoder(tokenizer, get_family("llama")).pad_token_id == 0


def test_folder_without_vocabulary(llama_folder):
    for name in ("sentencepiece.bpe.model", "tokenizer.model"):
        (llama_folder / name).unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer: put one of sentencepiece.bpe.model"):
        load_tokenizer(llama_folder)


@pytest.mark.parametrize("name", ["bloom", "qwen2", "llama"])
def test_damaged_tokenizer_json_alone(llama_folder, name):
    for file in ("sentencepiece.bpe.model", "tokenizer.model"):
        (llama_folder / file).unlink()
    (llama_folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be read|copy it again"):
        load_tokenizer(llama_folder, get_family(name))


def test_damaged_vocabulary(llama_folder):
    (llama_folder / "sentencepiece.bpe.model").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot be read"):
        load_tokenizer(llama_folder)


def test_tiktoken_file_of_llama_3(tmp_path):
    ranks = (base64.b64encode(bytes([byte])) + f" {byte}".encode() for byte in range(256))
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(ranks))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Llama3Tokenizer"}')
    family = get_family("llama")
    encoder = FamilyEncoder(load_tokenizer(tmp_path, family), family)
    assert (encoder.prefix_ids, encoder.eos_token_id) == ((256,), 257)
    text = "你好\n<|end_of_text|> and <|eot_id|>"
    assert encoder.encode(text) == list(text.encode())
    assert encoder.decode([256, *encoder.encode(text), 257]) == text


def test_generation_of_llama_3_also_stops_where_a_turn_ends(tmp_path):
    ranks = (base64.b64encode(bytes([byte])) + f" {byte}".encode() for byte in range(256))
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(ranks))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Llama3Tokenizer"}')
    family = get_family("llama")
    encoder = FamilyEncoder(load_tokenizer(tmp_path, family), family)
    (end,) = encoder.chat_end_ids
    assert end != encoder.eos_token_id and encoder.encode_special("<|eot_id|>") == [end]


def test_ends_of_turns_that_a_tokenizer_lacks_are_left_out(llama_folder):
    family = get_family("llama")
    assert family.tokenizer.chat_ends
    assert FamilyEncoder(load_tokenizer(llama_folder), family).chat_end_ids == ()


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ 'a' * 10**12 }}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        [{"name": "default", "template": "{{ messages }}"}],
    ],
    ids=["unknown tag", "memory", "depth", "list"],
)
def test_a_template_is_not_read_with_the_tokenizer_and_is_saved_with_it(llama_folder, tmp_path, template):
    """PaddleNLP would compile it, and fail or fill memory over what training may not even use."""
    path = llama_folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    load_tokenizer(llama_folder).save_pretrained(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["chat_template"] == template


@pytest.mark.parametrize(
    ("parts", "is_kept"), [({"conversation": ["{{user}}", "{{bot}}"]}, True), ({"chat_template": "x"}, False)]
)
def test_a_template_file_beside_the_tokenizer(llama_folder, tmp_path, parts, is_kept):
    (llama_folder / "chat_template.json").write_text(json.dumps(parts))
    load_tokenizer(llama_folder).save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "chat_template.json").is_file() is is_kept


@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "anything"])
def test_a_pipe_in_the_folder_is_not_waited_for(llama_folder, name):
    (llama_folder / name).unlink(missing_ok=True)
    os.mkfifo(llama_folder / name)
    with pytest.raises(UserError, match=f"{name} cannot be read .it is a pipe or a device"):
        load_tokenizer(llama_folder)
