"""The server asked by OpenAI's own client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest

from finetune.data.reading.conversation import make_conversation
from finetune.serving.api.gate import Access
from finetune.serving.decoding.settings import DecodingSettings
from tests.serving.api.running import NAME, running

HELLO = [{"role": "user", "content": "hello there"}]
KEY = "sk-long-enough"


@pytest.fixture(params=["served", "served_static"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def client(server):
    return server.client()


def expected(server, conversation, *, sample: int = 0, **settings) -> str:
    """What the responder behind the server answers to a conversation alone, as predict_generation.py does."""
    responder = server.model._responder
    chosen = DecodingSettings(**{"top_k": 0, "temperature": 0.0, "max_new_tokens": 20, **settings})
    prompt = responder.prompt(conversation, chosen)
    return responder.generate([prompt], chosen, samples=[sample])[0]


def chat(client, messages=HELLO, **fields):
    defaults = {"model": NAME, "messages": messages, "max_tokens": 20}
    return client.chat.completions.create(**{**defaults, **fields})


def test_an_answer_is_that_of_the_model_alone(server, client):
    answer = chat(client, temperature=0)
    choice = answer.choices[0]
    assert choice.message.content == expected(server, make_conversation([("hello there", "")]))
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
    assert (answer.object, answer.model) == ("chat.completion", NAME) and answer.id.startswith("chatcmpl-")
    prompt = server.model._responder.prompt(make_conversation([("hello there", "")]), DecodingSettings())
    assert answer.usage.prompt_tokens == len(prompt.input_ids)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (20, 20 + len(prompt.input_ids))


def test_a_conversation_with_a_system_text_and_parts(server, client):
    messages = [
        {"role": "system", "content": "Be long."},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more", "name": "ann"},
    ]
    found = chat(client, messages, temperature=0).choices[0].message.content
    conversation = make_conversation([("hello", "yes"), ("more", "")], "Be long.")
    assert found == expected(server, conversation) != expected(server, replace(conversation, system=None))


def test_a_stream_gives_the_same_text_in_parts(client):
    whole = chat(client, temperature=0)
    parts = list(chat(client, temperature=0, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == "length"
    assert sum(bool(part.choices[0].delta.content) for part in parts) > 2
    assert {part.usage for part in parts} == {None} and len({part.id for part in parts}) == 1


def test_a_stream_ends_with_its_usage_if_asked(client):
    whole = chat(client, temperature=0)
    *parts, last = chat(client, temperature=0, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == whole.usage
    assert all(part.choices and part.usage is None for part in parts)


def test_seed_and_number_decide_a_sample(server, client):
    settings = {"temperature": 1.3, "top_p": 0.9, "seed": 7}
    answers = chat(client, n=3, **settings)
    texts = [choice.message.content for choice in answers.choices]
    conversation = make_conversation([("hello there", "")])
    assert texts == [expected(server, conversation, sample=sample, **settings) for sample in range(3)]
    assert len(set(texts)) == 3 and [choice.index for choice in answers.choices] == [0, 1, 2]
    assert answers.usage.completion_tokens == 60
    assert chat(client, **settings).choices[0].message.content == texts[0]
    negative = chat(client, **settings | {"seed": -(2**63)}).choices[0].message.content
    assert negative == expected(server, conversation, **settings | {"seed": 0})
    free = {chat(client, temperature=1.5).choices[0].message.content for _ in range(3)}
    assert len(free) > 1, "without a seed every answer is another"


def test_several_answers_in_a_stream(client):
    whole = chat(client, n=3, temperature=1.3, seed=7)
    texts = [""] * 3
    for part in chat(client, n=3, temperature=1.3, seed=7, stream=True):
        texts[part.choices[0].index] += part.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_a_stop_string_ends_the_text_in_front_of_it(client):
    text = chat(client, temperature=0).choices[0].message.content
    stop = text[9:12]  # not at the border of a token, or it would be luck
    place = text.index(stop)
    answer = chat(client, temperature=0, stop=[stop, "never"]).choices[0]
    assert (answer.message.content, answer.finish_reason) == (text[:place], "stop")
    parts = list(chat(client, temperature=0, stop=stop, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text[:place]
    assert parts[-1].choices[0].finish_reason == "stop"


def test_the_limit_has_two_names_and_a_default(client):
    assert chat(client, max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens == 3
    answer = chat(client, max_tokens=None, temperature=0)
    assert 20 < answer.usage.completion_tokens <= 200


def test_texts_and_token_ids_are_continued(server, client):
    encoder = server.model._responder.encoder
    ids = [*encoder.prefix_ids, *encoder.encode("hello")]
    fields = {"model": NAME, "max_tokens": 9, "temperature": 0}
    one = client.completions.create(prompt="hello", **fields)
    assert (
        one.choices[0].text
        and one.choices[0].finish_reason == "length"
        and one.usage.prompt_tokens == len(ids)
    )
    assert one.object == "text_completion" and one.id.startswith("cmpl-")
    assert client.completions.create(prompt=ids, **fields).choices[0].text == one.choices[0].text
    both = client.completions.create(prompt=[ids, [5, 6, 7]], n=2, **fields)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices[:2]] == [one.choices[0].text] * 2
    assert both.choices[2].text == both.choices[3].text != one.choices[0].text
    parts = client.completions.create(prompt="hello", stream=True, **fields)
    assert "".join(part.choices[0].text for part in parts) == one.choices[0].text


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "paddle-finetune"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_many_clients_at_once_get_what_each_gets_alone(client):
    fields = [
        {"temperature": 0, "max_tokens": 5}, {"temperature": 1.2, "seed": 3, "max_tokens": 40},
        {"temperature": 0, "max_tokens": 30}, {"temperature": 0.7, "top_p": 0.8, "seed": 4, "max_tokens": 17},
    ] * 3  # fmt: skip
    texts = [f"question {number}" for number in range(len(fields))]

    def ask(number: int) -> str:
        return (
            chat(client, [{"role": "user", "content": texts[number]}], **fields[number])
            .choices[0]
            .message.content
        )

    alone = [ask(number) for number in range(len(fields))]
    with ThreadPoolExecutor(len(fields)) as pool:
        assert list(pool.map(ask, range(len(fields)))) == alone
    assert len(set(alone)) > 6


# What is refused


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"temperature": 2.5}, openai.BadRequestError, "temperature"),
        ({"n": 99}, openai.BadRequestError, "n"),
        ({"max_tokens": 201}, openai.BadRequestError, "max_tokens"),
        ({"messages": [{"role": "user", "content": "long " * 9000}]}, openai.BadRequestError, "messages"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs"),
        ({"extra_body": {"top_k": 5}}, openai.BadRequestError, "top_k"),
    ],
)
def test_errors_have_openais_shape(served, fields, error, param):
    with pytest.raises(error) as caught:
        chat(served.client(), **fields)
    body = caught.value.body
    assert body["param"] == param and body["message"] and body["type"].endswith("_error")
    assert set(body) == {"message", "type", "param", "code"}


def test_a_prompt_beyond_the_models_positions_is_refused(served):
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().completions.create(model=NAME, prompt=[5] * 250, max_tokens=20)
    assert caught.value.code == "context_length_exceeded"
    short = served.client().completions.create(model=NAME, prompt=[5] * 250, temperature=0)
    assert short.usage.completion_tokens <= 6


def test_a_key_is_asked_for(loaded):
    with running(*loaded, access=Access(key=KEY)) as server:
        assert chat(server.client(KEY), max_tokens=1).choices
        for key in ("wrong", "sk-long-enougi", f"{KEY}x"):
            with pytest.raises(openai.AuthenticationError) as caught:
                chat(server.client(key), max_tokens=1)
            assert caught.value.code == "invalid_api_key"
        assert server.ask("GET", "/health")[0] == 200
        assert server.ask("GET", "/v1/models")[0] == 401
        assert server.ask("GET", "/v1/models", Authorization=f"Basic {KEY}")[0] == 401
        assert server.ask("GET", "/v1/models", Authorization=f"bearer {KEY}")[0] == 200
        for _ in range(10):
            server.ask("GET", "/v1/models", Authorization="Bearer guess")
        status, _, headers = server.ask("GET", "/v1/models", Authorization=f"Bearer {KEY}")
        assert status == 429 and headers["retry-after"] == "60"


def test_too_many_requests_are_told_when_to_come_again(loaded, held_steps):
    with running(*loaded, max_rows=1, max_waiting=1) as server, ThreadPoolExecutor(3) as pool:
        client = server.client()
        first, second = (pool.submit(chat, client, max_tokens=5) for _ in range(2))
        server.wait_for_rows(2)
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        patient = pool.submit(chat, server.client(max_retries=5), max_tokens=2)
        held_steps.set()
        assert all(answer.result().choices for answer in (first, second, patient))


def test_an_answer_that_takes_too_long_is_ended(loaded, slow_steps):
    with running(*loaded, request_seconds=0.7) as server:
        fields = {"model": NAME, "messages": HELLO, "temperature": 0}
        status, body, _ = server.ask("POST", "/v1/chat/completions", fields)
        assert status == 504 and body["error"]["code"] == "timeout"
        stream = chat(server.client(), temperature=0, stream=True)
        with pytest.raises(openai.APIError, match="longer than"):
            list(stream)
        server.wait_until_idle()
