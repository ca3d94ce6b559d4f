"""The fast tokenizers against PaddleNLP's, on real text and on strings that are known to make trouble."""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
import sys

import pytest

from finetune.models.family import get_family
from finetune.models.fast_encoder import load_fast_encoder
from finetune.models.tokenizer import FamilyEncoder, load_tokenizer
from tests.conftest import REAL_DATA, ROOT

NASTY = [
    "",
    " ",
    "  ",
    "\n",
    " \n \n  a",
    "a b",
    " a",
    "a ",
    "  blanks  around  ",
    "two\nlines\n\nand\ttabs\r\n",
    "</s>",
    " </s> ",
    "a </s> b<s><unk><pad>",
    "<|endoftext|><|im_start|>user\n<|im_end|> x",
    "<0x0A><0xE4>▁ ▁▁",
    "<bos><eos><start_of_turn>",
    "[gMASK]sop people isopropyl eop [MASK] sop</s>",
    "e\u0301 \u00e9 \u1e9b\u0323 ﬁ Å Å",
    "emoji 😀👍🏽👨‍👩‍👧 and rare 饕餮 𠮷",
    "１２３ 123456 1,234.5 ½ ² Ⅷ ٣",
    "it's IT'S I'LL we'Ve ſ's",
    "\u00a0\u2003\u3000\u200b\ufeff\u0085\x1c\x1f\x00\x7f",
    "a\u2028b\u2029c\x0bd\x0ce",
    "ไทย العربية हिन्दी",
    "\ud7ff\ue000\ufffd\U0010ffff\ufffe",
    "…。，、।۔،(|[.,!?",
    "new in Unicode 17: \U000323b0\u0558 a\u088fb1\U00033000",
    "x" * 3000,
    " " * 300 + "x" + "\n" * 50,
]


@pytest.fixture(scope="module")
def pair(case, tiny_folder):
    family = get_family(case.name)
    fast, reason = load_fast_encoder(tiny_folder, family)
    assert fast is not None, reason
    return fast, FamilyEncoder(load_tokenizer(tiny_folder, family), family)


def real_texts(characters: int = 60_000) -> list[str]:
    if not REAL_DATA.is_dir():
        pytest.skip("the real data are not here")
    files = [*sorted(REAL_DATA.glob("*.json")), *sorted(REAL_DATA.glob("*.jsonl"))]
    text = "".join(file.read_text(encoding="utf-8")[: characters // len(files)] for file in files)
    return [text[start : start + 400] for start in range(0, len(text), 400)]


def random_texts(count: int = 300) -> list[str]:
    """Mixtures of nasty parts and of characters from all over Unicode."""
    generator = random.Random(0)
    parts = [part for part in NASTY if len(part) < 100]
    texts = []
    for _ in range(count):
        drawn = generator.sample(parts, 3)
        codes = [generator.randrange(0x3000), generator.randrange(0xE000, 0x20000)]
        texts.append("".join([*drawn, *map(chr, codes), *generator.sample(parts, 1)]))
    return texts


@pytest.mark.parametrize("name", ["nasty", "random", "real"])
def test_ids_are_those_of_paddlenlp(pair, name):
    fast, slow = pair
    texts = {"nasty": lambda: NASTY, "random": random_texts, "real": real_texts}[name]()
    many = fast.encode_many(texts)
    differing = [text for text, ids in zip(texts, many, strict=True) if list(ids) != slow.encode(text)]
    assert not differing, differing[:3]
    assert [fast.encode(text) for text in texts[:50]] == [list(ids) for ids in many[:50]]


def test_special_tokens_of_templates(pair):
    fast, slow = pair
    for text in [*NASTY, *random_texts(100)]:
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
    for text in [*NASTY, "a <|eot_id|> b<|start_header_id|>user<|end_header_id|>\n\n"]:
        assert fast.encode(text) == slow.encode(text), text
        assert fast.encode_special(text) == slow.encode_special(text), text
    for name in ("eos_token_id", "pad_token_id", "prefix_ids", "chat_end_ids"):
        assert getattr(fast, name) == getattr(slow, name), name


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        (
            "tokenizer_config.json",
            {"tokenizer_class": "LlamaTokenizerFast"},
            "tokenizer class LlamaTokenizerFast",
        ),
        ("tokenizer_config.json", {"sp_model_kwargs": {"enable_sampling": True}}, "sets sp_model_kwargs"),
        ("tokenizer_config.json", {"split_special_tokens": True}, "sets split_special_tokens"),
        ("added_tokens.json", {"[PAD]": 330}, r"added_tokens.json adds \[PAD\]"),
        (
            "special_tokens_map.json",
            {"pad_token": "[PAD]"},
            r"special token \[PAD\] is not in the vocabulary",
        ),
    ],
)
def test_what_is_not_covered_gets_a_reason(llama_folder, name, fields, reason):
    edit(llama_folder / name, **fields)
    fast, said = load_fast_encoder(llama_folder, get_family("llama"))
    assert fast is None
    assert re.search(reason, said), said


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
        "from finetune.models.family import get_family\n"
        "from finetune.models.fast_encoder import load_fast_encoder\n"
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


def test_a_fast_tokenizer_that_differs_is_left_alone(llama_folder, monkeypatch):
    family = get_family("llama")
    fast, _ = load_fast_encoder(llama_folder, family)
    monkeypatch.setattr(fast, "encode", lambda text: [1, 2, 3])
    encoder = FamilyEncoder(load_tokenizer(llama_folder, family), family, fast)
    assert encoder.fast is None
    assert [list(ids) for ids in encoder.encode_many(["a b", ""])] == [encoder.encode("a b"), []]


def test_a_published_vocabulary(tmp_path):
    texts = [*NASTY, *random_texts(100), *real_texts(30_000)]
    model = REAL_DATA / "chinese_llama2_tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    fast, slow = both(tmp_path)
    many = fast.encode_many(texts)
    assert [text for text, ids in zip(texts, many, strict=True) if list(ids) != slow.encode(text)] == []
