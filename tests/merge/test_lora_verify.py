"""`--verify` of merge_lora_params.py: the right pair of models, a bound, and every kind of adapter."""

from __future__ import annotations

import re

import pytest

from finetune.merge import lora, lora_verify
from finetune.merge.lora import MergeOptions, export_peft, main
from tests.merge.lora_writing import VOCABULARY, run_merge, write_adapter, write_base


def test_verify_of_taking_out(tmp_path, capsys):
    """The result with the adapter must be the model that was given; in 16 bits the bound is looser."""
    for dtype in ("float32", "bfloat16"):
        base, adapter = (
            write_base(tmp_path / f"base-{dtype}", "llama", dtype=dtype),
            tmp_path / f"lora-{dtype}",
        )
        write_adapter(adapter, base)
        merged = run_merge(base, adapter, output=tmp_path / f"merged-{dtype}", verify=True)
        run_merge(merged, adapter, output=tmp_path / f"out-{dtype}", unmerge=True, verify=True)
        assert capsys.readouterr().out.count(f"allowed for {dtype} weights") == 2


def test_verify_fails_on_another_model(tmp_path, monkeypatch, capsys):
    base, adapter = write_base(tmp_path / "base", "llama"), tmp_path / "adapter"
    write_adapter(adapter, base)
    original = lora.plan

    def wrong(base, adapters, **settings):
        return original(base, adapters, **settings | {"unmerge": not settings["unmerge"]})

    for unmerge in (False, True):
        merged = tmp_path / f"merged-{unmerge}"
        monkeypatch.setattr(lora, "plan", wrong)
        with pytest.raises(SystemExit) as caught:
            run_merge(base, adapter, output=merged, unmerge=unmerge, verify=True)
        assert caught.value.code == 1 and merged.is_dir()
        message = (
            r"error: --verify: logits differ by up to \S+, more than .* float32 .* stays as it was written"
        )
        assert re.search(message, capsys.readouterr().err)
    assert not lora_verify.Comparison(float("nan"), 1.0, "float32").is_close


@pytest.mark.parametrize(
    "case", ["several that replace", "pissa first", "joined layers", "more tokens in peft"]
)
def test_verify_runs_every_adapter(case, tmp_path, capsys):
    base, adapters = write_base(tmp_path / "base", "llama"), [tmp_path / "one", tmp_path / "two"]
    whole = {"num_tokens": VOCABULARY + 5, "modules_to_save": ["embed_tokens", "lm_head"]}
    if case == "joined layers":
        fused = {"fuse_attention_qkv": True, "fuse_attention_ffn": True}
        targets = [".*qkv_proj.*", ".*gate_up_fused_proj.*"]
        write_adapter(adapters[0], base, overrides=fused, lora_target_modules=targets)
        del adapters[1]
    elif case == "more tokens in peft":
        write_adapter(tmp_path / "ours", base, **whole)
        export_peft(MergeOptions(base, (tmp_path / "ours",), adapters[0]))
        del adapters[1]
    else:
        write_adapter(adapters[0], base, **({"pissa": True} if case == "pissa first" else {}))
        write_adapter(adapters[1], base, **whole)
    run_merge(base, *adapters, output=tmp_path / "merged", verify=True)
    assert "largest difference of a logit" in capsys.readouterr().out


def test_verify_of_pissa(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "adapter", base, pissa=True)
    run_merge(base, tmp_path / "adapter", output=tmp_path / "merged", verify=True)


def test_verify_prints_differences(tmp_path, capsys):
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "adapter", base)
    words = [
        "--lora_path",
        str(tmp_path / "adapter"),
        "--merge_model_path",
        str(tmp_path / "merged"),
        "--verify",
    ]
    main(words)
    printed = capsys.readouterr().out
    assert re.search(r"largest difference of a logit \d\.\d+e-0[5-9]", printed)
    assert re.search(r"q_proj: changed by \d", printed) and "embed_tokens" not in printed
    merged = tmp_path / "two"
    write_adapter(tmp_path / "other", base, lora_rank=2)
    main(
        [
            "--lora_path",
            f"{tmp_path / 'adapter'},{tmp_path / 'other'}",
            "--merge_model_path",
            str(merged),
            "--verify",
        ]
    )
    assert re.search(r"largest difference of a logit \d\.\d+e-0[5-9]", capsys.readouterr().out)
