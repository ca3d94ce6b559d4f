"""ChatGLM2 and ChatGLM3 share a `model_type`: which is which, what `rope_ratio` then means, and the third's chat form."""

import json
import shutil

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from finetune.data.samples.dataset import load_prompts, load_samples
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.data.templates.template import load_template
from finetune.errors import UserError
from finetune.families.chatglm2.generation import GENERATION, POSITION_DIVISOR, ROTARY_BASE
from finetune.families.family import find_family, get_family
from finetune.merge.hf_out import hugging_face_config
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.encoder import FamilyEncoder
from finetune.tokenizers.loading import load_tokenizer
from tests.families import decoding
from tests.reference import chatglm2_numpy
from tests.reference.chatglm2_qwen_published import published_config, published_weights, write_published

LONG = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "rope_ratio": 50,
    "seq_length": 32768,
}
OTHER = {"chatglm2": "chatglm3", "chatglm3": "chatglm2", "chatglm4": "chatglm4"}
NAMES = {
    "THUDM/chatglm2-6b-32k": "chatglm2",
    "THUDM/chatglm3-6b-32k": "chatglm3",
    "/models/ChatGLM3_6B_128k/": "chatglm3",
    "ZhipuAI/chatglm3-6b": "chatglm3",
    "THUDM/chatglm3-6b-4bit": "chatglm3",
    "THUDM/glm-4-9b-chat-1m": "chatglm4",
    "/models/GLM4-9b": "chatglm4",
    "THUDM/codegeex4-all-9b": "chatglm4",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [1, 50])
def test_the_name_in_the_configuration_tells_the_generation(name, ratio):
    found = find_family({**LONG, "_name_or_path": name, "rope_ratio": ratio})
    assert found.name == NAMES[name]


ROLES = {"64795": {"content": "<|user|>", "special": True}}
FILES = {
    "roles": ({"tokenizer_config.json": json.dumps({"added_tokens_decoder": ROLES})}, "chatglm3"),
    "template": ({"tokenizer_config.json": json.dumps({"chat_template": "<|user|>\n"})}, "chatglm3"),
    "jinja": ({"chat_template.jinja": "<|user|>\n"}, "chatglm3"),
    "name": ({"tokenizer_config.json": json.dumps({"name_or_path": "THUDM/chatglm2-6b"})}, "chatglm2"),
    "code of 3": ({"tokenization_chatglm.py": 'role_special_tokens = ["<|user|>"]'}, "chatglm3"),
    "class of 4": (
        {
            "tokenizer_config.json": json.dumps(
                {"tokenizer_class": "ChatGLM4Tokenizer", "chat_template": "<|user|>"}
            )
        },
        "chatglm4",
    ),
    "code of 2": ({"tokenization_chatglm.py": 'special_tokens = ["[gMASK]", "sop"]'}, "chatglm2"),
}


@pytest.mark.parametrize("case", FILES)
def test_else_the_files_of_the_tokenizer_tell_it(case, tmp_path):
    files, name = FILES[case]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    assert find_family(LONG, tmp_path).name == name
    other = OTHER[name]
    assert find_family({**LONG, "_name_or_path": f"{other}-6b"}, tmp_path).name == other


def test_a_long_model_of_unknown_generation_is_refused_by_both_names(tmp_path):
    message = r"shared by the families chatglm2 \(_name_or_path chatglm2.*chatglm3 \(_name_or_path chatglm3"
    for config in (
        LONG,
        {**LONG, "_name_or_path": "/models/base"},
        {**LONG, "_name_or_path": "chatglm2-chatglm3"},
    ):
        with pytest.raises(UserError, match=message):
            find_family(config, tmp_path)
    assert find_family({**LONG, "rope_ratio": 1}, tmp_path).name == "chatglm2", "both compute the same"


REFUSED = [
    ({"rope_ratio": 0}, r"rope_ratio 0; allowed: a number above 0"),
    ({"rope_ratio": True}, r"rope_ratio True; allowed"),
    ({"post_layer_norm": False}, r"post_layer_norm False.*allowed: True"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_neither_computes_is_refused(fields, message):
    config = {**LONG, "_name_or_path": "chatglm3-6b-32k", **fields}
    with pytest.raises(UserError, match=message):
        find_family(config).adapt_config(config)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("chatglm2", POSITION_DIVISOR, 50.0),
        ("chatglm3", ROTARY_BASE, 500000.0),
        ("glm-4", ROTARY_BASE, 500000.0),
    ],
)
def test_what_a_run_saves_and_what_is_exported_stay_of_their_generation(name, field, value):
    family = get_family({"glm-4": "chatglm4"}.get(name, name))
    config = {**LONG, "_name_or_path": f"THUDM/{name}-6b-32k"}
    adapted = family.adapt_config(config)
    assert adapted[field] == value and "rope_ratio" not in adapted
    saved = {key: value for key, value in adapted.items() if key != "_name_or_path"}
    assert find_family(saved) is family and family.adapt_config(saved) == saved
    written = hugging_face_config(saved, family, dtype="float16")
    assert written["rope_ratio"] == 50 and not {ROTARY_BASE, POSITION_DIVISOR, GENERATION} & written.keys()
    assert find_family(written) is family and family.adapt_config(written)[field] == value


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("generations")
    options = {"corpus": corpus, "num_layers": 2, "num_key_value_heads": 2, "vocab_size": 340}
    found = {name: build_tiny(name, root / name, **options) for name in ("chatglm2", "chatglm3")}
    path = found["chatglm2"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {POSITION_DIVISOR: 16.0}))
    return found


@pytest.fixture(scope="module")
def published(folders, tmp_path_factory):
    """The same weights, ten times as large, in folders of the published form, and their logits."""
    root, found = tmp_path_factory.mktemp("published_generations"), {}
    ids = np.random.default_rng(0).integers(3, 320, size=(2, 40))
    for name, folder in folders.items():
        target = write_published(folder, root / name, "chatglm2")
        weights = published_weights(folder, "chatglm2")
        weights = {key: array * (10 if array.ndim == 2 else 1) for key, array in weights.items()}
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        config = published_config(folder, "chatglm2")
        ratio = config.pop(POSITION_DIVISOR, None) or config.pop(ROTARY_BASE) / 10000
        config |= {"_name_or_path": f"THUDM/{name}-6b-32k", "rope_ratio": ratio}
        (target / "config.json").write_text(json.dumps(config))
        double = {key: array.astype(np.float64) for key, array in weights.items()}
        found[name] = target, ids, chatglm2_numpy.logits(double, ids, config)
    return found


def _logits(folder, ids):
    model = load_model(resolve_model(folder), dtype="float32")
    with paddle.no_grad():
        return decoding.logits(model, ids)


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_logits_equal_the_reference(published, name):
    folder, ids, expected = published[name]
    assert resolve_model(folder).family.name == name
    np.testing.assert_allclose(_logits(folder, ids), expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_the_other_generation_would_compute_something_else(published, name, tmp_path):
    folder, ids, expected = published[name]
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["_name_or_path"] = f"{OTHER[name]}-6b-32k"
    (other / "config.json").write_text(json.dumps(config))
    assert np.abs(_logits(other, ids) - expected).max() > 1e-2 * np.abs(expected).max()


def test_a_conversation_has_the_ids_of_the_published_tokenizer(folders, tmp_path):
    """Every role is its token, then a line break and the text, each spelled by itself; <|user|> ends an answer."""
    folder = folders["chatglm3"]
    family = get_family("chatglm3")
    encoder = FamilyEncoder(load_tokenizer(folder, family), family)
    messages = [
        {"role": "system", "content": "red"},
        {"role": "user", "content": "上衣 people"},
        {"role": "assistant", "content": "a dress"},
        {"role": "user", "content": "<|user|> q"},
        {"role": "assistant", "content": "fits"},
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    template = load_template(None, folder)
    (sample,), report = load_samples([path], encoder, template, src_length=200, max_length=255)
    assert report.num_in_own_template == 1
    roles = {
        name: encoder.tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("system", "user", "assistant")
    }
    line, end, was_answer = encoder.encode("\n"), roles["user"], False
    expected, learned = list(encoder.prefix_ids), [False] * 2
    for message in messages:
        text = [*line, *encoder.encode(message["content"])]
        is_answer = message["role"] == "assistant"
        expected += [roles[message["role"]], *text]
        learned += [was_answer, *[is_answer] * len(text)]
        was_answer = is_answer
    assert [*sample.input_ids.tolist(), int(sample.labels[-1])] == [*expected, end]
    assert [label != IGNORE_INDEX for label in sample.labels] == [*learned[1:], True]
    (prompt,), _ = load_prompts([path], encoder, template, src_length=200)
    last = len(line) + len(encoder.encode("fits"))
    assert prompt.input_ids.tolist() == expected[:-last]
    assert {roles["user"]} <= set(encoder.chat_end_ids)
