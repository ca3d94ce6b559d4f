"""The flow of Chinese-LLaMA-Alpaca-2 with an adapter that peft trained: transformers and this project agree at its end."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.merge.lora import main as merge_main
from tests.conftest import run_entry
from tests.end_to_end.alpaca_flow import NEW, TARGETS, add_tokenizer, write_base, write_sft
from tests.end_to_end.test_peft_start import adapted_logits
from tests.merge.lora_writing import folder_logits
from tests.reference.exchange import HAS_PEFT, REQUIRED, check_close, load_theirs, their_logits

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not HAS_PEFT and not REQUIRED, reason="PyTorch is not installed; make parity installs it"
    ),
]


FORMS = {
    "plain, pickled": ({}, False),
    "of single layers": (
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 3}}, True,
    ),
}  # fmt: skip
"""Fields of peft's configuration, and whether its file is a safetensors one."""


def train_theirs(base, folder, fields, *, safe):
    """An adapter as the project trains it: all linear layers, embedding and output layer whole, more tokens."""
    import peft
    import torch

    torch.manual_seed(0)
    model = load_theirs(base)
    model.resize_token_embeddings(NEW)
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(TARGETS), modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM", **fields,
    )  # fmt: skip
    model = peft.get_peft_model(model, settings)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.02)
    for _ in range(3):
        ids = torch.randint(3, NEW, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder, safe_serialization=safe)
    return their_logits(model)


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_flow(form, tmp_path):
    base, adapter = write_base(tmp_path), tmp_path / "peft"
    expected = train_theirs(base, adapter, FORMS[form][0], safe=FORMS[form][1])
    add_tokenizer(adapter, tmp_path)
    check_close(adapted_logits(base, adapter), expected)
    assert run_entry(write_sft(tmp_path, base, adapter)) == 0
    trained = adapted_logits(base, tmp_path / "sft")
    assert np.abs(trained - expected).max() > 0.01, "the SFT changed it"
    # In the base's form, which is Hugging Face's; as merge_lora_params.py does it.
    merge_main(["--model_name_or_path", str(base), "--lora_path", str(tmp_path / "sft"), "--merge_model_path",
                str(tmp_path / "merged")])  # fmt: skip
    check_close(folder_logits(tmp_path / "merged"), trained)
    check_close(their_logits(load_theirs(tmp_path / "merged")), trained)
