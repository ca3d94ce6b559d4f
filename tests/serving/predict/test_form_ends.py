"""Answers end where the named chat templates end them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from finetune.data.templates.chat_templates import CHAT_FORMATS
from finetune.data.templates.jinja_forms import JINJA_FORMS
from finetune.data.templates.template import FORM_NAMES, load_template
from finetune.serving.predict.responder import stop_ids

EOS, UNKNOWN = 1, 0
NAMES = sorted(
    {token for chat in CHAT_FORMATS.values() for token in chat.special_tokens}
    | {token for form in JINJA_FORMS.values() for token in form.special_tokens}
)
ENDS = {
    "qwen": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "deepseek_r1": "<｜end▁of▁sentence｜>", "skywork": "</s>",
}  # fmt: skip


class Encoder:
    eos_token_id, chat_end_ids, tokenizer = EOS, (), SimpleNamespace(unk_token_id=UNKNOWN)

    def encode_special(self, text):
        return [10 + NAMES.index(text)] if text in NAMES else [100 + ord(letter) for letter in text]


@pytest.mark.parametrize("name", FORM_NAMES)
def test_generation_stops_at_the_end_of_the_form(name, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    found = stop_ids(Encoder(), load_template(name, tmp_path))
    if name in JINJA_FORMS:
        end = ENDS[JINJA_FORMS[name].file]
    else:
        end = CHAT_FORMATS[name].end or ("<|user|>" if CHAT_FORMATS[name].ends_with_next else "")
    assert found == ((EOS, 10 + NAMES.index(end)) if end else (EOS,))
