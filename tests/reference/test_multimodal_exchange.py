"""Merged multimodal folders in transformers' multimodal classes, and exported adapters on the whole model in peft."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.merge.lora import MergeOptions, export_peft, merge
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.training.loss import logits_of
from tests.merge.lora_writing import write_adapter
from tests.multimodal_folders import FOLDERS, build_multimodal
from tests.reference.exchange import NEEDS_PEFT
from tests.reference.multimodal import CASES

pytestmark = NEEDS_PEFT
TOLERANCE = 1e-5


def continued(ids, logits_of_last, num_tokens=12) -> list[int]:
    """The likeliest token again and again."""
    ids = list(ids)
    for _ in range(num_tokens):
        ids.append(int(logits_of_last(ids).argmax()))
    return ids


@pytest.mark.parametrize("name", [name for name, case in FOLDERS.items() if case.golden])
def test_transformers_and_peft_load_what_is_merged_and_exported(name, tmp_path):
    import peft
    import torch
    import transformers

    model_class = getattr(transformers, CASES[name].model_class, None)
    if model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {CASES[name].model_class}")
    base, adapter = build_multimodal(name, tmp_path / "base"), tmp_path / "adapter"
    write_adapter(adapter, base)
    merge(MergeOptions(base, (adapter,), tmp_path / "merged"))
    export_peft(MergeOptions(base, (adapter,), tmp_path / "peft", save_format="peft"))
    ours = load_model(resolve_model(tmp_path / "merged"), dtype="float32")
    whole, told = model_class.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(told.values())
    adapted = peft.PeftModel.from_pretrained(model_class.from_pretrained(base).float(), tmp_path / "peft")

    def our_last(ids):
        import paddle

        with paddle.no_grad():
            return logits_of(ours(input_ids=paddle.to_tensor([ids])))[0, -1].numpy()

    def their_last(model):
        def last(ids):
            with torch.no_grad():
                return model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()

        return last

    prompt = [5, 9, 100, 77, 30, 200, 41]
    wanted = continued(prompt, our_last)
    for model in (whole.float().eval(), adapted.eval()):
        assert continued(prompt, their_last(model)) == wanted
        np.testing.assert_allclose(their_last(model)(prompt), our_last(prompt), atol=TOLERANCE)
