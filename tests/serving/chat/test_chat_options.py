"""The command line of the chat page; needs no Gradio."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from finetune.errors import UserError
from finetune.serving.chat import address, run
from finetune.serving.chat.texts import TEXTS, other_language, preferred_language


def parse(*argv):
    return run.parse_options(["--model_name_or_path", "x", *argv])


def test_loopback_unless_asked():
    assert (parse().host, parse().port) == ("127.0.0.1", 7860)
    assert parse("--host", "0.0.0.0").host == "0.0.0.0"
    with pytest.raises(SystemExit):
        parse("--share", "true")


def test_faults_come_before_loading(monkeypatch):
    monkeypatch.setattr(address.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        parse("--second_model", "y", "--lora_path", "z", "--port", "70000").check()
    assert len(error.value.faults) == 3
    for part in ("the page has two columns", "port is 70000", r"pip install '.[chat]'"):
        assert part in str(error.value)


def test_a_taken_port_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"cannot listen on 127\.0\.0\.1 port {port} .*give another --port"
        ):
            run.listen("127.0.0.1", port)


def test_the_second_model_shares_the_settings_but_no_adapter():
    options = parse("--second_model", "y", "--chat_template", "chatml", "--mode", "static")
    assert options.second.model_name_or_path == "y" and options.second.chat_template == "chatml"
    assert options.second.mode is None and parse().second is None


def test_one_control_turns_sampling_on():
    greedy = parse().settings
    assert greedy.is_greedy and not replace(greedy, temperature=0.7).is_greedy
    assert (
        parse("--temperature", "0.7").settings.temperature == 0.7
        and parse("--top_k", "1").settings.top_k == 1
    )


def test_both_languages_have_all_words():
    assert TEXTS["en"].keys() == TEXTS["zh"].keys()
    assert preferred_language("zh-CN,zh;q=0.9,en;q=0.8") == "zh"
    assert preferred_language("de,en;q=0.9,zh;q=0.1") == "en" and preferred_language(None) == "en"
    assert other_language("en") == "zh" and other_language("zh") == "en"


def test_other_machines_need_a_password(monkeypatch, tmp_path):
    monkeypatch.setattr(address.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv(run.PASSWORD.variable, raising=False)
    with pytest.raises(UserError, match=r"open to everyone .* --password_file"):
        parse("--host", "0.0.0.0").check()
    parse().check()
    monkeypatch.setenv(run.PASSWORD.variable, "1234567")
    with pytest.raises(UserError, match="has 7 characters but must have at least 8"):
        parse("--host", "::").check()
    path = tmp_path / "password"
    path.write_text("long enough\n")
    options = parse("--host", "0.0.0.0", "--password_file", str(path))
    options.check()
    assert options.password == "long enough" and "long enough" not in repr(options)


def test_a_name_is_judged_by_the_address_that_it_means(monkeypatch):
    monkeypatch.delenv(run.PASSWORD.variable, raising=False)
    with socket.create_server(("0.0.0.0", 0)) as listener, pytest.raises(UserError, match="open to everyone"):
        parse("--host", "some-name").access(listener)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert not parse("--host", "localhost").access(listener).is_behind_proxy
        access = parse("--host", "localhost", "--allowed_hosts", "a", "B").access(listener)
    assert access.names == {"localhost", "a", "b"} and access.password is None and access.is_behind_proxy


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "must hold one line"), (b"two\nlines", "must hold one line"), (b"\xff\xfe", "is no text file"), (b"x" * 2000, "1 to 1024")],
)  # fmt: skip
def test_a_password_file_that_holds_none(tmp_path, content, words):
    path = tmp_path / "password"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        parse("--password_file", str(path))
    with pytest.raises(UserError, match="is not a file"):
        parse("--password_file", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="is not a file"):
        parse("--password_file", str(tmp_path))


def test_a_password_is_no_word_of_the_command_line(capsys):
    with pytest.raises(SystemExit) as caught:
        run.parse_options(["--model_name_or_path", "model", "--password", "correct horse"])
    told = capsys.readouterr().err
    assert caught.value.code == 2 and "--password_file" in told and "horse" not in told
