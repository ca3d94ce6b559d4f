import json
import re
import subprocess
import sys

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.models.tiny.__main__ import main
from finetune.models.tiny.checkpoint import build_tiny
from finetune.processes.command import run_command
from finetune.storage.checkpoints import Checkpoint


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes(case, corpus, tmp_path):
    options = {"corpus": corpus, "vocab_size": 300, "num_layers": 1} | case.options
    first = _contents(build_tiny(case.name, tmp_path / "a", seed=3, **options))
    second = _contents(build_tiny(case.name, tmp_path / "b", seed=3, **options))
    other = _contents(build_tiny(case.name, tmp_path / "c", seed=4, **options))
    assert first == second
    assert other.pop("model.safetensors") != first.pop("model.safetensors")
    assert other == first


def test_sizes_and_distribution(case, tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    checkpoint = Checkpoint(tiny_folder)
    vocab_size = case.options.get("vocab_size", 330)
    assert config["vocab_size"] == vocab_size
    family = get_family(case.name)
    assert family.prefix_geometry(config).num_kv_heads == case.num_kv_heads
    (name,) = (name for name in checkpoint.names if name.endswith(f"{family.embedding_module}.weight"))
    embedding = checkpoint.read(name)
    assert embedding.shape == (vocab_size, 64)
    assert abs(embedding.std() - 0.02) < 0.001
    assert abs(embedding.mean()) < 0.001
    norms = [checkpoint.read(name) for name in checkpoint.names if re.search(r"(norm|ln_).*weight$", name)]
    assert len(norms) > config[family.fields.num_layers]  # one in each layer at least, and the last
    assert all(np.ptp(norm) == 0 for norm in norms)


def test_a_ready_tokenizer_sets_the_vocabulary(llama_folder, tmp_path):
    folder = build_tiny("llama", tmp_path / "other", tokenizer=llama_folder / "tokenizer.model", num_layers=1)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 330
    assert (folder / "tokenizer.model").read_bytes() == (llama_folder / "tokenizer.model").read_bytes()


FAULTS = [
    ({"hidden_size": 65}, "hidden_size is 65 but must be divisible by num_heads 4"),
    ({"hidden_size": 20}, "hidden_size / num_heads is 5 but rotary positions need an even number"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3 but must divide num_heads 4"),
    ({"vocab_size": 200}, "vocab_size is 200 but must be at least 260"),
    ({"vocab_size": 9000}, "no vocabulary of 9000 pieces can be trained"),
    ({"num_layers": 0}, "num_layers is 0 but must be at least 1"),
    ({"seed": -1}, "seed is -1 but must be 0 or more"),
    ({"corpus": "no-such-file"}, "corpus no-such-file is not a file"),
    ({"tokenizer": "no-such-file"}, "tokenizer no-such-file is not a file"),
]


@pytest.mark.parametrize(("options", "message"), FAULTS, ids=lambda value: str(value)[:24])
def test_what_cannot_be_built_is_said_and_nothing_is_written(options, message, corpus, tmp_path):
    with pytest.raises(UserError, match=message):
        build_tiny("llama", tmp_path / "model", **{"corpus": corpus, **options})
    assert not (tmp_path / "model").exists()


def test_all_faults_are_said_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        build_tiny("llama", tmp_path / "model", hidden_size=65, num_key_value_heads=3)
    assert len(error.value.faults) == 2


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe\x00", "is not UTF-8"), (b"\n \n", "holds no text")]
)
def test_unusable_corpus(content, message, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        build_tiny("llama", tmp_path / "model", corpus=path)


def test_a_file_that_is_no_sentencepiece_model(corpus, tmp_path):
    with pytest.raises(UserError, match=r"not a SentencePiece model"):
        build_tiny("llama", tmp_path / "model", tokenizer=corpus)
    assert not (tmp_path / "model").exists()


def test_a_folder_with_files_is_left_alone(corpus, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match=r"is not empty"):
        build_tiny("llama", tmp_path, corpus=corpus)
    with pytest.raises(UserError, match=r"is a file"):
        build_tiny("llama", tmp_path / "mine", corpus=corpus)
    assert (tmp_path / "mine").read_text() == "x"


def test_command_writes_or_exits_with_2(corpus, tmp_path, capsys):
    out_dir = str(tmp_path / "model")
    arguments = ["llama", out_dir, "--corpus", str(corpus), "--vocab_size", "300", "--num_layers", "1"]
    assert run_command(lambda: main(arguments)) == 0
    assert "MB of random weights" in capsys.readouterr().out
    assert run_command(lambda: main(arguments)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run_command(lambda: main(["lama", out_dir])) == 2
    assert "covered families: " in capsys.readouterr().err


def test_the_command_does_not_import_paddle(corpus, tmp_path):
    code = (
        "import sys; from finetune.models.tiny.__main__ import main; main(sys.argv[1:]); "
        "print([name for name in sys.modules if name.startswith('paddle')])"
    )
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "llama",
            str(tmp_path / "m"),
            "--corpus",
            str(corpus),
            "--vocab_size",
            "300",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout.splitlines()[-1] == "[]", run.stderr


FAMILY_FAULTS = [
    ("bloom", {"num_key_value_heads": 2}, "num_key_value_heads is 2 but family bloom has as many as heads"),
    (
        "bloom",
        {"intermediate_size": 96},
        "intermediate_size is 96 but family bloom always has 4 x hidden_size",
    ),
    ("opt", {"vocab_size": 260}, "vocab_size is 260 but must be at least 261"),
    ("qwen2", {"vocab_size": 9000}, "no vocabulary of 9000 pieces can be trained"),
    ("opt", {"tokenizer": "vocab.json"}, "byte-level tokenizers are always trained"),
]


@pytest.mark.parametrize(("family", "options", "message"), FAMILY_FAULTS, ids=lambda value: str(value)[:24])
def test_what_a_family_cannot_be_built_with(family, options, message, corpus, tmp_path):
    with pytest.raises(UserError, match=message):
        build_tiny(family, tmp_path / "model", **{"corpus": corpus, **options})
    assert not (tmp_path / "model").exists()
