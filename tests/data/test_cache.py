"""Tokenized data on disk: the same again, noticed when damaged, and made once by several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from finetune.data.samples import cache
from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.samples.cache import EncodedData, load_or_build, make_key
from finetune.data.samples.data_report import DataReport
from finetune.data.samples.tokenize import Prompt
from finetune.data.templates.template import load_template
from finetune.data.templates.template_clock import set_day
from finetune.errors import UserError
from finetune.run.data_cache import find_key
from tests.conftest import ROOT, write_arguments


@pytest.fixture
def data(encoder, conversation) -> EncodedData:
    builder = BulkBuilder(encoder, load_template(None), src_length=5, max_length=9)
    store = builder.build([conversation(("上衣", "b")), conversation(("c" * 20, "de"))], pytest.fail)
    prompt = Prompt(np.array([1, 70000], np.int32), "源", "目标", truncated_source=True, num_dropped_rounds=2)
    report = DataReport(
        files=("a.json",), num_lines=3, num_samples=2, num_dropped=Counter({"x": 1}), first_fault="瑕"
    )
    return EncodedData({"train": store}, {"dev": [prompt]}, {"train": report})


def refuse() -> EncodedData:
    raise AssertionError("the entry was made anew")


def check_same(found: EncodedData, data: EncodedData) -> None:
    assert found.reports == data.reports
    assert isinstance(found.reports["train"].num_dropped, Counter)
    assert list(found.stores) == ["train"]
    for sample, expected in zip(found.stores["train"], data.stores["train"], strict=True):
        assert sample.input_ids.tolist() == expected.input_ids.tolist()
        assert sample.labels.tolist() == expected.labels.tolist()
        assert sample.truncated_source == expected.truncated_source
    (prompt,), (expected_prompt,) = found.prompts["dev"], data.prompts["dev"]
    assert prompt.input_ids.tolist() == expected_prompt.input_ids.tolist()
    assert prompt.input_ids.dtype == np.int32
    assert (prompt.source, prompt.target, prompt.num_dropped_rounds) == ("源", "目标", 2)


def test_an_entry_is_made_once(tmp_path, data):
    assert load_or_build(tmp_path / "new" / "folder", "key", lambda: data) is data
    check_same(load_or_build(tmp_path / "new" / "folder", "key", refuse), data)


@pytest.mark.parametrize("suffix", ["bin", "json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "gone"])
def test_damage_is_noticed(tmp_path, data, suffix, damage):
    load_or_build(tmp_path, "key", lambda: data)
    path = tmp_path / f"key.{suffix}"
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "cut": content[:-1] if suffix == "bin" else content[:middle],
        "changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
    }
    path.unlink() if damage == "gone" else path.write_bytes(damaged[damage])
    made = []
    assert load_or_build(tmp_path, "key", lambda: made.append(1) or data) is data
    assert made
    check_same(load_or_build(tmp_path, "key", refuse), data)


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, data, capsys):
    (tmp_path / "file").write_text("")
    assert load_or_build(tmp_path / "file" / "cache", "key", lambda: data) is data
    assert "cannot be written" in capsys.readouterr().err


def test_errors_of_the_data_pass_through_and_leave_nothing(tmp_path):
    def fail() -> EncodedData:
        raise ValueError("bad line")

    with pytest.raises(ValueError, match="bad line"):
        load_or_build(tmp_path, "key", fail)
    assert not list(tmp_path.glob("key.[bj]*"))


def test_old_entries_are_removed(tmp_path, data):
    for key in ("old", "used"):
        load_or_build(tmp_path, key, lambda: data)
        long_ago = time.time() - 31 * 86_400
        os.utime(tmp_path / f"{key}.json", (long_ago, long_ago))
    load_or_build(tmp_path, "used", refuse)
    load_or_build(tmp_path, "new", lambda: data)
    assert {path.stem for path in tmp_path.glob("*.*")} == {"used", "new"}


WORKER = """
import sys, time
from pathlib import Path
from finetune.data.samples.cache import EncodedData, load_or_build
from finetune.data.samples.data_report import DataReport
folder, name = Path(sys.argv[1]), sys.argv[2]
def build():
    (folder / f"built-{name}").touch()
    time.sleep(1)
    return EncodedData(reports={"train": DataReport(num_lines=7)})
print(load_or_build(folder / "cache", "key", build).reports["train"].num_lines)
"""


def start(folder, name):
    command = [sys.executable, "-c", WORKER, str(folder), name]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_one_process_prepares_and_the_other_waits(tmp_path):
    workers = [start(tmp_path, name) for name in "ab"]
    assert [worker.communicate(timeout=60)[0].strip() for worker in workers] == ["7", "7"]
    assert len(list(tmp_path.glob("built-*"))) == 1


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    first = start(tmp_path, "a")
    while not (tmp_path / "built-a").exists() and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert start(tmp_path, "b").communicate(timeout=60)[0].strip() == "7"
    assert (tmp_path / "built-b").exists()


# --- the key ---


@pytest.fixture
def arguments(tmp_path, small_data, tiny_llama):
    from finetune.settings.arguments import parse_arguments

    def parse(**settings):
        path = write_arguments(
            tmp_path / "args.json",
            model_name_or_path=str(tiny_llama),
            output_dir=str(tmp_path / "out"),
            **{
                "dataset_name_or_path": str(small_data),
                **{"do_train": True, "src_length": 96, "max_length": 160, "device": "cpu"},
            }
            | settings,
        )
        return parse_arguments([str(path)])

    return parse


def key_of(args, folder):
    from finetune.run.data import find_files

    return find_key(args, find_files(args), folder)


def test_the_key_follows_what_decides_the_samples(arguments, tiny_llama):
    base = key_of(arguments(), tiny_llama)
    assert key_of(arguments(learning_rate=1e-3, zero_padding=True), tiny_llama) == base
    others = [
        {"max_length": 161},
        {"src_length": 95},
        {"chat_template": "llama2"},
        {"truncation": "drop"},
        {"train_on": "last"},
        {"system": "s"},
        {"seed": 7},
        {"max_train_samples": 5},
        {"do_eval": True},
    ]
    keys = [key_of(arguments(**settings), tiny_llama) for settings in others]
    assert len({base, *keys}) == len(others) + 1


def test_the_key_follows_the_files(tmp_path):
    file = tmp_path / "train.json"
    file.write_text('{"src": "a", "tgt": "b"}')
    key = make_key({"a": 1}, [file])
    assert make_key({"a": 1}, [file]) == key
    times = file.stat()
    file.write_text('{"src": "a", "tgt": "c"}')  # of the same size, and as old
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert make_key({"a": 1}, [file]) != key


def test_the_key_follows_the_day_where_a_template_writes_it(arguments, tiny_llama, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    keys = {}
    for template in (str(tmp_path / "t.jinja"), "chatml"):
        args = arguments(chat_template=template)
        for day in ("2026-11-26", "2026-11-27"):
            set_day(day)
            keys[template, day] = key_of(args, tiny_llama)
    set_day(None)
    assert len(set(keys.values())) == 3 and keys["chatml", "2026-11-26"] == keys["chatml", "2026-11-27"]


def test_the_key_follows_what_a_folder_of_templates_holds(arguments, tiny_llama, tmp_path):
    folder = tmp_path / "templates"
    (folder / "additional_chat_templates").mkdir(parents=True)
    args = arguments(chat_template=str(folder))
    keys = [key_of(args, tiny_llama)]
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (folder / name).write_text("{{ messages }}")
        keys.append(key_of(args, tiny_llama))
    assert len(set(keys)) == 3


def test_the_key_follows_the_version_of_the_code(tmp_path, monkeypatch):
    key = make_key({}, [])
    monkeypatch.setattr(cache, "CACHE_VERSION", cache.CACHE_VERSION + 1)
    assert make_key({}, []) != key


def test_a_run_finds_the_data_of_the_last_one(arguments, tmp_path):
    from finetune.models.resolve import resolve_model
    from finetune.run.data import find_files, read_data
    from finetune.run.tokenizer import load_tokenizer_pair

    args = arguments(do_eval=True, eval_with_do_generation=True, data_cache_dir=str(tmp_path / "cache"))
    resolved = resolve_model(args.model.model_name_or_path)
    pair = load_tokenizer_pair(args, resolved)
    first = read_data(args, find_files(args), pair)
    again = read_data(args, find_files(args), None)  # type: ignore[arg-type]  # needs no tokenizer
    assert again.reports == first.reports
    assert [each.labels.tolist() for each in again.train] == [each.labels.tolist() for each in first.train]
    assert [each.source for each in again.prompts] == [each.source for each in first.prompts]
    args.data.data_cache = False
    with pytest.raises(AttributeError):
        read_data(args, find_files(args), None)  # type: ignore[arg-type]


def test_preference_data_are_kept_and_keyed_by_what_is_compared(arguments, tmp_path, write_lines):
    from finetune.models.resolve import resolve_model
    from finetune.run.data import find_files
    from finetune.run.preference_data import check_positions, read_preference_samples
    from finetune.run.tokenizer import load_tokenizer_pair

    file = write_lines(
        {"prompt": "a red dress", "chosen": "fits well", "rejected": "no", "margin": 2},
        {"prompt": "shoes", "chosen": "good", "rejected": "bad"},
        {"prompt": "coat", "chosen": "same", "rejected": "same"},
        b"{",
    )
    settings = {
        "dataset_name_or_path": str(file),
        "on_bad_line": "skip",
        "data_cache_dir": str(tmp_path / "cache"),
    }
    args = arguments(**settings)
    resolved = resolve_model(args.model.model_name_or_path)
    pair, files = load_tokenizer_pair(args, resolved), find_files(args)
    first = read_preference_samples(args, files, pair, comparison="pairs")
    again = read_preference_samples(args, files, None, comparison="pairs")  # type: ignore[arg-type]
    report = again.reports["train"]
    assert report == first.reports["train"] and len(again.train) == 2 and not again.dev
    assert report.num_faulty_lines == 1 and report.notes.rules == {
        "pairs whose answers are equal left out": 1
    }
    for sample, expected in zip(again.train, first.train, strict=True):
        assert sample.prompt_ids.tolist() == expected.prompt_ids.tolist() and sample.margin == expected.margin
        assert [ids.tolist() for ids in sample.answers] == [ids.tolist() for ids in expected.answers]
    marked = read_preference_samples(args, files, pair, comparison="marked")
    assert [sample.desirable for sample in marked.train] == [True, False] * 2
    check_positions(marked, args.data, resolved)
    resolved.config["max_position_embeddings"] = 4
    with pytest.raises(UserError, match="prompts with an answer have up to"):
        check_positions(marked, args.data, resolved)
