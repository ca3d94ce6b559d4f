"""Templates that do something to the texts of messages: what is written and learned is what jinja makes of them."""

from __future__ import annotations

import pytest

from finetune.data.reading.conversation import make_conversation
from finetune.data.templates.jinja_environment import CHAT, make_environment
from finetune.data.templates.jinja_templates import JinjaTemplate
from finetune.data.templates.pieces import RefusedConversationError
from finetune.data.templates.text_conditions import find_conditions

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ANY = [
    "m.content", "m.content.strip()", "m.content.lstrip()", "m.content.rstrip()", "m.content | trim",
    "m['content'].strip('\\n')", "m.content.lstrip('\\n').rstrip(' ')", "m.content.rstrip('x')",
    "m.content.replace('\\n\\n', '\\n')", "m.content | replace('  ', ' ')", "m.content | string | trim",
    "m.content.split('</think>')[-1]", "m.content if m.content else '-'", "m.content if m.content | trim else '-'",
]  # fmt: skip
USERS = [
    "m.content | upper", "m.content.title()", "m.content[:4]", "m.content[1:]", "m.content | truncate(5, true, '')",
    "m.content | tojson", "m.content.split('\\n') | join(' / ')", "'same' if m.content == 'q' else m.content",
    "m.content | length ~ m.content", "m.content.startswith('q') ~ m.content", "m.content.replace('q', 'Q')",
    "'in' if m.content in ['q', 'q2'] else m.content", "m.content | indent(2)", "'%s!' | format(m.content)",
]  # fmt: skip
SOURCES = [*ANY, *(f"({each}) if m.role == 'user' else m.content" for each in USERS)]
TEXTS = [
    "q",
    "",
    " ",
    "\n",
    " q",
    "q\n",
    "\n\n q \n",
    "a  b\n\nc",
    "x",
    "line\nline ",
    "q</s>",
    '"q"',
    "\u3000q\u3000",
]
WRITTEN = (
    "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ {} }}}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


def text_of(pieces, *, learned=None):
    return "".join(piece.text for piece in pieces if learned in (None, piece.learned))


def expect(source, turns, system=None):
    """What jinja writes, and the part of it that answers add."""
    template = make_environment(CHAT).from_string(source)
    messages = [] if system is None else [{"role": "system", "content": system}]
    written, learned = "", ""
    for prompt, answer in turns:
        messages.append({"role": "user", "content": prompt})
        asked = template.render(messages=messages, add_generation_prompt=True, **TOKENS)
        messages.append({"role": "assistant", "content": answer})
        written = template.render(messages=messages, add_generation_prompt=False, **TOKENS)
        learned += written.removeprefix(asked).removesuffix("\n")
    return written, learned


@pytest.mark.parametrize("changed", SOURCES)
def test_texts_are_written_and_learned_as_jinja_writes_them(changed):
    source = WRITTEN.format(changed)
    template = JinjaTemplate(source, "t", TOKENS, ["<|im_start|>", "<|im_end|>"])
    for text in TEXTS:
        for turns in ([(text, "a")], [("q", text)], [(text, text), ("q2", "a2 ")]):
            written, learned = expect(source, turns, "\ns ")
            try:
                pieces = template.render(make_conversation(turns, "\ns "))
            except RefusedConversationError:
                # Only answers are refused, and only where letters of them would be other ones.
                assert "".join(turns[0][1].split()) not in "".join(learned.split())
                continue
            assert (text_of(pieces), text_of(pieces, learned=True)) == (written, learned)
            assert all(piece.text in ("<|im_start|>", "<|im_end|>") for piece in pieces if piece.special)


@pytest.mark.parametrize("changed", SOURCES)
def test_prompts_are_written_as_jinja_writes_them(changed):
    source = WRITTEN.format(changed)
    template = JinjaTemplate(source, "t", TOKENS, ["<|im_start|>", "<|im_end|>"])
    jinja = make_environment(CHAT).from_string(source)
    for text in TEXTS:
        pieces = template.render_prompt(make_conversation([(text, "a "), (text, "never looked at")]))
        messages = [
            {"role": role, "content": content}
            for role, content in [("user", text), ("assistant", "a "), ("user", text)]
        ]
        assert text_of(pieces) == jinja.render(messages=messages, add_generation_prompt=True, **TOKENS)


@pytest.mark.parametrize(
    ("changed", "answer"),
    [("m.content.replace('cat', 'dog')", "a cat"), ("m.content.split('|')[0]", "a|b"), ("m.content[:20]", "a" * 21)],
)  # fmt: skip
def test_answers_whose_letters_are_changed_are_refused_one_by_one(changed, answer):
    template = JinjaTemplate(WRITTEN.format(changed), "t", TOKENS)
    assert text_of(template.render(make_conversation([("q", "a")])), learned=True) == "a<|im_end|>"
    with pytest.raises(RefusedConversationError, match="it changes the text of an answer"):
        template.render(make_conversation([("q", answer)]))


@pytest.mark.parametrize(
    ("source", "text", "is_placed"),
    [
        ("{{ m.content }}", " x ", True),
        ("{{ m.content }}", "", False),
        ("{{ m.content.strip() }}", "a b", True),
        ("{{ m.content.strip() }}", "a b ", False),
        ("{{ m.content.rstrip('.') }}", "a.", False),
        ("{% if '</t>' in m.content %}{{ m.content.split('</t>')[-1].strip() }}{% endif %}", "a", True),
        ("{% if '</t>' in m.content %}{{ m.content.split('</t>')[-1] }}{% endif %}", "b</t>a", False),
        ("{{ m.content.split()[0] }}", "a", False),
        ("{{ m.content[0] }}", "a", False),
        ("{% if '</t>' in m.content %}{{ m.content.split('</t>') }}{% endif %}", "a", True),
        ("{% set c = m.content %}{{ c.replace('a', 'b') }}", "c", True),
        ("{% set c = m.content %}{{ c.replace('a', 'b') }}", "a", False),
        ("{% set r = m.role %}{{ r.upper() ~ m['role'] | title }}{{ m.content }}", "a", True),
        ("{% if m.role == 'user' %}{{ m.content }}{% endif %}", "user", True),
        ("{% if m.content == 'user' %}{{ m.content }}{% endif %}", "user", False),
        ("{% for x in messages[1:] %}{{ x.content if loop.index0 % 2 == 0 }}{% endfor %}", "a", True),
        ("{{ tools | tojson }}{{ m | tojson }}", "a", False),
        ("{% filter upper %}{{ m.content }}{% endfilter %}", "a", False),
    ],
)  # fmt: skip
def test_which_texts_a_template_places_as_they_are(source, text, is_placed):
    assert find_conditions(make_environment(CHAT).parse(source)).hold(text) is is_placed
