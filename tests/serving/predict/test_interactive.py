"""The conversation on a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from finetune.data.templates.template import load_template
from finetune.errors import UserError
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.interactive import HELP, Terminal
from finetune.serving.predict.responder import stop_ids
from tests.serving.predict.builders import ScriptedDecoder

SETTINGS = DecodingSettings(max_new_tokens=8)


def talk(responder, *lines):
    output, rest = io.StringIO(), list(lines)

    def ask(_prompt: str) -> str:
        if not rest:
            raise EOFError
        return rest.pop(0)

    Terminal(responder, SETTINGS, output=output, ask=ask).run()
    return output.getvalue()


def scripted(responder, template: str, text: str):
    decoder = ScriptedDecoder(responder.encoder.encode(text))
    return replace(responder, decoder=decoder, template=load_template(template)), decoder


def prompts_of(responder, decoder):
    return [responder.encoder.decode(rows[0]) for rows, _ in decoder.calls]


def test_a_chat_template_remembers_until_clear(responder):
    chat, decoder = scripted(responder, "chatglm2", "上衣🙂")
    text = talk(chat, "白色", "", "裙", "/clear", "a", "/exit", "never")
    assert text == "上衣🙂\n上衣🙂\nA new conversation.\n上衣🙂\n"
    first, second, third = prompts_of(chat, decoder)
    assert "上衣" not in first and "[Round 2]" in second and "上衣🙂" in second and "白色" in second
    assert "[Round 2]" not in third and "裙" not in third


def test_without_a_template_every_line_stands_alone(responder):
    plain, decoder = scripted(responder, "none", "上衣")
    talk(plain, "白色", "裙")
    assert [text.strip() for text in prompts_of(plain, decoder)] == ["白色", "裙"]


def test_commands(responder):
    chat, decoder = scripted(responder, "chatglm2", "上衣")
    text = talk(chat, "/system 你是助手", "a", "/help", "/tmp/file is text")
    assert text.startswith("System text set; a new conversation.\n") and text.count(HELP) == 1
    assert all("你是助手" in prompt for prompt in prompts_of(chat, decoder)) and len(decoder.calls) == 2


def test_ctrl_c_keeps_what_was_said(responder):
    chat, decoder = scripted(responder, "chatglm2", "上衣")

    def stopped(*args, on_tokens, **kwargs):
        decoder.calls.append((args[0], None))
        on_tokens([chat.encoder.encode("上衣")])
        raise KeyboardInterrupt

    chat.decoder.generate = stopped
    assert talk(chat, "a", "b") == "上衣 [stopped]\n" * 2
    assert "上衣" in prompts_of(chat, decoder)[1]


def test_the_real_model_streams_what_it_answers(responder):
    shown: list[str] = []
    answer = responder.answer([], "上衣", replace(SETTINGS, max_new_tokens=24), on_text=shown.append)
    assert "".join(shown) == answer and len(shown) > 3


def test_faults_do_not_end_the_conversation(responder):
    text = talk(replace(responder, position_limit=8), "a", "b")
    assert text.count("this model has positions for 8 tokens") == 2
    with pytest.raises(UserError, match="the message is empty"):
        replace(responder, encoder=_without_prefix(responder.encoder)).answer([], "", SETTINGS)


def _without_prefix(encoder):
    import copy

    twin = copy.copy(encoder)
    twin.prefix_ids = ()
    return twin


def test_the_end_of_the_template_stops_too(tmp_path):
    from finetune.families.family import get_family
    from finetune.models.tiny.checkpoint import build_tiny
    from finetune.tokenizers.encoder import FamilyEncoder
    from finetune.tokenizers.loading import load_tokenizer

    family = get_family("qwen2")
    encoder = FamilyEncoder(load_tokenizer(build_tiny("qwen2", tmp_path / "qwen2"), family), family)
    template = tmp_path / "template.json"
    template.write_text('{"conversation": ["{{user}}", "{{bot}}<|im_end|>"]}')
    encoder.chat_end_ids = ()
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in stop_ids(encoder, load_template("chatml"))
    assert end in stop_ids(encoder, load_template(template))
    encoder.eos_token_id = -1
    assert stop_ids(encoder, load_template("none")) == (-1,)
