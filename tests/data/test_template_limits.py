"""Templates that go on without end, fill memory or nest without end are stopped; others are rendered as before."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
from jinja2 import Environment

from finetune.data.reading.conversation import make_conversation
from finetune.data.templates import template_rendering
from finetune.data.templates.jinja_environment import CHAT, PART, make_environment
from finetune.data.templates.jinja_templates import JinjaTemplate
from finetune.data.templates.template import load_template
from finetune.data.templates.template_rendering import MAX_SECONDS, Renderer, RenderError, SourceError
from finetune.data.templates.template_syntax import is_linear
from finetune.errors import UserError

GOOD = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
TIME, MEMORY = r"takes more than [\d.]+ s of computing", "needs more than 1024 MB of memory"
EITHER = f"{TIME}|{MEMORY}"
DOUBLED = (
    "{% set ns = namespace(a='x', b='x') %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
)
HOSTILE = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TIME),
    "loops that give nothing": (
        "{% for a in range(99999) %}{% for b in range(99999) if 0 %}{% endfor %}{% endfor %}",
        TIME,
    ),
    "product": ("{% set x = 'a' * 10**12 %}", MEMORY),
    "product of lists": ("{{ ([1] * 10**10) | length }}", MEMORY),
    "power": ("{{ 10**(10**10) }}", EITHER),
    "sum": (
        "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        EITHER,
    ),
    "join": (
        "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        EITHER,
    ),
    "block": (
        "{% set a0 = 'x' %}"
        + "".join(f"{{% set a{i} %}}{{{{ a{i - 1} }}}}{{{{ a{i - 1} }}}}{{% endset %}}" for i in range(1, 60))
        + "{{ a59 }}",
        EITHER,
    ),
    "doubled lists written": (f"{DOUBLED}{{{{ ns.a }}}}", EITHER),
    "doubled lists as JSON": (f"{DOUBLED}{{{{ ns.a | tojson }}}}", EITHER),
    "doubled lists compared": (
        DOUBLED + DOUBLED.replace("ns", "other") + "{{ ns.a == other.a }}",
        TIME,
    ),
    "width of a format": ("{{ '%1000000000000d' % 1 }}", MEMORY),
    "width of a filter": ("{{ 'a' | center(10**12) }}", MEMORY),
    "width of a method": ("{{ 'a'.ljust(10**12) }}", MEMORY),
    "width of a call": ("{{ '{:1000000000000}'.format(1) }}", MEMORY),
    "many replacements": ("{{ 'a' * 10**5 | int }}{{ ('a' * 10**5).replace('', 'b' * 10**6) }}", MEMORY),
    "many digits": ("{{ 1.5 | round(10**9, 'ceil') }}", EITHER),
    "made-up text": ("{{ lipsum(n=10**8) }}", EITHER),
    "long text": ("{{ 'a' * 10**7 }}", r"writes 100000\d\d characters, more than 200\d{4}:"),
    "macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too often"),
    "macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        TIME,
    ),
    "loop within itself": (
        "{% for a in [messages] recursive %}{{ loop([messages]) }}{% endfor %}",
        "calls itself too often",
    ),
    "parentheses": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deep"),
    "conditions": ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nested too deep"),
    "lists": ("{{ " + "[" * 90 + "]" * 90 + " }}", "nested too deep|no valid jinja"),
    "long sum": ("{{ 1" + " + 1" * 5000 + " }}", "nested too deep"),
    "long number": ("{{ " + "9" * 900_000 + " }}", "no valid jinja"),
    "long source": ("x" * 1_000_001, r"it has 10000\d\d characters, more than 1000000"),
}


PARTS = ("loops", "product", "macro that calls itself", "parentheses", "long text", "long source")
"""Those that are tried as a part of PaddleNLP's file too."""


@pytest.fixture
def little_time(monkeypatch):
    """Less than there is, to save time here; MAX_SECONDS itself is short enough."""
    assert MAX_SECONDS <= 2
    monkeypatch.setattr(template_rendering, "MAX_SECONDS", 0.3)


@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, ".jinja") for name in HOSTILE), *((name, ".json") for name in PARTS)]
)
@pytest.mark.usefixtures("little_time")
def test_a_hostile_template_ends_in_a_message(tmp_path, name, suffix):
    source, message = HOSTILE[name]
    path = tmp_path / f"template{suffix}"
    content = json.dumps({"conversation": [source, "{{ bot }}"]}) if suffix == ".json" else source + GOOD
    path.write_text(content)
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        load_template(path)
    assert str(path) in str(caught.value)
    assert time.monotonic() - start < 30  # of a loaded machine; the limit counts computing
    assert len(str(caught.value)) < 1000


@pytest.mark.usefixtures("little_time")
def test_others_are_rendered_after_it():
    renderer = Renderer(GOOD, "good", CHAT)
    for source in (HOSTILE["loops"][0], HOSTILE["product"][0]):
        with pytest.raises(UserError, match="hostile: the template "):
            Renderer(source, "hostile", CHAT).render({})
        assert renderer.render({"messages": [{"content": "你好 😀"}]}) == "<s>你好 😀</s>"


@pytest.mark.usefixtures("little_time")
def test_a_template_that_waits_for_its_time(tmp_path):
    source = "{% if messages | length > 6 %}" + HOSTILE["loops"][0] + "{% endif %}" + GOOD
    template = JinjaTemplate(source, "t", {})
    template.render(make_conversation([("q", "a")]))
    with pytest.raises(UserError, match=f"t: the template {TIME}: give chat_template another name or file"):
        template.render(make_conversation([("q", "a")] * 4))


def test_many_messages_have_the_time_they_need():
    template = JinjaTemplate(GOOD, "t", {})
    pieces = template.render(make_conversation([("q", "a")] * 200))
    assert sum(piece.learned for piece in pieces) == 600  # <s>, each answer, </s>
    assert "".join(piece.text for piece in pieces) == "<s>q</s><s>a</s>" * 200


def test_threads_get_their_own_texts():
    renderer = Renderer("{% for a in x %}{{ a }},{% endfor %}", "t", CHAT)
    faults = []

    def render(first):
        for number in range(200):
            text = renderer.render({"x": [first, number]})
            if text != f"{first},{number},":
                faults.append(text)

    threads = [threading.Thread(target=render, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_a_forked_process_renders_in_its_own():
    renderer = Renderer("{% for a in x %}{{ a }}{% endfor %}", "t", CHAT)
    worker = template_rendering._WORKER._process
    pid = os.fork()
    if not pid:
        own = renderer.render({"x": [1]}) == "1" and template_rendering._WORKER._process is not worker
        os._exit(0 if own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert renderer.render({"x": [2]}) == "2"
    assert template_rendering._WORKER._process is worker


def test_an_interruption_does_not_mix_up_answers(monkeypatch):
    renderer = Renderer("{% for a in x %}{{ a }}{% endfor %}", "t", CHAT)

    def interrupt(*_unused):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(template_rendering.select, "select", interrupt)
        with pytest.raises(KeyboardInterrupt):
            renderer.render({"x": ["first"]})
    assert renderer.render({"x": ["second"]}) == "second"


def test_a_killed_process_is_told_and_replaced():
    renderer = Renderer("{% for a in x %}{{ a }}{% endfor %}", "t", CHAT)
    os.kill(template_rendering._WORKER._process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="t: the template ended the process that renders it: SIGKILL"):
        renderer.render({"x": [1]})
    assert renderer.render({"x": [1]}) == "1"


def test_faults_of_a_template_are_told_alike_in_both_places():
    for source in ("{{ 1 + 'a' }}", "{{ raise_exception('no') }}", "{{ x.y.z }}"):
        here, there = (
            Renderer(source, "t", PART),
            Renderer(source + "{% for a in [] %}{% endfor %}", "t", PART),
        )
        assert here._template is not None and there._template is None
        reasons = []
        for renderer in (here, there):
            with pytest.raises(RenderError) as caught:
                renderer.render({"x": 1})
            reasons.append(str(caught.value))
        assert reasons[0] == reasons[1]
    with pytest.raises(SourceError, match="line 2: No filter named 'nonsense'"):
        Renderer("{% for a in [] %}{% endfor %}\n{{ 1 | nonsense }}", "t", CHAT)


LINEAR = [
    "{{ user }}",
    "{% if index == 0 and system is defined %}{{ system | trim }}\n{% elif is_last %}x{% endif %}",
    "{{ user.strip() ~ '</s>' + (bot | default('')) }}{{ user[1:-1] }}",
    "{{ raise_exception('no') if not user else user }}",
]
NOT_LINEAR = [
    "{% for a in user %}{% endfor %}",
    "{% set a = user %}",
    "{{ user * 2 }}",
    "{{ user % 2 }}",
    "{{ 2 ** index }}",
    "{{ user | replace('a', 'aa') }}",
    "{{ user | center(9) }}",
    "{{ user.replace('a', 'aa') }}",
    "{{ user.format(1) }}",
    "{{ user.strip }}{{ lipsum() }}",
    "{% macro f() %}{% endmacro %}",
    "{{ " + "not " * 60 + "user }}",
    "{% filter upper %}{% endfilter %}",
    "{% include 'x' %}",
]


@pytest.mark.parametrize("source", LINEAR)
def test_what_is_linear_gives_the_same_text_in_both_places(source):
    tree = Environment().parse(source)
    assert is_linear(tree)
    values = {"user": " u ", "bot": "b", "index": 0, "system": " s "}
    there = Renderer(source + "{% for a in [] %}{% endfor %}", "t", PART)
    assert Renderer(source, "t", PART).render(values | {"user": "u"}) == there.render(values | {"user": "u"})


@pytest.mark.parametrize("source", NOT_LINEAR)
def test_what_may_grow_is_not_linear(source):
    assert not is_linear(make_environment().parse(source))


def test_the_folder_that_a_command_starts_in_does_not_matter(tmp_path, monkeypatch):
    template_rendering._WORKER.forget()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert Renderer("{% for a in x %}{{ a }}{% endfor %}", "t", CHAT).render({"x": [1]}) == "1"


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(r"{{ '\ud800' }}", id="rendered here"),
        pytest.param(r"{% for m in [1] %}{{ '\ud800' }}{% endfor %}", id="rendered in the worker"),
        pytest.param("{% for m in [1] %}{{ '%c' % 55296 }}{% endfor %}", id="by a format"),
    ],
)
def test_half_a_surrogate_pair_is_an_error_of_the_template(source: str) -> None:
    with pytest.raises(RenderError, match=r"writes \\ud800, half of a surrogate pair"):
        Renderer(source, "t.jinja", CHAT).render({})
