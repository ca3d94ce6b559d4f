"""What is peculiar to chatglm2 and qwen: configs and weights as published, tokenizers, refused settings."""

import base64
import json

import numpy as np
import paddle
import pytest

from finetune.data.samples.dataset import load_prompts, load_samples
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.data.templates.template import load_template
from finetune.errors import UserError
from finetune.families.chatglm2.record import CHATGLM2
from finetune.families.family import find_family, import_object
from finetune.families.qwen.record import QWEN
from finetune.models.loading import build_config, load_model
from finetune.models.resolve import resolve_model
from finetune.models.tensor_readers import plan_readers
from finetune.models.tiny.checkpoint import build_tiny
from finetune.models.tiny.tiktoken_training import count_ranks, train_ranks
from finetune.storage.checkpoints import Checkpoint
from finetune.tokenizers.encoder import FamilyEncoder
from finetune.tokenizers.loading import load_tokenizer
from finetune.training.evaluation import GenerationEvaluation, GenerationSettings
from tests.families import decoding

CHATGLM2_6B = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
}
QWEN_7B = {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "hidden_size": 4096,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_pct": 1.0,
    "vocab_size": 151936,
}


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("chatglm2_qwen")
    options = {"corpus": corpus, "num_layers": 1}
    return {
        "chatglm2": build_tiny(
            "chatglm2", root / "chatglm2", num_key_value_heads=2, vocab_size=340, **options
        ),
        "qwen": build_tiny("qwen", root / "qwen", vocab_size=520, **options),
    }


@pytest.fixture(scope="module")
def encoders(folders):
    found = {}
    for folder in folders.values():
        family = resolve_model(folder).family
        found[family.name] = FamilyEncoder(load_tokenizer(folder, family), family)
    return found


def test_published_configs_are_covered_and_renamed():
    assert find_family(CHATGLM2_6B) is CHATGLM2
    assert find_family(QWEN_7B) is QWEN
    adapted = CHATGLM2.adapt_config(CHATGLM2_6B)
    assert (adapted["num_hidden_layers"], adapted["vocab_size"], adapted["max_sequence_length"]) == (
        28,
        65024,
        32768,
    )
    assert not {"num_layers", "padded_vocab_size", "seq_length"} & adapted.keys()
    geometry = CHATGLM2.prefix_geometry(adapted)
    assert (geometry.num_layers, geometry.num_heads, geometry.num_kv_heads, geometry.head_dim) == (
        28,
        32,
        2,
        128,
    )
    separate = CHATGLM2.adapt_config({**CHATGLM2_6B, "multi_query_attention": False})
    assert separate["multi_query_group_num"] == 32


def test_chatglm_6b_is_another_architecture():
    config = {"model_type": "chatglm", "architectures": ["ChatGLMModel"], "inner_hidden_size": 16384}
    assert find_family(config).name == "chatglm"


ADAPT_FAULTS = [
    (CHATGLM2, {**CHATGLM2_6B, "rmsnorm": False}, r"rmsnorm False.*allowed: True"),
    (QWEN, {**QWEN_7B, "rotary_pct": 0.5}, r"rotary_pct 0.5, but PaddleNLP's Qwen rotates all of a head"),
    (QWEN, {**QWEN_7B, "kv_channels": 64}, r"kv_channels 64 with 32 heads.*hidden_size / heads = 128"),
]


@pytest.mark.parametrize(("family", "config", "message"), ADAPT_FAULTS, ids=lambda value: str(value)[:20])
def test_what_paddlenlp_cannot_express_is_refused(family, config, message):
    with pytest.raises(UserError, match=message):
        family.adapt_config(config)


REFUSED = [
    (
        "qwen",
        "fuse_attention_ffn",
        r"fuse_attention_ffn is True, but family qwen cannot have it: .*w1 and w2",
    ),
]


@pytest.mark.parametrize(("name", "option", "message"), REFUSED)
def test_options_that_would_compute_something_else_are_refused(folders, name, option, message):
    with pytest.raises(UserError, match=message):
        load_model(resolve_model(folders[name]), dtype="float32", config_overrides={option: True})


@pytest.mark.parametrize("name", ["chatglm2", "qwen"])
def test_flash_attention_computes_the_same(folders, name):
    ids = np.stack(decoding.random_rows([7, 7]))
    plain, flash = (decoding.load_sharp(folders[name], use_flash_attention=on) for on in (False, True))
    np.testing.assert_allclose(decoding.logits(flash, ids), decoding.logits(plain, ids), atol=2e-5)
    batch = decoding.packed(decoding.random_rows([6, 3]))
    ids = batch.pop("ids")
    np.testing.assert_allclose(
        decoding.logits(flash, ids, **batch), decoding.logits(plain, ids, **batch), atol=2e-5
    )


FRAMES = {"chatglm2": ["[gMASK]", "sop", "dress", "red", "</s>"], "qwen": ["dress", "red", "<|endoftext|>"]}


@pytest.mark.parametrize("name", FRAMES)
def test_a_sample_opens_and_ends_as_published_and_learns_the_answer_only(encoders, name, tmp_path):
    encoder, path = encoders[name], tmp_path / "train.json"
    path.write_text('{"src": "dress", "tgt": "red"}\n')
    (sample,), _ = load_samples([path], encoder, load_template(None), src_length=32, max_length=64)
    *frame, source, target, end = FRAMES[name]
    frame_ids, (end_id,) = (
        [encoder.tokenizer.convert_tokens_to_ids(t) for t in part] for part in (frame, [end])
    )
    prompt_ids = [*frame_ids, *encoder.encode(source)]
    answer_ids = [*encoder.encode(target), end_id]
    assert [*sample.input_ids.tolist(), end_id] == prompt_ids + answer_ids
    assert sample.labels.tolist() == [IGNORE_INDEX] * (len(prompt_ids) - 1) + answer_ids
    assert encoder.decode(prompt_ids) == source and encoder.decode(answer_ids) == target
    (prompt,), _ = load_prompts([path], encoder, load_template(None), src_length=32)
    assert prompt.input_ids.tolist() == prompt_ids


def test_words_that_contain_names_of_special_tokens_stay_words(encoders):
    encoder = encoders["chatglm2"]
    special = {encoder.tokenizer.convert_tokens_to_ids(name) for name in ("sop", "eop", "[gMASK]", "[MASK]")}
    text = "people use isopropyl, [gMASK]sop or [MASK]"
    assert not special & set(encoder.encode(text))
    assert encoder.decode(encoder.encode(text)) == text
    from paddlenlp.transformers import ChatGLMv2Tokenizer

    theirs = ChatGLMv2Tokenizer(encoder.tokenizer.vocab_file)
    assert special & set(theirs("people", add_special_tokens=False)["input_ids"]), "PaddleNLP has mended it"


def test_names_in_templates_stand_for_tokens(encoders):
    encoder = encoders["chatglm2"]
    ids = encoder.encode_special("[gMASK]sop people</s>")
    assert ids[:2] == list(encoder.prefix_ids) and ids[-1] == encoder.eos_token_id == 2
    assert encoder.decode(ids[2:-1]) == "people" or encoder.decode(ids[2:-1]) == " people"
    qwen = encoders["qwen"]
    start, end = (qwen.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    ids = qwen.encode_special("<|im_start|>user<|im_end|>")
    assert (ids[0], ids[-1]) == (start, end)
    assert not {start, end} & set(qwen.encode("<|im_start|>user<|im_end|>"))


@pytest.mark.parametrize("name", ["chatglm2", "qwen"])
def test_a_saved_tokenizer_is_read_by_paddlenlp_and_here(encoders, folders, name, tmp_path):
    from paddlenlp.transformers import AutoTokenizer

    encoder = encoders[name]
    encoder.tokenizer.save_pretrained(str(tmp_path))
    family = resolve_model(folders[name]).family
    ours = FamilyEncoder(load_tokenizer(tmp_path, family), family)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert (ours.eos_token_id, ours.pad_token_id, ours.prefix_ids) == (
        encoder.eos_token_id, encoder.pad_token_id, encoder.prefix_ids,
    )  # fmt: skip
    text = "上衣 red, 12"
    assert ours.encode(text) == encoder.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert theirs.pad_token_id == encoder.pad_token_id


def test_generation_stops_where_a_chat_template_ends_an_answer(folders, encoders):
    encoder, prompts = encoders["qwen"], decoding.as_prompts(decoding.random_rows([6, 4]))
    model = decoding.load_sharp(folders["qwen"])
    end = encoder.chat_end_ids[0]
    assert encoder.tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"

    def answers():
        evaluation = GenerationEvaluation(
            prompts, batch_size=2, encoder=encoder, settings=GenerationSettings(max_new_tokens=7), seed=0
        )
        return [answer for _, batch in evaluation._generate(model) for answer in batch]

    free = answers()
    assert len(free[0]) == 7
    # From now on the model says <|im_end|> where it said its fourth token.
    weight = model.lm_head.weight.numpy()
    weight[:, [end, free[0][3]]] = weight[:, [free[0][3], end]]
    model.lm_head.weight.set_value(weight)
    stopped = answers()
    assert stopped[0] == free[0][:3]
    assert all(end not in answer for answer in stopped)
    assert encoder.decode([*stopped[0], end]) == encoder.decode(stopped[0])


def _joined(ranks, name, whole):
    """The parts of two cards in the order in which the whole matrix has them."""
    first, second = ranks[0][name], ranks[1][name]
    if first.shape == whole.shape:
        return first
    axis = next(axis for axis in range(whole.ndim) if first.shape[axis] != whole.shape[axis])
    return np.concatenate([first, second], axis=axis)


@pytest.mark.parametrize("name", ["chatglm2", "qwen"])
def test_two_cards_hold_the_halves_of_the_weights(folders, name):
    resolved = resolve_model(folders[name])
    model_class = import_object(resolved.family.model_class)
    checkpoint = Checkpoint(folders[name])
    ranks = []
    for rank in range(2):
        overrides = {"tensor_parallel_degree": 2, "tensor_parallel_rank": rank}
        config = build_config(resolved, model_class, dtype="float32", overrides=overrides)
        readers = plan_readers(model_class, config, checkpoint, family=resolved.family)
        ranks.append({key: np.asarray(read()) for key, read in readers.items()})
    for key, shape in checkpoint.names.items():
        whole = np.asarray(checkpoint.read(key))
        joined = _joined(ranks, key, whole)
        assert joined.shape == shape
        # Fused matrices are cut part by part, so only the columns are compared, in any order.
        np.testing.assert_array_equal(np.sort(joined.ravel()), np.sort(whole.ravel()))
        if whole.ndim == 2:
            assert ranks[0][key].size == whole.size // 2, key


def test_ranks_are_the_same_every_time_and_give_tiktoken_what_it_needs(corpus):
    ranks = train_ranks(corpus, vocab_size=500)
    assert ranks == train_ranks(corpus, vocab_size=500)
    assert count_ranks(ranks) == 500 - 208
    tokens = [base64.b64decode(line.split()[0]) for line in ranks.splitlines()]
    assert sorted(tokens[:256]) == [bytes([byte]) for byte in range(256)]
    # Every merge is made of two earlier tokens.
    for place in range(256, len(tokens)):
        earlier = set(tokens[:place])
        assert any(tokens[place][:cut] in earlier and tokens[place][cut:] in earlier
                   for cut in range(1, len(tokens[place])))  # fmt: skip


TINY_FAULTS = [
    (
        "qwen",
        {"vocab_size": 464},
        r"vocab_size is 464 but must be at least 465 \(256 bytes, 208 control tokens",
    ),
    (
        "qwen",
        {"vocab_size": 9000},
        r"no vocabulary of 9000 tokens can be trained on .* it has pairs for \d+ only",
    ),
    (
        "qwen",
        {"num_key_value_heads": 2},
        r"num_key_value_heads is 2 but family qwen has as many as heads \(4\)",
    ),
    (
        "qwen",
        {"tokenizer": "no-such-file"},
        r"tokenizer no-such-file is not a file: give a .tiktoken rank file",
    ),
    (
        "chatglm2",
        {"hidden_size": 24},
        r"hidden_size / num_heads is 6 but family chatglm2 needs a multiple of 4",
    ),
    ("chatglm2", {"vocab_size": 268}, r"vocab_size is \d+ but must be at least \d+"),
    (
        "chatglm2",
        {"tokenizer": "no-such-file"},
        r"tokenizer no-such-file is not a file: give a SentencePiece",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), TINY_FAULTS)
def test_what_cannot_be_built_is_said(name, options, message, corpus, tmp_path):
    with pytest.raises(UserError, match=message):
        build_tiny(name, tmp_path / "model", **{"corpus": corpus, "vocab_size": 520, **options})
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no ranks at all", "is no tiktoken rank file"), (b"YQ== 0\n", "lacks 255 of the 256 bytes")],
)
def test_damaged_rank_file(content, message, tmp_path):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        build_tiny("qwen", tmp_path / "model", tokenizer=path)


def test_a_ready_vocabulary_sets_the_sizes(folders, tmp_path):
    for name, file, vocab_size in (("chatglm2", "tokenizer.model", 340), ("qwen", "qwen.tiktoken", 520)):
        folder = build_tiny(name, tmp_path / name, tokenizer=folders[name] / file, num_layers=1)
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == vocab_size
        assert (folder / file).read_bytes() == (folders[name] / file).read_bytes()


def test_a_long_prompt_leaves_no_trace_in_training(folders):
    """Qwen stretches its rotation for prompts past `seq_length`; training after it must be as before."""
    model = decoding.load_sharp(folders["qwen"])
    model.config.seq_length = 8
    for layer in model.sublayers():
        if hasattr(layer, "_ntk_cached"):
            layer.seq_length = 8
    ids = np.stack(decoding.random_rows([6]))

    def training_logits():
        model.train()
        with paddle.no_grad():
            return model(paddle.to_tensor(ids))[0].numpy()

    before = training_logits()
    decoding.logits(model, np.stack(decoding.random_rows([20])))
    np.testing.assert_array_equal(training_logits(), before)
