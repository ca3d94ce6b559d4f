"""Adapters and their bases by name, from a loopback hub: downloaded once, then from the cache, offline too."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.errors import UserError
from finetune.merge.lora import main as merge_main
from finetune.models.hubs.adapters import is_hub_name, local_adapter, name_of
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.export.options import ExportOptions
from finetune.serving.predict.loading import plan_model
from tests.adapters.peft_writing import write_peft
from tests.merge.lora_writing import write_base

NAME, BASE = "someone/an-adapter", "someone/a-base"
HUBS = ("hf", "modelscope", "aistudio")
LAYERS = {f"model.layers.{number}.self_attn.q_proj": (4, 1.5) for number in (0, 1)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("hub") / "base", "llama", hugging_face=True)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "adapter"
    write_peft(
        folder, base, LAYERS, target_modules=["q_proj"], base_model_name_or_path=f"modelscope://{BASE}"
    )
    (folder / "README.md").write_text("not needed")
    (folder / "optimizer.pt").write_bytes(b"not needed")
    return folder


@pytest.mark.parametrize("scheme", HUBS)
def test_an_adapter_is_downloaded_once_and_then_needs_no_hub(scheme, hub, adapter, monkeypatch):
    hub.models[NAME] = adapter
    folder = local_adapter(f"{scheme}://{NAME}")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (adapter / name).read_bytes()
    assert set(hub.downloads()) == {"adapter_config.json", "adapter_model.safetensors"}
    asked = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert local_adapter(f"{scheme}://{NAME}") == folder and len(hub.asked) == asked
    with pytest.raises(
        UserError, match=r"lora_path .*@v1 is no folder here, and .* is not asked \(HF_HUB_OFFLINE\)"
    ):
        local_adapter(f"{scheme}://{NAME}@v1")


@pytest.mark.parametrize("scheme", HUBS)
def test_revisions_and_absences(scheme, hub, adapter, base):
    hub.models |= {NAME: adapter, BASE: base}
    assert (local_adapter(f"{scheme}://{NAME}@v1") / "adapter_config.json").is_file()
    with pytest.raises(UserError, match=r"no such revision|has no model"):
        local_adapter(f"{scheme}://{NAME}@v2")
    with pytest.raises(UserError, match=rf"is no folder here, and .*has no model {scheme}://someone/nothing"):
        local_adapter(f"{scheme}://someone/nothing")
    with pytest.raises(
        UserError, match=r"is a whole model, which is given as model_name_or_path: it holds config"
    ):
        local_adapter(f"{scheme}://{BASE}")


def test_a_download_that_broke_off_is_taken_up(hub, adapter):
    hub.models[NAME] = adapter
    folder = local_adapter(f"modelscope://{NAME}")
    (folder / "adapter_model.safetensors").unlink()
    assert (local_adapter(f"modelscope://{NAME}") / "adapter_model.safetensors").is_file()


def test_a_bare_name_is_looked_for_everywhere(hub, adapter, tmp_path, monkeypatch):
    hub.models[NAME] = adapter
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(NAME) and (local_adapter(NAME) / "adapter_config.json").is_file()
    (tmp_path / NAME).mkdir(parents=True)
    asked = len(hub.asked)
    assert local_adapter(NAME).resolve() == tmp_path / NAME and len(hub.asked) == asked


@pytest.mark.parametrize("given", ["hf://a/b", "modelscope://a/b@v1", "a/b"])
def test_names_survive_being_paths(given):
    from pathlib import Path

    assert name_of(Path(given)) == given and is_hub_name(Path(given))


def test_a_merge_by_names_alone(hub, adapter, base, tmp_path, capsys):
    hub.models |= {NAME: adapter, BASE: base}
    expected = load_file(f"{adapter}-merged/model.safetensors")
    merge_main(["--lora_path", f"hf://{NAME}", "--merge_model_path", str(tmp_path / "a")])
    assert f"downloading the base modelscope://{BASE}" in capsys.readouterr().out
    merge_main(["--model_name_or_path", f"hf://{BASE}", "--lora_path", f"hf://{NAME}", "--merge_model_path",
                str(tmp_path / "b")])  # fmt: skip
    for folder in ("a", "b"):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert all(np.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_a_base_that_no_hub_has(hub, adapter, tmp_path):
    hub.models[NAME] = adapter
    with pytest.raises(
        UserError, match=rf"the base that .* names, modelscope://{BASE}, is no folder here and cannot"
    ):
        merge_main(["--lora_path", f"hf://{NAME}", "--merge_model_path", str(tmp_path / "a")])


def test_answering_and_exporting_by_name(hub, adapter, base):
    from pathlib import Path

    hub.models[NAME] = adapter
    plan = plan_model(ModelOptions(model_name_or_path=str(base), lora_path=Path(f"hf://{NAME}")))
    assert (plan.options.lora_path / "adapter_config.json").is_file()
    export = ExportOptions(
        model_name_or_path=str(base), output_path=Path("out"), lora_path=Path(f"hf://{NAME}")
    )
    export.check()
    assert export.with_local_adapter().lora_path == plan.options.lora_path


def test_a_run_by_name_takes_over_how_the_base_was_quantised(hub, adapter, base, tmp_path, monkeypatch):
    import shutil

    from finetune.run.adapter_source import adapter_folder, fetch_adapter
    from tests.settings.argument_files import parse

    quantised = tmp_path / "quantised"
    shutil.copytree(adapter, quantised)
    scheme = {"algorithm": "nf4", "block_size": 128, "double_quant": True, "double_quant_block_size": 256}
    facts = {"base_quantisation": scheme}
    (quantised / "adapter_facts.json").write_text(json.dumps(facts))
    hub.models[NAME] = quantised
    (tmp_path / "data").mkdir()
    for name in ("train.json", "dev.json"):
        (tmp_path / "data" / name).write_text('{"src": "a", "tgt": "b"}\n')
    given = {"model_name_or_path": str(base), "dataset_name_or_path": str(tmp_path / "data"),
             "output_dir": str(tmp_path / "out"), "lora": True, "lora_path": f"hf://{NAME}"}  # fmt: skip
    monkeypatch.chdir(tmp_path)  # where the argument file is put
    args = parse(given)
    assert args.model.weight_quantize_algo is None and not hub.asked
    assert fetch_adapter(args) == []
    assert (args.model.weight_quantize_algo, args.model.weight_blocksize) == ("nf4", 128)
    assert (adapter_folder(args) / "adapter_config.json").is_file() and args.model.lora_path == f"hf://{NAME}"
