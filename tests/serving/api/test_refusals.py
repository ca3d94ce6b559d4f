"""Requests that are wrong, in every field, and requests that nobody means well."""

from __future__ import annotations

import json
import re
import time
from contextlib import closing

import pytest

from finetune.serving.api import app
from finetune.serving.api.errors import ApiError, InvalidRequest
from finetune.serving.api.fields import parse_object
from finetune.serving.api.gate import Access, Gate
from finetune.serving.api.requests import read_chat, read_completion
from finetune.serving.web import connections
from tests.serving.api.running import NAME, raw, running

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}


def chat(**fields):
    return read_chat({"model": "m", "messages": [USER], **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"model": ""}, {"model": 3}, {"model": None}, {"messages": None}, {"messages": []}, {"messages": "hi"},
        {"messages": ["hi"]}, {"messages": [{}]}, {"messages": [{"role": "user"}]}, {"messages": [{"content": "hi"}]},
        {"messages": [{"role": "robot", "content": "hi"}]}, {"messages": [{"role": "tool", "content": "hi"}]},
        {"messages": [{**USER, "extra": 1}]}, {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
        {"messages": [{"role": "user", "content": ["hi"]}]}, {"messages": [{**USER, "tool_calls": [{}]}]},
        {"messages": [USER, {"role": "assistant", "content": "yes"}]},
        {"messages": [{"role": "system", "content": "s"}]},
        {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 1.5}, {"max_tokens": "5"}, {"max_tokens": True},
        {"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 10**400},
        {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": "hot"}, {"temperature": False}, {"top_p": 1.1},
        {"n": 0}, {"n": 2.0}, {"seed": 2**63}, {"seed": 0.5}, {"stop": 5}, {"stop": ""}, {"stop": ["a", ""]},
        {"stop": list("abcde")}, {"stop": [1]}, {"stop": "x" * 501}, {"stream": "yes"}, {"stream": 1},
        {"stream_options": {}}, {"stream": True, "stream_options": 3},
        {"stream": True, "stream_options": {"include_usage": 1}}, {"stream": True, "stream_options": {"more": True}},
        {"logprobs": True}, {"top_logprobs": 2}, {"frequency_penalty": 0.5}, {"presence_penalty": -1},
        {"logit_bias": {"5": 1}}, {"response_format": {"type": "json_object"}}, {"tools": [{}]}, {"functions": [{}]},
        {"tool_choice": "required"}, {"modalities": ["audio"]}, {"store": True}, {"service_tier": "flex"},
        {"best_of": 2}, {"prompt": "hi"}, {"top_k": 5}, {"unknown": 1},
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_chat_is_named(fields):
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert re.split(r"[.\[]", caught.value.param)[0] in fields
    assert caught.value.body()["error"]["message"] and len(caught.value.message) < 400


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": None}, {"prompt": []}, {"prompt": 5}, {"prompt": [[]]}, {"prompt": ["a", 5]}, {"prompt": [[1, "a"]]},
        {"prompt": [True]}, {"prompt": [1.5]}, {"prompt": {"a": 1}}, {"echo": True}, {"suffix": "x"}, {"logprobs": 0},
        {"best_of": 3}, {"messages": [USER]}, {"max_completion_tokens": 5},
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_completion_is_named(fields):
    with pytest.raises(InvalidRequest) as caught:
        read_completion({"model": "m", "prompt": "hi", **fields})
    assert caught.value.param in fields


def test_what_changes_nothing_passes():
    wishes, conversation = chat(
        user="me", metadata={"a": "b"}, store=False, logprobs=False, top_logprobs=None, tools=[], tool_choice="none",
        response_format={"type": "text"}, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, n=None, stop=None,
        parallel_tool_calls=True, service_tier="auto", stream=None, stream_options=None, modalities=["text"],
    )  # fmt: skip
    assert wishes.num_answers == 1 and wishes.stop == () and wishes.max_tokens is None and not wishes.streams
    assert wishes.temperature is None and conversation.turns[-1].prompt == "hi"
    read_completion({"model": "m", "prompt": [1, 2], "echo": False, "best_of": 1, "suffix": ""})


def test_settings_that_leave_one_token_are_greedy():
    assert chat(top_p=0, temperature=1)[0].temperature == 0
    assert chat(temperature=1e-30)[0].temperature == 0
    assert chat(temperature=0.01)[0].temperature == 0.01


def test_messages_are_put_in_order_as_in_training_data():
    messages = [{"role": "developer", "content": "s"}, USER, USER, {"role": "assistant", "content": None}]
    with pytest.raises(InvalidRequest, match="content"):
        chat(messages=messages)
    messages[-1]["content"] = "a"
    conversation = chat(messages=[*messages, USER])[1]
    assert conversation.system == "s"
    assert [turn.prompt for turn in conversation.turns] == ["hi\nhi", "hi"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"3", b'"a"', b"null", b"\xff\xfe{}", b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}', b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a":' * 100_000, b"{} {}", b"\xef\xbb\xbf{}",
    ],
)  # fmt: skip
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(InvalidRequest):
        parse_object(body)


def test_pairs_of_surrogates_are_characters():
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


# Over a connection


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"model": "\\ud800"}',
        b"[" * 200_000,
        b'{"model": {"a": 1}}',
        json.dumps({"\x00": "x"}).encode(),
    ],
)
def test_a_bad_body_gets_an_error_and_the_next_request_an_answer(served, path, body):
    status, answer, _ = served.ask("POST", path, body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    assert served.ask("GET", "/health")[:2] == (200, {"status": "ok"})


@pytest.mark.parametrize("text", ["\x00", "😀" * 50, "\ufffd\u200b\u2028", "<s></s><|im_end|>", "A" * 20_000])
def test_strange_texts_are_answered_or_too_long(served, text):
    fields = {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 2}
    status, answer, _ = served.ask("POST", CHAT, fields)
    assert status == 200 or answer["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("prompt", [[-1], [10**9], [2**70], ""])
def test_ids_that_the_model_does_not_have_are_refused(served, prompt):
    status, answer, _ = served.ask("POST", COMPLETION, {"model": NAME, "prompt": prompt, "max_tokens": 2})
    # The empty text still has the token that opens a text.
    assert status == (200 if prompt == "" else 400), answer


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/docs", 404), ("GET", CHAT, 405), ("POST", "/v1/models", 405), ("PUT", "/health", 405),
     ("POST", "/v1/embeddings", 404), ("POST", "/v1/chat/completions/", 404), ("GET", "/v1/models/a%2F..%2Fb", 404)],
)  # fmt: skip
def test_other_paths_are_closed(served, method, path, status):
    found, answer, _ = served.ask(method, path)
    assert found == status and answer["error"]["message"]


def test_a_long_body_is_not_read(served):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**9}\r\n\r\n"
    with closing(raw(served.port, head.encode())) as connection:
        assert b" 413 " in connection.recv(100)
    chunked = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with closing(raw(served.port, chunked)) as connection:
        for _ in range(40):
            try:
                connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            except OSError:  # it has been closed already
                break
        assert b" 413 " in connection.recv(100)


def test_slow_connections_are_closed(served, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(connections, "REQUEST_HEAD_SECONDS", 0.3)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{{"
    with closing(raw(served.port, head.encode())) as connection:
        assert b" 408 " in connection.recv(100)
    for data in (b"", b"POST / HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "):
        begin = time.monotonic()
        with closing(raw(served.port, data)) as connection:
            assert connection.recv(100) == b"" and time.monotonic() - begin < 10
    # The head of a second request, too.
    with closing(raw(served.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")) as connection:
        assert b" 200 " in connection.recv(10_000)
        connection.sendall(b"GET /hea")
        while connection.recv(10_000):
            pass


def test_what_is_no_http_is_refused(served):
    with closing(raw(served.port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n")) as connection:
        assert b" 400 " in connection.recv(100)


def test_other_names_and_web_pages_are_kept_out(served):
    for name in ("evil.example", "localhost.evil.example", ""):
        assert served.ask("GET", "/v1/models", Host=name)[0] == 403
    assert served.ask("GET", "/v1/models", Host="localhost:1")[0] == 200
    for origin in ("http://evil.example", "null"):
        assert served.ask("POST", CHAT, b"{}", Origin=origin)[0] == 403
    assert served.ask("POST", CHAT, b"{}", Origin=f"http://127.0.0.1:{served.port}")[0] == 400


def test_a_key_of_any_characters_is_compared_whole():
    gate = Gate(None, Access(key="schlüssel-钥匙"))
    for given in ("Bearer schlüssel", "Bearer schl", "schlüssel-钥匙"):
        with pytest.raises(ApiError):
            gate._check_key(given.encode().decode("latin-1"), "1.2.3.4")
    gate._check_key("Bearer schlüssel-钥匙".encode().decode("latin-1"), "1.2.3.4")
    assert "schl" not in repr(Access(key="schlüssel-钥匙"))


def test_without_a_template_only_single_messages_are_answered(sharp_llama):
    from tests.serving.api.running import load

    with running(*load(sharp_llama, chat_template="none")) as server:
        messages = [USER, {"role": "assistant", "content": "a"}, USER]
        assert server.ask("POST", CHAT, {"model": NAME, "messages": [USER], "max_tokens": 2})[0] == 200
        status, answer, _ = server.ask("POST", CHAT, {"model": NAME, "messages": messages})
        assert status == 400 and "chat template" in answer["error"]["message"]
