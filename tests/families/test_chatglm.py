"""ChatGLM-6B: whose folders they are, what its rows see, how conversations become samples, and its tokenizer."""

import json

import numpy as np
import paddle
import pytest

from finetune.data.samples.dataset import load_prompts, load_samples
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.data.templates.template import load_template
from finetune.errors import UserError
from finetune.families.blank_pieces import CHATGLM_TOKENS
from finetune.families.chatglm.config import stored_frequencies
from finetune.families.chatglm.layers import TextPlaces
from finetune.families.config_fields import unknown_fields
from finetune.families.family import find_family, get_family
from finetune.merge.hf_out import hugging_face_config
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.encoder import FamilyEncoder
from finetune.tokenizers.fast_encoder import load_fast_encoder
from finetune.tokenizers.loading import load_tokenizer
from tests.families import decoding
from tests.reference import chatglm_numpy
from tests.texts import NASTY, draw_texts

PUBLISHED = {
    "_name_or_path": "THUDM/chatglm-6b", "architectures": ["ChatGLMModel"], "auto_map": {}, "bos_token_id": 130004,
    "eos_token_id": 130005, "gmask_token_id": 130001, "hidden_size": 4096, "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-05, "mask_token_id": 130000, "max_sequence_length": 2048, "model_type": "chatglm",
    "num_attention_heads": 32, "num_layers": 28, "pad_token_id": 3, "position_encoding_2d": True, "pre_seq_len": None,
    "prefix_projection": False, "quantization_bit": 0, "torch_dtype": "float16", "transformers_version": "4.27.1",
    "use_cache": True, "vocab_size": 130528,
}  # fmt: skip
FIRST = {name: value for name, value in PUBLISHED.items() if "mask_token_id" not in name and name[0] != "p"}
GMASK, SOP = 5, 8


def test_published_configurations_are_of_the_first_generation():
    family = get_family("chatglm")
    early = FIRST | {"bos_token_id": 150004, "eos_token_id": 150005, "vocab_size": 150528}
    for found, gmask in ((PUBLISHED, 130001), (early, 150001)):
        config = {name: value for name, value in found.items() if name != "transformers_version"}
        assert find_family(config) is family and list(unknown_fields(config, family)) == []
        adapted = family.adapt_config(config)
        assert (adapted["num_hidden_layers"], adapted["intermediate_size"]) == (28, 16384)
        assert adapted["gmask_token_id"] == gmask and adapted["mask_token_id"] == gmask - 1
        assert find_family(adapted) is family and family.adapt_config(adapted) == adapted
        written = hugging_face_config(adapted, family, dtype="float16")
        assert find_family(written) is family and family.adapt_config(written)["total_layers"] == 28
        assert written["inner_hidden_size"] == 16384 and "total_layers" not in written


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_bit": 4}, "quantization_bit 4.*weight_quantize_algo"),
        ({"pre_seq_len": 128}, "pre_seq_len 128.*prefix_tuning"),
        ({"position_encoding_2d": False}, "position_encoding_2d False, but ChatGLM-6B"),
    ],
)
def test_what_is_not_computed_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        get_family("chatglm").adapt_config(PUBLISHED | fields)


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    options = {"corpus": corpus, "num_layers": 2, "vocab_size": 340}
    return build_tiny("chatglm", tmp_path_factory.mktemp("chatglm") / "model", **options)


@pytest.fixture(scope="module")
def encoder(folder):
    family = get_family("chatglm")
    return FamilyEncoder(load_tokenizer(folder, family), family)


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


def _texts():
    """Texts with contexts and answers of several lengths, one without a context, one of a gap in the middle."""
    draw = np.random.default_rng(0)
    sizes = ((6, 4), (0, 5), (9, 1), (1, 7))
    texts = [[*draw.integers(20, 300, size=a), GMASK, SOP, *draw.integers(20, 300, size=b)] for a, b in sizes]
    gap = [
        *draw.integers(20, 300, size=3),
        4,
        *draw.integers(20, 300, size=2),
        SOP,
        *draw.integers(20, 300, size=3),
    ]
    return [np.array(text) for text in [*texts, gap]]


def test_positions_and_what_is_seen_are_those_of_the_description(config):
    from types import SimpleNamespace

    for text in _texts():
        places = TextPlaces(
            paddle.to_tensor(text[None]), paddle.arange(len(text)).unsqueeze(0), SimpleNamespace(**config)
        )
        expected = chatglm_numpy.two_positions(text.tolist(), config)
        assert places.two_positions().numpy()[0].tolist() == [list(part) for part in expected]
        seen = places.sees_context().numpy()[0, 0] | np.tri(len(text), dtype=bool)
        np.testing.assert_array_equal(seen, chatglm_numpy.visible(text.tolist(), config))


def test_texts_of_a_packed_row_see_their_own_contexts_only(folder):
    model, rows = decoding.load_sharp(folder), _texts()
    packed = decoding.packed(rows)
    together = decoding.logits(model, packed.pop("ids"), **packed)[0]
    alone = np.concatenate([decoding.logits(model, row[None])[0] for row in rows])
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max(), rtol=0)


def test_a_token_of_the_context_sees_what_comes_after_it(folder):
    model, text = decoding.load_sharp(folder), _texts()[0]
    first = decoding.logits(model, text[None])[0]
    for place, changes in ((4, True), (len(text) - 1, False)):
        other = text.copy()
        other[place] = 301
        assert (np.abs(decoding.logits(model, other[None])[0, 0] - first[0]).max() > 1e-3) == changes


@pytest.mark.parametrize("with_prefix", [False, True])
def test_one_token_at_a_time_gives_the_logits_of_the_whole_text(folder, with_prefix):
    model = decoding.load_sharp(folder)
    model = decoding.with_prefix(model, get_family("chatglm")) if with_prefix else model
    model.eval()
    rows = np.stack([_texts()[0], np.roll(_texts()[0], 0)])
    rows[1, [2, 9]] = 301, 302
    whole = decoding.logits(model, rows)[:, 7:]
    steps = decoding.stepwise_logits(model, rows, 8)
    np.testing.assert_allclose(steps, whole, atol=1e-5 * np.abs(whole).max(), rtol=0)


def _write(tmp_path, row):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(row) + "\n")
    return path


def test_a_conversation_is_a_sample_for_each_answer(folder, encoder, tmp_path):
    """Rounds are numbered from 0; a single question stands alone; [gMASK] <sop> stands before the answer."""
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    path = _write(tmp_path, {"messages": [{"role": role, "content": text} for role, text in turns]})
    template = load_template(None, folder)
    samples, _ = load_samples([path], encoder, template, src_length=200, max_length=255)
    prompts = ["q1", "[Round 0]\n问：q1\n答：a1\n[Round 1]\n问：q2\n答："]
    assert len(samples) == 2
    for sample, prompt, answer in zip(samples, prompts, ("a1", "a2"), strict=True):
        learned = sample.labels[sample.labels != IGNORE_INDEX].tolist()
        assert learned == [*encoder.encode(answer), encoder.eos_token_id]
        context = sample.input_ids[: -len(learned) + 1].tolist()
        assert context == [*encoder.encode(prompt), GMASK, SOP], "one text, as published"
    (asked,), _ = load_prompts([path], encoder, template, src_length=200)
    assert asked.input_ids.tolist() == samples[1].input_ids[: len(asked.input_ids)].tolist()


@pytest.mark.parametrize("src_length", [2, 5])
def test_a_prompt_that_is_cut_keeps_what_opens_the_answer(encoder, tmp_path, src_length):
    path = _write(tmp_path, {"src": "a red dress of silk and linen", "tgt": "fits"})
    (sample,), _ = load_samples([path], encoder, load_template(None), src_length=src_length, max_length=30)
    ids = sample.input_ids.tolist()
    assert ids.index(SOP) == src_length - 1 and ids[src_length - 2] == GMASK and sample.truncated_source
    (prompt,), _ = load_prompts([path], encoder, load_template(None), src_length=src_length)
    assert prompt.input_ids.tolist() == ids[:src_length]


def _published_ids(folder, offset):
    """The published algorithm, by SentencePiece, for texts that name no token."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))

    def encode(text):
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for size in range(80, 1, -1):
            text = text.replace(" " * size, f"<|blank_{size}|>")
        return [index + offset for index in model.encode(text)]

    return encode


@pytest.mark.parametrize("offset", [0, 20000])
def test_ids_are_those_of_the_published_tokenizer(folder, tmp_path, offset):
    import shutil

    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_image_tokens": offset}))
    family, published = get_family("chatglm"), _published_ids(other, offset)
    fast, reason = load_fast_encoder(other, family)
    assert fast is not None, reason
    texts = [text for text in [*draw_texts(150), *NASTY] if not any(name in text for name in CHATGLM_TOKENS)]
    texts += ["a\tb\n\n  c", " " * 161 + "x" + " " * 80 + "y" + " " * 79, "你好\n世界", "a    b"]
    for each in (fast, FamilyEncoder(load_tokenizer(other, family), family)):
        for text in texts:
            assert list(each.encode(text)) == published(text), text
        assert each.answer_prefix_ids == (GMASK + offset, SOP + offset) and each.prefix_ids == ()
        assert (each.eos_token_id, each.pad_token_id) == (9 + offset, 3 + offset)
        assert each.decode(each.encode("a\tb\n\n  c    d")) == "a\tb\n\n  c    d"
        for name in CHATGLM_TOKENS[:6]:
            assert each.encode_special(name) == [4 + CHATGLM_TOKENS.index(name) + offset]
            assert not {4, 5, 6, 7, 8, 9} & {index - offset for index in each.encode(f"x {name} y")}


def test_frequencies_of_positions_have_the_digits_of_the_published_ones(folder):
    """Float16: for the published head of 128 a third of them differ from exact ones by more than 1e-4 of their size."""
    found = stored_frequencies(10000.0, 64)
    exact = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    assert found.dtype == np.float32 and np.array_equal(found, found.astype(np.float16))
    assert (np.abs(found / exact - 1) > 1e-4).mean() > 0.25 and np.abs(found / exact - 1).max() < 5e-4
    tables = load_model(resolve_model(folder), dtype="float32").qwen2.layers[0].self_attn.tables
    np.testing.assert_array_equal(
        tables.frequencies, stored_frequencies(10000.0, 2 * len(tables.frequencies))
    )
