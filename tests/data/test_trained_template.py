"""The chat template of a training, found again and carried on."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.data.templates.template import load_template
from finetune.data.templates.trained_template import carry_template, template_source, trained_template
from finetune.families.family import get_family

JINJA = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


def run_folder(folder: Path, template: str | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "arguments.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_the_first_source_that_knows_counts(tmp_path):
    base, silent = run_folder(tmp_path / "base", "alpaca"), tmp_path / "silent"
    silent.mkdir()
    target = tmp_path / "target"
    target.mkdir()
    assert carry_template([silent], target) is None and not any(target.iterdir())
    assert carry_template([silent, base], target) == "alpaca" == trained_template(target)
    assert carry_template([run_folder(tmp_path / "lora", None), base], target) == "none"
    assert trained_template(target) == "none" and [path.name for path in target.iterdir()] == [
        "trained_template.json"
    ]


def test_a_checkpoint_belongs_to_its_run(tmp_path):
    run = run_folder(tmp_path / "run", "chatml")
    for name, expected in (("checkpoint-20", "chatml"), ("other", None)):
        (run / name).mkdir()
        assert trained_template(run / name) == expected


def test_the_content_of_a_template_file_goes_along(tmp_path):
    source, target, last = tmp_path / "mine.jinja", tmp_path / "target", tmp_path / "last"
    source.write_text(JINJA)
    target.mkdir()
    last.mkdir()
    carry_template([run_folder(tmp_path / "run", str(source))], target)
    source.unlink()
    carry_template([target], last)
    name = trained_template(last)
    assert name == str(last / "trained_template_source.jinja")
    assert load_template(name, last) and Path(name).read_text() == JINJA
    assert template_source(last, get_family("llama").tokenizer) == JINJA


def test_a_template_file_that_is_gone_is_told(tmp_path, capsys):
    target = tmp_path / "target"
    target.mkdir()
    carry_template([run_folder(tmp_path / "run", "gone.jinja")], target)
    assert "gone.jinja of the training is not there" in capsys.readouterr().out
