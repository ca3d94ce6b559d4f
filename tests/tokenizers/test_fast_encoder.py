"""The fast tokenizers against PaddleNLP's, on texts of many kinds and on strings that are known to make trouble."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import unicodedata

import pytest

from finetune.families.family import get_family
from finetune.tokenizers.encoder import FamilyEncoder
from finetune.tokenizers.fast_encoder import load_fast_encoder
from finetune.tokenizers.loading import load_tokenizer
from tests.conftest import ROOT
from tests.texts import NASTY, draw_passages, draw_texts


@pytest.fixture(scope="module")
def pair(case, tiny_folder):
    family = get_family(case.name)
    fast, reason = load_fast_encoder(tiny_folder, family)
    assert fast is not None, reason
    return fast, FamilyEncoder(load_tokenizer(tiny_folder, family), family)


@pytest.mark.parametrize("name", ["nasty", "random", "passages"])
def test_ids_are_those_of_paddlenlp(pair, name):
    fast, slow = pair
    texts = {"nasty": NASTY, "random": draw_texts(), "passages": draw_passages(60_000)}[name]
    many = fast.encode_many(texts)
    differing = [text for text, ids in zip(texts, many, strict=True) if list(ids) != slow.encode(text)]
    assert not differing, differing[:3]
    assert [fast.encode(text) for text in texts[:50]] == [list(ids) for ids in many[:50]]


def test_special_tokens_of_templates(pair):
    fast, slow = pair
    for text in [*NASTY, *draw_texts(100)]:
        assert fast.encode_special(text) == slow.encode_special(text), text


def test_frame(pair):
    fast, slow = pair
    for name in ("eos_token_id", "pad_token_id", "prefix_ids", "chat_end_ids"):
        assert getattr(fast, name) == getattr(slow, name), name


def test_decoding(pair):
    fast, slow = pair
    for text in NASTY:
        ids = slow.encode(text)
        assert fast.decode(ids) == slow.decode(ids), text
        framed = [*slow.prefix_ids, *ids, slow.eos_token_id, slow.pad_token_id]
        assert fast.decode(framed) == slow.decode(framed), text


def test_pieces_are_readable(pair, case):
    fast, _ = pair
    ids = [*fast.prefix_ids, *fast.encode("red dress"), fast.eos_token_id]
    pieces = fast.pieces(ids)
    assert len(pieces) == len(ids)
    assert pieces[-1] == case.end_of_answer
    assert tuple(pieces[: len(case.prefix)]) == case.prefix
    assert "".join(pieces[len(case.prefix) : -1]).replace("▁", " ").strip() == "red dress"


def both(folder, family_name="llama"):
    family = get_family(family_name)
    fast, reason = load_fast_encoder(folder, family)
    assert fast is not None, reason
    return fast, FamilyEncoder(load_tokenizer(folder, family), family)


def edit(path, **fields):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **fields}))


def test_folder_as_hugging_face_writes_it(llama_folder):
    """Special tokens as objects keep the blanks beside them."""
    flags = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    tokens = {
        role: {"content": text, **flags} for role, text in (("bos_token", "<s>"), ("eos_token", "</s>"))
    }
    edit(llama_folder / "special_tokens_map.json", **tokens, additional_special_tokens=["上"])
    fast, slow = both(llama_folder)
    for text in (" a </s>  b", "上衣 上 b", "<s>  <s> x", "<unk> <unk>  y"):
        assert fast.encode_special(text) == slow.encode_special(text), text
        assert fast.encode(text) == slow.encode(text), text


def test_llama_3(tmp_path):
    ranks = (base64.b64encode(bytes([byte])) + f" {byte}".encode() for byte in range(256))
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(ranks))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Llama3Tokenizer"}')
    fast, slow = both(tmp_path)
    texts = [*NASTY, "a <|eot_id|> b<|start_header_id|>user<|end_header_id|>\n\n"]
    for text in texts:  # PaddleNLP composes accents, which the published tokenizer does not
        if unicodedata.normalize("NFC", text) != text:
            assert fast.encode(text) == list(text.encode())
            continue
        assert fast.encode(text) == slow.encode(text), text
        assert fast.encode_special(text) == slow.encode_special(text), text
    for name in ("eos_token_id", "pad_token_id", "prefix_ids", "chat_end_ids"):
        assert getattr(fast, name) == getattr(slow, name), name


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("tokenizer_config.json", {"sp_model_kwargs": {"enable_sampling": True}}, "sets sp_model_kwargs"),
        ("tokenizer_config.json", {"do_lower_case": True}, "sets do_lower_case"),
    ],
)
def test_what_is_not_covered_gets_a_reason(llama_folder, name, fields, reason):
    edit(llama_folder / name, **fields)
    fast, said = load_fast_encoder(llama_folder, get_family("llama"))
    assert fast is None
    assert re.search(reason, said), said


@pytest.mark.parametrize(
    "name", ["LlamaTokenizerFast", "LLaMATokenizer", "PreTrainedTokenizerFast", "Unheard"]
)
def test_other_names_of_classes_mean_the_familys_own(llama_folder, name):
    expected = both(llama_folder)[0].encode("上衣 red")
    edit(llama_folder / "tokenizer_config.json", tokenizer_class=name)
    fast, slow = both(llama_folder)
    assert fast.encode("上衣 red") == slow.encode("上衣 red") == expected


def test_damaged_vocabulary_gets_a_reason(llama_folder):
    (llama_folder / "sentencepiece.bpe.model").write_bytes(b"damaged")
    assert load_fast_encoder(llama_folder, get_family("llama")) == (
        None,
        "sentencepiece.bpe.model is no SentencePiece model",
    )


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (["b c", "a bc", "ab d", "a b"], r"rule 3 of merges.txt \(ab d\) is out of order"),
        (["a b", "a b"], r"rule 2 of merges.txt \(a b\) is out of order"),
    ],
)
def test_rules_whose_order_could_matter_are_refused(tmp_path, rules, reason):
    from tokenizers import pre_tokenizers

    tokens = [*pre_tokenizers.ByteLevel.alphabet(), "bc", "abc", "ab", "abd", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *rules]) + "\n")
    fast, said = load_fast_encoder(tmp_path, get_family("qwen2"))
    assert fast is None
    assert re.search(reason, said), said


def test_paddle_is_not_needed(tiny_llama):
    code = (
        "import sys\n"
        "from finetune.families.family import get_family\n"
        "from finetune.tokenizers.fast_encoder import load_fast_encoder\n"
        f"encoder, _ = load_fast_encoder({str(tiny_llama)!r}, get_family('llama'))\n"
        "assert encoder.encode('a')\n"
        "assert not {'paddle', 'paddlenlp'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_the_fast_tokenizer_serves_many_texts(llama_folder):
    family = get_family("llama")
    fast, _ = load_fast_encoder(llama_folder, family)
    tokenizer = load_tokenizer(llama_folder, family)
    encoder = FamilyEncoder(tokenizer, family, fast)
    assert encoder.fast is fast
    expected = [FamilyEncoder(tokenizer, family).encode(text) for text in NASTY]
    assert [list(ids) for ids in encoder.encode_many(NASTY)] == expected


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "normalization_rule_name": "identity", "split_digits": True},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"model_type": "bpe", "user_defined_symbols": ["\n", "  ", "    ", "<extra>"]},
    ],
    ids=["bpe", "normalising", "with-symbols"],
)
def test_vocabularies_of_other_makers(tmp_path, options):
    """Trained with other settings than ours, and large enough for long pieces."""
    import sentencepiece

    texts = [*NASTY, *draw_texts(100), *draw_passages(30_000)]
    corpus = [
        line for text in draw_passages(200_000, seed=1) for line in text.splitlines() if "\0" not in line
    ]
    with (tmp_path / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=model, vocab_size=1200, byte_fallback=True,
            minloglevel=2, **options,
        )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    fast, slow = both(tmp_path)
    many = fast.encode_many(texts)
    assert [text for text, ids in zip(texts, many, strict=True) if list(ids) != slow.encode(text)] == []
    assert fast.encode_special(" <s>  a </s>b") == slow.encode_special(" <s>  a </s>b")


@pytest.mark.parametrize("single_file", [False, True])
def test_two_names_of_one_id_get_a_reason(tmp_path, single_file, corpus):
    """The library writes one of them only, and then misses the other in the rules."""
    from finetune.models.tiny.checkpoint import build_tiny

    folder = build_tiny(
        "qwen2", tmp_path / "model", corpus=corpus, vocab_size=330, num_layers=1, hidden_size=32
    )
    path = folder / "vocab.json"
    ids = json.loads(path.read_text(encoding="utf-8"))
    rules = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    pairs = [line.split() for line in rules if line.strip()]
    first, last = pairs[0][0], pairs[-1][0]
    ids[first] = ids[last]
    path.write_text(json.dumps(ids), encoding="utf-8")
    if single_file:
        model = {"type": "BPE", "vocab": ids, "merges": [" ".join(pair) for pair in pairs]}
        content = {"version": "1.0", "added_tokens": [], "model": model}
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        path.unlink()
        (folder / "merges.txt").unlink()
    encoder, reason = load_fast_encoder(folder, get_family("qwen2"))
    assert encoder is None and reason
