"""What people write: argument files, data files, chat templates."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.commands import (
    LINES,
    ROOT,
    arguments,
    finetune,
    stop_at,
)
from tests.fuzz.mutations import (
    BYTE_CHANGES,
    JSON_CHANGES,
    PLACES,
    VALUES,
    WHOLE_CONTENTS,
    change_bytes,
    change_json,
    dump_json,
)

_PATH_WORDS = ("path", "dir", "file", "template", "checkpoint")


def draw_argument_file(good: Path) -> st.SearchStrategy[Any]:
    from finetune.settings.registry import foreign_settings, known_aliases, known_settings
    from finetune.settings.synonyms import known_synonyms

    known = known_settings()
    names = st.sampled_from(
        [*known, *known, *known_aliases(), *foreign_settings(), *known_synonyms(), "unknown", ""]
    )

    def draw_value(name: str) -> st.SearchStrategy[tuple[str, Any]]:
        setting = known.get(name)
        likely = [True, False, 0, 1, -1, 2, 0.5, "1", "auto", "none", None, 3, 1e-9]
        if setting is not None:
            likely += [*setting.choices, *setting.words, setting.default]
        value = st.one_of(st.sampled_from(likely), st.sampled_from(likely), VALUES)
        return st.tuples(st.just(name), value.map(lambda value: _confined(name, value)))

    shipped = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/*_argument.json"))
    return st.fixed_dictionaries(
        {
            "seed": st.sampled_from(["", *shipped]),
            "settings": st.lists(names.flatmap(draw_value), min_size=1, max_size=4),
            "bytes": st.one_of(st.none(), st.none(), st.none(), st.none(), st.none(), BYTE_CHANGES),
            "whole": st.one_of(*[st.none()] * 15, WHOLE_CONTENTS),
            "words": st.one_of(st.just([]), st.just([]), st.lists(names.flatmap(draw_value), max_size=2)),
        }
    )


def _confined(name: str, value: Any) -> Any:
    """Keeps what a case writes inside its folder, and names off the network."""
    if isinstance(value, list):
        return [_confined(name, each) for each in value]
    if isinstance(value, dict):
        return {key: _confined(name, each) for key, each in value.items()}
    if isinstance(value, str) and value and any(word in name for word in _PATH_WORDS):
        return f"./{value.replace('..', '.')}"
    return value


def run_argument_file(good: Path, case: Any, place: Path) -> None:
    settings = arguments(good)
    if case["seed"]:
        shipped = json.loads((ROOT / case["seed"]).read_text(encoding="utf-8"))
        of_several = [name for name in shipped if name.endswith("_degree") or name.startswith("sharding")]
        settings = {name: value for name, value in shipped.items() if name not in of_several} | settings
    content = dump_json(settings | dict(case["settings"]))
    content = change_bytes(content, case["bytes"]) if case["bytes"] else content
    (place / "arguments.json").write_bytes(content if case["whole"] is None else case["whole"])
    words = itertools.chain.from_iterable([f"--{name}", _word(value)] for name, value in case["words"])
    with stop_at("finetune.run.model", "load_base_model", _build_training_arguments):
        finetune(["arguments.json", *words])


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("\0", "")  # which no command line can hold


def _build_training_arguments(args: Any, *_unused: Any) -> None:
    from finetune.run.training_arguments import build_training_arguments

    json.dumps(args.to_json(), ensure_ascii=False).encode()
    build_training_arguments(args)


# Data files


def draw_data_file(_good: Path) -> st.SearchStrategy[Any]:
    alike = st.sampled_from(ROWS).map(lambda row: [row, row])
    rows = st.one_of(alike, alike, st.lists(st.one_of(st.sampled_from(ROWS), VALUES), min_size=1, max_size=4))
    return st.fixed_dictionaries(
        {
            "rows": rows,
            "changes": st.one_of(st.none(), JSON_CHANGES),
            "layout": st.sampled_from(["lines", "lines", "list", "csv", "indented"]),
            "suffix": st.sampled_from([".json", ".jsonl", ".csv", ".txt", ".tsv", ".parquet"]),
            "bytes": st.one_of(st.none(), st.none(), BYTE_CHANGES),
            "whole": st.one_of(*[st.none()] * 15, WHOLE_CONTENTS),
            "settings": st.fixed_dictionaries(
                {
                    "chat_template": st.sampled_from([None, "chatml", "llama2", "alpaca"]),
                    "dataset_format": st.sampled_from([*[None] * 20, *_formats()]),
                    "data_cache": st.sampled_from([False] * 9 + [True]),
                    "zero_padding": st.booleans(),
                    "on_bad_line": st.sampled_from(["error", "skip"]),
                    "preference": st.sampled_from([None, "chosen"]),
                    "truncation": st.sampled_from(["left", "right", "drop", "error"]),
                    "validation_split": st.sampled_from([None, None, 0.5, 1]),
                }
            ),
        }
    )


def _formats() -> tuple[str, ...]:
    from finetune.settings.data import DATASET_FORMATS

    return DATASET_FORMATS


ROWS: list[Any] = [
    *LINES,
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"query": "a", "response": "b", "system": "c"},
    {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"},
                  {"role": "assistant", "content": "c", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[]"},
    {"text": "a text"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}], "rejected": []},
]  # fmt: skip


def run_data_file(good: Path, case: Any, place: Path) -> None:
    rows = change_json(case["rows"], case["changes"]) if case["changes"] else case["rows"]
    rows = rows if isinstance(rows, list) else [rows]
    if case["layout"] == "csv":
        content = b"src,tgt\n" + b"\n".join(dump_json(row) for row in rows)
    elif case["layout"] == "lines":
        content = b"\n".join(dump_json(row) for row in rows)
    else:
        content = json.dumps(rows, indent=1 if case["layout"] == "indented" else None).encode(
            "utf-8", "surrogatepass"
        )
    content = change_bytes(content, case["bytes"]) if case["bytes"] else content
    path = place / f"data{case['suffix']}"
    path.write_bytes(content if case["whole"] is None else case["whole"])
    settings = arguments(good, dataset_name_or_path=str(path), preview=2, **case["settings"])
    (place / "arguments.json").write_bytes(dump_json(settings))
    finetune(["arguments.json"])


# Templates

PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{% if m.role == 'user' %}", "{% else %}", "{% endif %}", "{{ m.content }}",
    "{{ m['content'] | trim }}", "{% set x = 'a' %}", "{% set x = x ~ x %}", "{{ x * 99999999 }}", "{{ raise_exception('no') }}",
    "{% for a in range(99999) %}", "{% macro f() %}{{ f() }}{% endmacro %}", "{{ f() }}", "{{ messages }}", "{{ ''.__class__ }}",
    "{{ loop.index0 }}", "{%- generation -%}", "{%- endgeneration -%}", "{{ bos_token }}", "{{ m.content.split('a')[99] }}",
    "{% include 'x' %}", "{{ 1 / 0 }}", "{{ m.content | center(10**9) }}", "{{ '%9999999d' % 1 }}", "<|im_start|>", "\n", "}}", "{#",
    "{{ (" , ") }}", "{% endset %}", "{% set x %}", "{{ x | tojson }}", "{{ strftime_now('%Y') }}", "{{ namespace(a=1).a }}",
    "{% call f() %}{% endcall %}", "{% filter upper %}", "{% endfilter %}", "{{ ''.join([x] * 99999) }}",
)  # fmt: skip
WHOLE_TEMPLATES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{% endif %}{% endfor %}",
)


def draw_template(_good: Path) -> st.SearchStrategy[Any]:
    free = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
    changed = st.tuples(st.sampled_from(WHOLE_TEMPLATES), PLACES, st.sampled_from(PIECES)).map(_insert)
    source = st.one_of(free, changed, changed)
    return st.tuples(
        source,
        st.sampled_from(["file", "config", "part", "json"]),
        st.one_of(st.none(), st.none(), BYTE_CHANGES),
    )


def _insert(given: tuple[str, float, str]) -> str:
    text, share, piece = given
    ends = [match.end() for match in re.finditer(r"%}|}}|>", text)]
    place = ends[int(share * len(ends))]
    return text[:place] + piece + text[place:]


def run_template(good: Path, case: Any, place: Path) -> None:
    source, where, changes = case
    shutil.copytree(good / "llama", place / "model")
    name, content = "template.jinja", source.encode()
    template: str = "./template.jinja"
    if where == "config":
        path = place / "model" / "tokenizer_config.json"
        path.write_bytes(dump_json(json.loads(path.read_bytes()) | {"chat_template": source}))
        template = "tokenizer"
    elif where in ("part", "json"):
        parts = {"conversation": [source, "{{ bot }}"], "query": source}
        name, content = "template.json", dump_json(parts if where == "part" else {"chat_template": source})
        template = "./template.json"
    (place / name).write_bytes(change_bytes(content, changes) if changes else content)
    settings = arguments(good, model_name_or_path=str(place / "model"), chat_template=template, preview=1)
    (place / "arguments.json").write_bytes(dump_json(settings))
    finetune(["arguments.json"])
