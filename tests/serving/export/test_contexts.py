"""Texts whose contexts are read in both directions: static = dynamic = without a cache, through every decoder."""

from __future__ import annotations

import json

import numpy as np
import pytest

from finetune.commands.predict import main
from finetune.families.family import get_family
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.serving.decoding.decoder import StaticDecoder
from finetune.serving.decoding.exported import FACTS_FILE, read_facts
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.dynamic import DynamicDecoder
from tests.conftest import launch
from tests.families.decoding import CONTEXT_END, greedy_without_cache, with_prefix
from tests.serving.export.builders import (
    build_sharp,
    dynamic_model,
    dynamic_text,
    export_folder,
    prompts,
)
from tests.serving.predict.builders import save_lora, save_prefix

NUM_TOKENS = 20
GREEDY = DecodingSettings(max_new_tokens=NUM_TOKENS, stop_ids=())
PART = 4  # [MASK]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_sharp("chatglm", tmp_path_factory.mktemp("contexts") / "model")


@pytest.fixture(scope="module")
def exported(folder):
    return export_folder(folder, folder.with_name("exported"))


def _texts() -> list[list[int]]:
    """Contexts of several lengths, one of them empty, one whose answer has begun, one with a gap in the middle."""
    plain = [[20 + token % 280 for token in row] for row in prompts((5, 9, 1, 12, 8))]
    rows = [[*row, *CONTEXT_END] for row in plain]
    return [*rows[:3], [*CONTEXT_END], [*rows[3], 40, 50], [*plain[4], PART, 60, CONTEXT_END[1]]]


def _decoder(model) -> DynamicDecoder:
    return DynamicDecoder(model, get_family("chatglm"), stop_ids=(-1,), pad_token_id=3)


@pytest.mark.parametrize("with_a_prefix", [False, True])
def test_greedy_texts_are_the_same_in_every_way(folder, exported, tmp_path, with_a_prefix):
    model, graph = dynamic_model(folder), exported
    if with_a_prefix:
        prefix = save_prefix(folder, tmp_path / "prefix")
        model = with_prefix(model, get_family("chatglm"))
        graph = export_folder(folder, tmp_path / "exported", prefix_path=prefix)
    rows, decoder = _texts(), StaticDecoder(graph)
    expected = dynamic_text(model, rows, GREEDY)
    assert len({token for answer in expected for token in answer}) > 20
    assert _decoder(model).generate(rows, GREEDY) == expected
    assert decoder.generate(rows, GREEDY) == expected
    alone = [decoder.generate([row], GREEDY, on_tokens=lambda _: None)[0] for row in rows]  # in several runs
    assert alone == expected
    if not with_a_prefix:
        whole = load_model(resolve_model(folder), dtype="float32", config_overrides={"use_cache": False})
        assert [greedy_without_cache(whole, np.array(row), NUM_TOKENS) for row in rows] == expected


def test_the_marks_are_what_tells_the_answer(folder, exported):
    """Without them the same texts go on in another way, so that the comparison above says something."""
    rows = _texts()
    moved = [[*row[:-2], row[-1], row[-2]] for row in rows[:3]]
    assert StaticDecoder(exported).generate(moved, GREEDY) != StaticDecoder(exported).generate(
        rows[:3], GREEDY
    )
    assert read_facts(exported).context_marks == (CONTEXT_END[1], CONTEXT_END[0], PART)


def test_a_text_that_gets_its_marks_while_it_is_made(folder, tmp_path):
    """A prompt without an end of its context, whose answer holds one."""
    rows = _texts()[:2]
    plain = [row[:-2] for row in rows]
    said = dynamic_text(dynamic_model(folder), plain, GREEDY)
    changes = {"bos_token_id": said[0][4], "gmask_token_id": said[0][2]}
    path = folder / "config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | changes))
        model = dynamic_model(folder)
        expected = dynamic_text(model, plain, GREEDY)
        assert expected[0][:5] == said[0][:5] and expected[0] != said[0]
        assert _decoder(model).generate(plain, GREEDY) == expected
        decoder = StaticDecoder(export_folder(folder, tmp_path / "exported"))
    finally:
        path.write_text(before)
    assert decoder.generate(plain, GREEDY) == expected
    assert [decoder.generate([row], GREEDY, on_tokens=lambda _: None)[0] for row in plain] == expected


def test_exports_of_before_are_read(exported_llama, tmp_path):
    import shutil

    older = shutil.copytree(exported_llama, tmp_path / "older")
    facts = json.loads((older / FACTS_FILE).read_text())
    assert facts.pop("context_marks") == []
    (older / FACTS_FILE).write_text(json.dumps(facts))
    assert read_facts(older) == read_facts(exported_llama)


def test_the_scripts_export_a_merged_adapter_and_answer(folder, tmp_path):
    lora, exported = save_lora(folder, tmp_path / "lora"), tmp_path / "exported"
    given = (
        "--model_name_or_path",
        folder,
        "--lora_path",
        lora,
        "--output_path",
        exported,
        "--device",
        "cpu",
    )
    result = launch("export_model.py", *given)
    assert result.returncode == 0, result.stderr
    data = tmp_path / "in.jsonl"
    data.write_text('{"src": "a red dress"}\n{"src": "上衣"}\n{"src": "白色 上衣 显瘦, for all days"}\n')
    answers = []
    for number, model in enumerate(
        ({"model_name_or_path": folder, "lora_path": lora}, {"model_name_or_path": exported})
    ):
        out = tmp_path / f"{number}.jsonl"
        options = model | {"data_file": data, "output_file": out, "device": "cpu", "max_new_tokens": 12}
        main([str(part) for name, value in options.items() for part in (f"--{name}", value)])
        answers.append(out.read_text(encoding="utf-8"))
    assert answers[0] == answers[1] and len(set(answers[0].splitlines())) == 3
