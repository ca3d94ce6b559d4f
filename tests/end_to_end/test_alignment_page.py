"""The tutorial of docs/alignment.md runs as it stands there, its first training cut short, and does what it says."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from finetune.models.tiny.__main__ import main
from finetune.run.reference import REFERENCE_FILE
from finetune.serving.predict.run import parse_options, predict
from tests.conftest import ROOT, read_log, run_entry
from tests.end_to_end.test_family_readmes import BLOCK


def commands(page: str) -> list[list[str]]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [shlex.split(line) for block in BLOCK.findall(text) for line in block.splitlines()]


def test_margins_of_held_out_pairs_are_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data", "llama"):
        (tmp_path / name).symlink_to(ROOT / name)
    tiny, supervised, aligned, before, after, reward, scores = commands("alignment.md")
    main(tiny[3:])
    assert supervised[:2] == aligned[:2] == ["python", "finetune_generation.py"]
    assert run_entry(*supervised[2:], "--max_steps", "60", "--data_cache", "false") == 0
    assert run_entry(*aligned[2:], "--data_cache", "false", "--logging_steps", "1") == 0
    out = Path("checkpoints/shop_dpo")
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_rewards_accuracy"] > 0.9 and results["eval_rewards_margin"] > 0.3
    assert results["eval_rewards_rejected"] < 0
    first, *_, last = read_log(out)
    assert last["rewards_margin"] > first["rewards_margin"] + 0.3
    assert (out / REFERENCE_FILE).is_file()
    assert [command[1] for command in (before, after, scores)] == ["predict_generation.py"] * 3

    assert run_entry(*reward[2:], "--data_cache", "false") == 0
    found = json.loads(Path("checkpoints/shop_rm/all_results.json").read_text())
    assert found["eval_rewards_accuracy"] > 0.9
    options = parse_options(scores[2:])
    options.check()
    predict(options)
    lines = [json.loads(line) for line in Path("rewards.json").read_text(encoding="utf-8").splitlines()]
    right = [line["reward_chosen"] > line["reward_rejected"] for line in lines]
    assert len(right) == 80 and sum(right) > 0.9 * len(right)


def test_both_pages_have_the_same_commands():
    assert commands("alignment.md") == commands("alignment_zh.md")
