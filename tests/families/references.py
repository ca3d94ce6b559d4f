"""What each family is compared with."""

from __future__ import annotations

import json

from finetune.families.family import find_family
from tests.reference import logits
from tests.reference.chatglm2_qwen_published import PUBLISHED
from tests.reference.published_forms import PublishedForm

WRITTEN, REARRANGED = "written", "rearranged"
"""References of families that transformers has no code of: one written for the tests, and its Llama with the weights in
another order."""


def references() -> dict[str, list[str]]:
    """Family -> `WRITTEN`, `REARRANGED`, or the models of transformers, by the cases that are compared."""
    found: dict[str, list[str]] = {name: [WRITTEN] for name in PUBLISHED}
    checkpoints = json.loads(logits.GOLDEN_CHECKPOINTS.read_text())["checkpoints"]
    for name, case in logits.CASES.items():
        family = find_family(case.form.config_of(checkpoints[name]["config"])).name
        kind = case.transformers_class if case.form == PublishedForm() else REARRANGED
        if kind not in found.setdefault(family, []):
            found[family].append(kind)
    return found
