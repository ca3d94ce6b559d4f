"""Clients that leave, a server that ends, a model that fails."""

from __future__ import annotations

import json
import time
from contextlib import closing

import pytest

from finetune.serving.batching.dynamic_batch import DynamicBatch
from tests.serving.api.running import NAME, raw, running

FIELDS = {
    "model": NAME,
    "messages": [{"role": "user", "content": "hello"}],
    "temperature": 0,
    "max_tokens": 20,
}


def post(port, **fields):
    body = json.dumps({**FIELDS, **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return raw(port, head.encode() + body)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(loaded, held_steps, stream):
    with running(*loaded, max_rows=2) as server:
        with (
            closing(post(server.port, stream=stream, n=2)) as running_rows,
            closing(post(server.port)) as waiting,
        ):
            server.wait_for_rows(3)
            waiting.close()
            server.wait_for_rows(2)
            running_rows.close()
        held_steps.set()
        server.wait_until_idle()
        assert server.ask("POST", "/v1/chat/completions", FIELDS)[0] == 200


def test_a_client_that_leaves_before_its_stream_begins_frees_its_place(loaded, held_steps):
    with running(*loaded, max_rows=1) as server, closing(post(server.port)):
        server.wait_for_rows(1)
        with closing(post(server.port, stream=True)):
            server.wait_for_rows(2)
        server.wait_for_rows(1)
        held_steps.set()


def test_the_end_waits_for_answers_and_refuses_new_ones(loaded, held_steps, capfd):
    with running(*loaded) as server:
        whole = server.client().chat.completions
        stream = iter(whole.create(**FIELDS, stream=True))
        text = next(stream).choices[0].delta.content or ""
        server.server.handle_exit(15, None)
        while not server.gate.is_closing:
            time.sleep(0.01)
        for path in ("/health", "/v1/models"):
            status, answer, headers = server.ask("GET", path)
            assert status == 503 and answer["error"]["code"] == "shutting_down" and headers["retry-after"]
        assert server.thread.is_alive()
        held_steps.set()
        parts = list(stream)
        text += "".join(part.choices[0].delta.content or "" for part in parts)
        assert parts[-1].choices[0].finish_reason == "length" and len(text) > 10
        server.thread.join(20)
        assert not server.thread.is_alive() and not server.server.has_failed
    told = capfd.readouterr().err
    assert "stopping: 1 request is finished first" in told and "Traceback" not in told and "ERROR" not in told


def test_the_end_does_not_wait_for_ever(loaded, slow_steps, capfd):
    with (
        running(*loaded, drain_seconds=0.5) as server,
        closing(post(server.port, stream=True, max_tokens=200)) as stream,
        closing(post(server.port, max_tokens=200)) as whole,
    ):
        server.wait_for_rows(2)
        begin = time.monotonic()
        server.server.handle_exit(15, None)
        server.thread.join(20)
        assert 0.4 < time.monotonic() - begin < 8 and not server.thread.is_alive()
        told = b"".join(iter(lambda: stream.recv(10_000), b""))
        assert b"shutting down" in told and b"[DONE]" not in told
        assert b" 503 " in whole.recv(10_000)
    told = capfd.readouterr().err
    assert "Traceback" not in told and "ERROR" not in told


def test_a_failure_is_told_to_its_client_and_to_the_log(loaded, monkeypatch, capfd):
    step = DynamicBatch.step

    def fail(batch):
        if any(len(row.tokens) >= 7 and row.settings.max_new_tokens == 13 for row in batch.rows):
            raise RuntimeError("a secret of the machine")
        return step(batch)

    monkeypatch.setattr(DynamicBatch, "step", fail)
    with running(*loaded) as server:
        whole = server.ask("POST", "/v1/chat/completions", FIELDS)[1]["choices"][0]["message"]["content"]
        with closing(post(server.port, max_tokens=13)) as bad, closing(post(server.port)) as good:
            assert json.loads(_body(good))["choices"][0]["message"]["content"] == whole
            answer = json.loads(_body(bad))["error"]
            assert answer["code"] == "model_failed" and "secret" not in answer["message"]
        with closing(post(server.port, max_tokens=13, stream=True)) as bad:
            events = [part for part in _body(bad).decode().split("\n\n") if "data:" in part]
            assert '"code": "model_failed"' in events[-1] or '"model_failed"' in events[-1]
        assert server.ask("GET", "/health")[0] == 200
    assert "a secret of the machine" in capfd.readouterr().err


def test_a_server_without_its_thread_ends_with_a_failure(loaded):
    with running(*loaded) as server:
        server.engine.close(timeout=30)
        server.thread.join(20)
        assert not server.thread.is_alive() and server.server.has_failed


def _body(connection) -> bytes:
    """The body of an answer: by its length, or to the end of its chunks."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(10_000)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), None
    )
    while (len(body) < length) if length is not None else not body.endswith(b"0\r\n\r\n"):
        body += connection.recv(10_000)
    return body
