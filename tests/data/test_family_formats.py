"""The format of a family where a folder has no template: which one the tokens of its tokenizer tell."""

from __future__ import annotations

import json

import pytest

from finetune.data.reading.conversation import make_conversation
from finetune.data.templates.default_template import choose_format
from finetune.data.templates.template import FORM_NAMES, load_template
from finetune.data.templates.trained_template import record_default, trained_template
from finetune.errors import UserError
from finetune.families.registry import families
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.gguf.templates import choose_template

HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MARKS = ("<|im_start|>", "<|im_end|>")
R1 = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
# family, tokens of its tokenizer: the format
TOLD = [
    ("llama", ("<s>", "</s>"), None),
    ("llama", HEADERS, "llama3"),
    ("llama", (*HEADERS, *R1), "deepseek_r1"),
    ("llama", MARKS, "yi"),
    ("qwen", (), "qwen"),
    ("qwen2", MARKS, "qwen2"),
    ("qwen2", (*MARKS, "<tool_call>", "</tool_call>"), "qwen2.5"),
    ("qwen2", (*MARKS, *R1), "deepseek_r1"),
    ("qwen2_moe", MARKS, "qwen2"),
    ("qwen3", (*MARKS, "<tool_call>", "<think>"), "qwen3"),
    ("qwen3_moe", MARKS, "qwen3"),
    ("ernie4_5", ("<|begin_of_sentence|>", "<|end_of_sentence|>"), "ernie4_5"),
    ("ernie4_5", (), None),
    ("mistral", ("<s>", "</s>"), "mistral"),
    ("mistral", ("<s>", "[INST]", "[TOOL_CALLS]"), "mistral_v3"),
    ("mistral", ("<s>", "[INST]", "[TOOL_CALLS]", "<SPECIAL_20>"), "mistral_nemo"),
    ("mistral", ("<s>", "[INST]", "[TOOL_CALLS]", "<SPECIAL_20>", "[SYSTEM_PROMPT]"), "mistral_small"),
    ("mixtral", ("<s>",), "mixtral"),
    ("phi3", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "phi3"),
    ("phi3", ("<|assistant|>", "<|end|>", "<|tool_call|>"), "phi4_mini"),
    ("phi3", (*MARKS, "<|im_sep|>"), "phi4"),
    ("gemma", ("<start_of_turn>",), "gemma"),
    ("gemma2", ("<start_of_turn>",), "gemma2"),
    ("gemma3", ("<start_of_turn>",), "gemma3"),
    ("falcon", (), "falcon"),
    ("granite", ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"), "granite"),
    ("granite", ("<|end_of_text|>",), None),
    ("smollm3", ("<|end_of_text|>", *MARKS), "chatml"),
    ("smollm3", ("<|end_of_text|>",), None),
    ("chatglm2", (), "chatglm2"),
    ("chatglm3", (), "chatglm3"),
    ("glm4", (), "glm4"),
    ("bloom", ("<s>", "</s>"), None),
]  # fmt: skip


def lay_out(folder, tokens, **config):
    decoder = {str(i): {"content": name, "special": True} for i, name in enumerate(tokens)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("family", "tokens", "name"), TOLD)
def test_tokens_tell_the_format(family, tokens, name, tmp_path):
    assert choose_format(families()[family].chat_template, lay_out(tmp_path, tokens)) == name


def test_every_format_that_a_record_names_is_there():
    for family in families().values():
        known = family.chat_template
        names = [known] if isinstance(known, str) else (known or {}).values()
        assert set(names) <= set(FORM_NAMES), family.name


def test_training_answers_and_llama_cpp_take_the_same(tmp_path):
    folder = lay_out(tmp_path, MARKS, model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    talk = make_conversation([("q", "a")])
    written = load_template("qwen3", folder).render(talk)
    assert load_template(None, folder).render(talk) == written
    record_default(folder, folder, uses_own=True)
    assert trained_template(folder) == "qwen3"
    (folder / "trained_template.json").unlink()
    assert ModelOptions(model_name_or_path=str(folder)).template_name(folder) == "qwen3"
    chosen = choose_template(folder, families()["qwen3"])
    assert "enable_thinking" in chosen.jinja and chosen.chat is None


PUBLISHED_R1 = (
    "{{bos_token}}{% for m in messages %}{% if m.role == 'user' %}{{'<｜User｜>' + m.content}}{% else %}"
    "{{'<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)


def test_a_template_that_cannot_be_trained_names_the_one_that_can(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": PUBLISHED_R1}))
    with pytest.raises(
        UserError, match="chat_template deepseek_r1 writes the same prompts and can be trained"
    ):
        load_template("tokenizer", tmp_path)
