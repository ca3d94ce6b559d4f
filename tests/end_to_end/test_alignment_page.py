"""The tutorial of docs/alignment.md runs as it stands there, its first training cut short, and does what it says."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from finetune.models.tiny.__main__ import main
from finetune.run.reference import REFERENCE_FILE
from tests.conftest import ROOT, read_log, run_entry
from tests.end_to_end.test_family_readmes import BLOCK


def commands(page: str) -> list[list[str]]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [shlex.split(line) for block in BLOCK.findall(text) for line in block.splitlines()]


def test_margins_of_held_out_pairs_are_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data", "llama"):
        (tmp_path / name).symlink_to(ROOT / name)
    tiny, supervised, aligned, *answers = commands("alignment.md")
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
    assert [command[1] for command in answers] == ["predict_generation.py"] * 2


def test_both_pages_have_the_same_commands():
    assert commands("alignment.md") == commands("alignment_zh.md")
