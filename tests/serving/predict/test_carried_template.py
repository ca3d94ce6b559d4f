"""The template of a training stays with what is made of it, so that prompts stay those of the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.merge import lora, tensor_parallel
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.batch_run import describe_run
from finetune.serving.predict.loading import load_responder, plan_model
from tests.serving.export.builders import build_sharp, export_folder
from tests.serving.predict.builders import save_lora

GREEDY = DecodingSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_sharp("qwen2", tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    folder = save_lora(base, tmp_path_factory.mktemp("chat") / "lora")
    (folder / "arguments.json").write_text(json.dumps({"chat_template": "chatml"}))
    return folder


def merge(base: Path, *adapters: Path, output: Path, **options) -> Path:
    lora.merge(lora.MergeOptions(base, adapters, output, **options))
    return output


def answer(model: Path, **options) -> str:
    plan = plan_model(ModelOptions(model_name_or_path=str(model), **options))
    return load_responder(plan).answer([("上衣", "a")], "白色 上衣", GREEDY)


def chosen(model: Path, **options) -> str:
    return plan_model(ModelOptions(model_name_or_path=str(model), **options)).template_name


def test_dynamic_merged_and_exported_texts_are_the_same(base, adapter, tmp_path):
    expected = answer(base, lora_path=adapter)
    assert expected != answer(base, lora_path=adapter, chat_template="none")
    merged = merge(base, adapter, output=tmp_path / "merged")
    theirs = merge(base, adapter, output=tmp_path / "hf", save_format="hf")
    folders = [
        merged,
        theirs,
        export_folder(base, tmp_path / "exported", lora_path=adapter),
        export_folder(merged, tmp_path / "exported_merged"),
    ]
    for folder in folders:
        assert chosen(folder) == "chatml", folder.name
        assert answer(folder) == expected, folder.name


def test_transformers_has_the_template_too(base, adapter, tmp_path):
    from finetune.data.templates.jinja_environment import CHAT, make_environment

    theirs = merge(base, adapter, output=tmp_path / "hf", save_format="hf")
    source = (theirs / "chat_template.jinja").read_text()
    text = make_environment(CHAT).from_string(source).render(messages=[{"role": "user", "content": "q"}])
    assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    back = merge(theirs, adapter, output=tmp_path / "back", unmerge=True)
    assert not list(back.glob("*template*"))


def test_the_last_adapter_decides_and_its_file_goes_along(base, adapter, tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"conversation": ["<{{user}}>", "{{bot}}"]}))
    second = tmp_path / "second"
    shutil.copytree(adapter, second)
    (second / "arguments.json").write_text(json.dumps({"chat_template": str(mine)}))
    merged = merge(base, adapter, second, output=tmp_path / "merged")
    mine.unlink()
    assert json.loads(Path(chosen(merged)).read_text())["conversation"][0] == "<{{user}}>"
    assert Path(chosen(merged)).parent == merged
    assert chosen(merge(base, second, adapter, output=tmp_path / "other")) == "chatml"


def test_a_checkpoint_of_a_full_run_keeps_the_template_of_its_run(base, adapter, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(base, run / "checkpoint-3")
    (run / "arguments.json").write_text(json.dumps({"chat_template": "chatml"}))
    assert chosen(run / "checkpoint-3") == "chatml"
    for source, output in ((run / "checkpoint-3", tmp_path / "model"), (adapter, tmp_path / "lora")):
        tensor_parallel.merge(tensor_parallel.MergeOptions(source, output))
    assert chosen(tmp_path / "model") == "chatml" == chosen(base, lora_path=tmp_path / "lora")


def test_other_files_beside_the_weights_do_not_go_on(base, adapter, tmp_path):
    data, template, model = tmp_path / "in.jsonl", tmp_path / "mine.json", tmp_path / "model"
    data.write_text('{"src": "a"}\n')
    template.write_text(json.dumps({"conversation": ["<{{user}}>", "{{bot}}"]}))
    shutil.copytree(base, model)
    own = tmp_path / "lora"
    shutil.copytree(adapter, own)
    options = ModelOptions(model_name_or_path=str(model), lora_path=own, chat_template=str(template))

    def described():
        return describe_run(plan_model(options), GREEDY, data)

    seen = [described()]
    assert described() == seen[0]
    for path in (template, model / "tokenizer_config.json", own / "lora_config.json"):
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(content, indent=3) + "\n")
        seen.append(described())
        assert seen[-1] != seen[-2], path.name


def test_an_adapter_as_the_model_and_an_adapter_of_peft(base, adapter, tmp_path):
    with pytest.raises(UserError, match=r"holds an adapter alone .*give the base .* as --lora_path"):
        plan_model(ModelOptions(model_name_or_path=str(adapter)))
    prefix = tmp_path / "prefix"
    prefix.mkdir()
    (prefix / "prefix_config.json").write_text("{}")
    with pytest.raises(UserError, match="this folder as --prefix_path"):
        plan_model(ModelOptions(model_name_or_path=str(prefix)))
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text('{"use_qalora": true}')
    with pytest.raises(UserError, match=r"give the base .* this folder as --lora_path"):
        plan_model(ModelOptions(model_name_or_path=str(peft)))
    with pytest.raises(UserError, match=r"has use_qalora true: .* merge_and_unload"):
        plan_model(ModelOptions(model_name_or_path=str(base), lora_path=peft))
    with pytest.raises(UserError, match=r"has use_qalora true: .* merge_and_unload"):
        export_folder(base, tmp_path / "exported", lora_path=peft)
