"""The Python files of a published folder and what names them: through training, saving and both merges, in both forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.merge.lora import main as merge_adapter
from finetune.merge.tensor_parallel import main as merge_files
from finetune.storage.code_files import find_code, with_present_code
from tests.conftest import run_entry, write_arguments
from tests.reference.curves import COMMON, HERE
from tests.serving.export.builders import build_sharp

MAPS = {
    "qwen": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "internlm2": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
    },
    "chatglm": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
}


def publish(family: str, folder: Path) -> dict[str, str]:
    """Puts code beside a model in Hugging Face's form, and names it; gives the code."""
    code = {
        f"configuration_{family}.py": "from transformers import PretrainedConfig\n",
        f"modeling_{family}.py": (
            f"import torch\nfrom .configuration_{family} import Config\n"
            "try:\n    from .cpp_kernels import kernels  # compiled where it can be\nexcept ImportError:\n    pass\n"
            "from .generation_parts import (\n    StopWords,\n)\n"
        ),
        "generation_parts.py": "from . import decoding_marks as marks\n",
        "decoding_marks.py": "from .generation_parts import StopWords\n",
        "cpp_kernels.py": "kernels = None\n",
        f"tokenization_{family}.py": "from .vocabulary_parts import read\n",
        "vocabulary_parts.py": "read = open\n",
    }
    for name, content in code.items():
        (folder / name).write_text(content)
    (folder / "demo.py").write_text("print('of no use to the model')\n")
    tokenizer = {"AutoTokenizer": [f"tokenization_{family}.Tokenizer", None]}
    for name, named in (("config.json", MAPS[family]), ("tokenizer_config.json", tokenizer)):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": named}))
    return code


def train(base: Path, out: Path, **settings: Any) -> Path:
    places = {"model_name_or_path": base, "dataset_name_or_path": HERE / "data", "output_dir": out}
    arguments = COMMON | {"max_steps": 1, "warmup_steps": 0, "save_strategy": "steps", "save_steps": 1}
    arguments |= {name: str(path) for name, path in places.items()} | settings
    assert run_entry(write_arguments(out.with_suffix(".json"), **arguments)) == 0
    return out


def code_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def check_published(folder: Path, base: Path, code: dict[str, str]) -> None:
    """A folder that transformers can run the code of."""
    assert code_in(folder) == code
    for name in ("config.json", "tokenizer_config.json"):
        named = json.loads((base / name).read_text())["auto_map"]
        assert json.loads((folder / name).read_text())["auto_map"] == named, name


@pytest.mark.parametrize("family", MAPS)
def test_code_and_what_names_it_stay_beside_the_weights(family, tmp_path, capsys):
    build_sharp(family, tmp_path / "tiny")
    base = tmp_path / "base"
    merge(merge_files, "--model_name_or_path", tmp_path / "tiny", "--output_dir", base, form="hf")
    assert f"transformers has no {family} of its own; copy configuration_" in capsys.readouterr().out
    code = publish(family, base)

    run = train(base, tmp_path / "run")
    for folder in (run, run / "checkpoint-1"):
        assert code_in(folder) == code
        merge(
            merge_files,
            "--model_name_or_path",
            folder,
            "--output_dir",
            tmp_path / folder.name / "hf",
            form="hf",
        )
        check_published(tmp_path / folder.name / "hf", base, code)
    assert "of its own" not in capsys.readouterr().out

    adapter = train(base, tmp_path / "adapter", lora=True, lora_rank=2)
    assert set(code_in(adapter)) == {f"tokenization_{family}.py", "vocabulary_parts.py"}
    ours, theirs, again = (tmp_path / name for name in ("ours", "theirs", "again"))
    words = ("--model_name_or_path", base, "--lora_path", adapter, "--merge_model_path")
    merge(merge_adapter, *words, theirs)
    check_published(theirs, base, code)
    merge(merge_adapter, *words, ours, form="paddle")
    merge(merge_files, "--model_name_or_path", ours, "--output_dir", again, form="hf")
    check_published(again, base, code)


def merge(main: Any, *words: Any, form: str | None = None) -> None:
    main([*map(str, words), *(["--save_format", form] if form else [])])


def test_code_that_is_missing_is_named_by_nobody(tmp_path):
    """A folder without it, and a copy of one; what is fetched from a hub needs no file."""
    build_sharp("internlm2", tmp_path / "tiny")
    base = tmp_path / "base"
    merge(merge_files, "--model_name_or_path", tmp_path / "tiny", "--output_dir", base, form="hf")
    for name in publish("internlm2", base):
        if not name.startswith("configuration"):
            (base / name).unlink()
    run = train(base, tmp_path / "run")
    merge(merge_files, "--model_name_or_path", run, "--output_dir", tmp_path / "hf", form="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["auto_map"] == {"AutoConfig": MAPS["internlm2"]["AutoConfig"]}
    assert "auto_map" not in json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    elsewhere = {"auto_map": {"AutoConfig": "internlm/internlm2-7b--configuration_internlm2.InternLM2Config"}}
    assert with_present_code(elsewhere, tmp_path) == elsewhere


@pytest.mark.parametrize(
    "named",
    ["../outside.Class", "/etc/passwd.Class", "a.b.Class", "Class", "", 7, None, ["x.Y", {}], {"a": 1}],
)
def test_a_map_that_names_no_file_of_the_folder_copies_none(named, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside.py").write_text("")
    for value in (named, {"AutoModel": named}):
        (folder / "config.json").write_text(json.dumps({"auto_map": value}))
        assert find_code(folder) == []
