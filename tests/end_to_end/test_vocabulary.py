"""A tokenizer with more tokens than the model: trained, continued, and read back with the larger embeddings."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.errors import EXIT_USER_ERROR
from finetune.models.tiny.checkpoint import build_tiny
from tests.conftest import FAST, losses, read_log, run_entry, write_arguments

OLD, NEW = 600, 700
NUM_STEPS = 4
WHOLE = {"lora": True, "lora_rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.fixture(scope="module")
def larger_tokenizer(tmp_path_factory) -> Path:
    """A folder with a tokenizer of the same kind that knows more pieces, and no weights."""
    folder = tmp_path_factory.mktemp("tokenizer") / "larger"
    build_tiny("llama", folder, hidden_size=32, num_layers=1, num_heads=4, vocab_size=NEW)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def arguments(tiny_llama, larger_tokenizer, small_data, tmp_path):
    """Writes an argument file for a short training with the larger tokenizer; returns its path."""

    def write(**more) -> Path:
        settings = FAST | {
            "model_name_or_path": str(tiny_llama),
            "tokenizer_name_or_path": str(larger_tokenizer),
            "dataset_name_or_path": str(small_data),
            "output_dir": str(tmp_path / "out"),
            "max_steps": NUM_STEPS,
            "do_eval": True,
        }
        return write_arguments(tmp_path / "arguments.json", **settings | more)

    return write


def evaluated(path: Path, *words: object) -> float:
    """Loss on the dev set of what an argument file names."""
    assert run_entry(path, "--do_train", "false", "--do_eval", "true", "--save_strategy", "no", *words) == 0
    out = Path(str(words[words.index("--output_dir") + 1]))
    return json.loads((out / "all_results.json").read_text())["eval_loss"]


def forget_last_steps(out: Path) -> None:
    """Leaves what a run that was killed after its second step leaves."""
    shutil.rmtree(out / "checkpoint-4")
    (out / "trainer_state.json").unlink()


def test_full_fine_tuning(arguments, tiny_llama, tmp_path, capsys):
    out = tmp_path / "out"
    path = arguments(save_strategy="steps", save_steps=2)
    assert run_entry(path) == 0
    said = capsys.readouterr().err
    assert f"{OLD} embeddings grow to {NEW}" in said
    assert "untrained" not in said
    assert json.loads((out / "config.json").read_text())["vocab_size"] == NEW
    final = load_file(next(out.glob("model*.safetensors")))
    assert final["llama.embed_tokens.weight"].shape == (NEW, 32)
    assert final["lm_head.weight"].shape == (32, NEW)
    start = load_file(tiny_llama / "model.safetensors")
    assert not np.allclose(final["lm_head.weight"][:, OLD:], start["lm_head.weight"].mean(1, keepdims=True))

    curve, loss = losses(out), read_log(out, "eval")[-1]["eval_loss"]
    forget_last_steps(out)
    assert run_entry(path) == 0
    assert losses(out) == curve
    assert "Continuing from" in capsys.readouterr().err
    reloaded = evaluated(path, "--model_name_or_path", out, "--output_dir", tmp_path / "again")
    assert reloaded == pytest.approx(loss, abs=1e-6)
    assert "embeddings grow" not in capsys.readouterr().err


@pytest.mark.parametrize("whole", [True, False], ids=["modules_to_save", "adapter_only"])
def test_lora(arguments, tmp_path, capsys, whole):
    out = tmp_path / "out"
    settings = WHOLE if whole else {"lora": True, "lora_rank": 4}
    path = arguments(save_strategy="steps", save_steps=2, **settings)
    assert run_entry(path) == 0
    assert ("stay untrained" in capsys.readouterr().err) is not whole
    saved = load_file(out / "peft_model-00001-of-00001.safetensors")
    assert ("llama.embed_tokens.weight" in saved, "lm_head.weight" in saved) == (whole, whole)
    if whole:
        assert saved["llama.embed_tokens.weight"].shape == (NEW, 32)
        assert saved["lm_head.weight"].shape == (32, NEW)

    curve, loss = losses(out), read_log(out, "eval")[-1]["eval_loss"]
    forget_last_steps(out)
    assert run_entry(path) == 0
    assert losses(out) == curve
    reloaded = evaluated(path, "--lora_path", out, "--output_dir", tmp_path / "again")
    assert reloaded == pytest.approx(loss, abs=1e-6)


def test_lora_with_tied_embeddings(arguments, tmp_path):
    """One tensor serves input and output; the adapter holds it once."""
    model, tokenizer = (
        build_tiny(
            "bloom", tmp_path / f"bloom{size}", hidden_size=32, num_layers=2, num_heads=4, vocab_size=size
        )
        for size in (OLD, NEW)
    )
    path = arguments(
        model_name_or_path=str(model), tokenizer_name_or_path=str(tokenizer),
        lora=True, lora_rank=4, modules_to_save=["word_embeddings"],
    )  # fmt: skip
    assert run_entry(path) == 0
    out = tmp_path / "out"
    saved = load_file(out / "peft_model-00001-of-00001.safetensors")
    assert {name: array.shape for name, array in saved.items() if "lora" not in name} == {
        "bloom.word_embeddings.weight": (NEW, 32)
    }
    loss = read_log(out, "eval")[-1]["eval_loss"]
    reloaded = evaluated(path, "--lora_path", out, "--output_dir", tmp_path / "again")
    assert reloaded == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "path_argument"),
    [
        ({"lora": True, "lora_rank": 4}, "lora_path"),
        ({"prefix_tuning": True, "num_prefix_tokens": 4}, "prefix_path"),
    ],
    ids=["lora", "prefix"],
)
def test_an_adapter_needs_its_tokenizer(arguments, tmp_path, capsys, method, path_argument):
    out = tmp_path / "out"
    assert run_entry(arguments(**method, max_steps=1)) == 0
    assert json.loads((out / "adapter_facts.json").read_text()) == {"num_tokens": NEW}
    loss = read_log(out, "eval")[-1]["eval_loss"]
    again = method | {path_argument: str(out), "output_dir": str(tmp_path / "again"), "max_steps": 1}

    assert run_entry(arguments(**again, tokenizer_name_or_path=None)) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert f"a tokenizer of {NEW} tokens, but the tokenizer of this run has {OLD}" in said
    assert f"--tokenizer_name_or_path {out}" in said

    cured = arguments(**again, tokenizer_name_or_path=str(out))
    assert evaluated(cured, "--output_dir", tmp_path / "cured") == pytest.approx(loss, abs=1e-6)

    (out / "adapter_facts.json").unlink()  # as older adapters are: nothing is compared
    old = arguments(**again, tokenizer_name_or_path=None)
    evaluated(old, "--output_dir", tmp_path / "old")


def test_embeddings_of_another_vocabulary_name_the_tokenizer(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_entry(arguments(**WHOLE, max_steps=1)) == 0
    (out / "adapter_facts.json").unlink()
    more = {"lora_path": str(out), "output_dir": str(tmp_path / "again"), "tokenizer_name_or_path": None}
    assert run_entry(arguments(**WHOLE, **more)) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert f"has {NEW} embeddings, but the base {OLD} and the tokenizer of this run" in said
    assert f"use the adapter's own tokenizer with --tokenizer_name_or_path {out}" in said


def test_an_adapter_of_another_rank_does_not_blame_the_tokenizer(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_entry(arguments(lora=True, lora_rank=4, max_steps=1)) == 0
    config = json.loads((out / "lora_config.json").read_text())
    (out / "lora_config.json").write_text(json.dumps(config | {"r": 2}))
    more = {"lora": True, "lora_path": str(out), "output_dir": str(tmp_path / "again")}
    assert run_entry(arguments(**more)) == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert "Was it trained on another base?" in said
    assert "vocabulary" not in said.partition("does not fit")[2]


def test_paddlenlp_reads_an_adapter_beside_our_record(arguments, tmp_path):
    from paddlenlp.peft import LoRAConfig, LoRAModel
    from paddlenlp.transformers import LlamaForCausalLM

    base, out = tmp_path / "base", tmp_path / "out"
    build_tiny("llama", base, hidden_size=32, num_layers=1, num_heads=4, vocab_size=OLD)
    plain = arguments(
        lora=True, lora_rank=4, max_steps=1, tokenizer_name_or_path=None, model_name_or_path=str(base)
    )
    assert run_entry(plain) == 0
    assert (out / "adapter_facts.json").is_file()
    gc.collect()  # PaddleNLP takes any warning while it loads, of a file left open too, for its own fault
    model = LoRAModel.from_pretrained(LlamaForCausalLM.from_pretrained(str(base)), str(out))
    assert LoRAConfig.from_pretrained(str(out)).r == 4
    saved = load_file(out / "peft_model-00001-of-00001.safetensors")
    for name, array in saved.items():
        np.testing.assert_array_equal(model.model.state_dict()[name].numpy(), array)


def test_an_adapter_that_trains_other_modules_whole(arguments, tmp_path, capsys):
    assert run_entry(arguments(lora=True, lora_rank=4)) == 0
    more = WHOLE | {"lora_path": str(tmp_path / "out"), "output_dir": str(tmp_path / "other")}
    assert run_entry(arguments(**more)) == EXIT_USER_ERROR
    assert "modules_to_save is embed_tokens, lm_head, but the adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["embed_token"], "no module called 'embed_token'"),
        (["q_proj"], "q_proj gets a low-rank update as well"),
    ],
)
def test_modules_that_cannot_be_saved_whole(arguments, capsys, names, message):
    assert run_entry(arguments(lora=True, modules_to_save=names)) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err


def test_prefix_tuning_leaves_new_tokens_untrained(arguments, capsys):
    assert run_entry(arguments(prefix_tuning=True, num_prefix_tokens=4, max_steps=1)) == 0
    assert "stay untrained with this method" in capsys.readouterr().err


def test_the_models_own_tokenizer_must_fit(arguments, tiny_llama, larger_tokenizer, tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    for path in larger_tokenizer.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    for name in ("config.json", "model.safetensors"):
        (own / name).write_bytes((tiny_llama / name).read_bytes())
    for tokenizer in (None, str(own)):
        fault = run_entry(arguments(model_name_or_path=str(own), tokenizer_name_or_path=tokenizer))
        assert fault == EXIT_USER_ERROR
        assert (
            f"the tokenizer has {NEW} tokens but the model only {OLD} embeddings" in capsys.readouterr().err
        )
