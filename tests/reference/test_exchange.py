"""Folders and adapters go to Hugging Face's tools and come back: transformers loads what is exported and continues
texts as this project does, peft loads exported adapters, and peft's own merges equal those of merge_lora_params.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.families.family import find_family, get_family
from finetune.merge.lora import MergeOptions, export_peft, merge
from finetune.models.tiny.checkpoint import build_tiny
from tests.families.cases import FACTS, TIED
from tests.merge.lora_writing import folder_logits, write_adapter, write_base
from tests.merge.rank_writing import read_whole
from tests.reference.exchange import (
    FAMILIES,
    NEEDS_PEFT,
    check_close,
    load_theirs,
    their_logits,
    train_peft,
    write_their_config,
)

NUM_TOKENS = 20
LARGER = 20
PROMPTS = ("今天天气很好，我们去公园。", "问题：水在什么时候结冰？ 答案：", "The answer is")

pytestmark = NEEDS_PEFT


def our_texts(folder: Path) -> list[tuple[list[int], str]]:
    """Greedy continuations by this project's model and tokenizer: the likeliest token, again and again."""
    import paddle

    from finetune.models.loading import load_model
    from finetune.models.resolve import resolve_model
    from finetune.tokenizers.encoder import FamilyEncoder
    from finetune.tokenizers.loading import load_tokenizer
    from finetune.training.loss import logits_of

    resolved = resolve_model(folder)
    tokenizer = load_tokenizer(folder, resolved.family)
    end = FamilyEncoder(tokenizer, resolved.family).eos_token_id
    model, texts = load_model(resolved, dtype="float32"), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        length = len(ids)
        while len(ids) < length + NUM_TOKENS and end not in ids[length:]:
            with paddle.no_grad():
                ids.append(int(logits_of(model(input_ids=paddle.to_tensor([ids])))[0, -1].argmax()))
        texts.append((ids[length:], tokenizer.decode(ids[length:], skip_special_tokens=True)))
    return texts


def their_texts(folder: Path) -> list[tuple[list[int], str]]:
    """The same by transformers, from the exported folder alone."""
    import transformers

    family = find_family(json.loads((folder / "config.json").read_text()))
    is_fast = FACTS[family.name].fast_tokenizer_agrees
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=is_fast)
    model, texts = load_theirs(folder), []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")
        found = model.generate(**given, do_sample=False, max_new_tokens=NUM_TOKENS)
        ids = found[0, given["input_ids"].shape[1] :].tolist()
        texts.append((ids, tokenizer.decode(ids, skip_special_tokens=True)))
    return texts


def readable(text: str) -> list[str]:
    """The stretches of a text that are Chinese characters."""
    return re.findall("[\u4e00-\u9fff]+", text)


def enlarge(folder: Path) -> None:
    """Larger matrices within the layers, so that what a model writes depends on what it reads."""
    weights = load_file(folder / "model.safetensors")
    larger = {
        name: value * np.float32(LARGER if value.ndim > 1 and re.search(r"\.\d+\.", name) else 1)
        for name, value in weights.items()
    }
    save_file(larger, folder / "model.safetensors", metadata={"format": "np"})


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_the_exported_folder_and_writes_the_same_text(name, tmp_path):
    import transformers

    from finetune.tokenizers.loading import load_tokenizer

    base = build_tiny(name, tmp_path / "base", hidden_size=32, num_layers=2, num_heads=4, vocab_size=600)
    enlarge(base)
    adapter, ours, theirs = tmp_path / "adapter", tmp_path / "ours", tmp_path / "theirs"
    expected = write_adapter(adapter, base)
    load_tokenizer(base, get_family(name)).save_pretrained(str(adapter))  # as a run leaves it
    (base / "chat_template.jinja").write_text(
        "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    )
    merge(MergeOptions(base, (adapter,), ours))
    merge(MergeOptions(base, (adapter,), theirs, save_format="hf"))
    check_close(their_logits(load_theirs(theirs)), expected)
    written, expected_texts = their_texts(theirs), our_texts(ours)
    assert [ids for ids, _ in written] == [ids for ids, _ in expected_texts]
    assert len({text for _, text in written}) == len(PROMPTS) and len(set(written[0][0])) > 3, (
        "worth comparing"
    )
    for (_, text), (_, expected_text) in zip(written, expected_texts, strict=True):
        # Bytes that are no text are shown as one mark each or as one for all.
        assert readable(text) == readable(expected_text)
    for path in (adapter / "special_tokens_map.json", base / "generation_config.json"):
        assert (theirs / path.name).read_bytes() == path.read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"


@pytest.mark.parametrize(("name", "rslora"), [(name, number == 0) for number, name in enumerate(FAMILIES)])
def test_peft_loads_the_exported_adapter(name, rslora, tmp_path):
    import peft

    base = write_base(tmp_path / "base", name)
    expected = write_adapter(tmp_path / "adapter", base, lora_alpha=4, rslora=rslora)
    nothing = tmp_path / "nothing"
    write_adapter(nothing, base, lora_alpha=0)
    merge(MergeOptions(base, (nothing,), tmp_path / "theirs", save_format="hf"))
    export_peft(MergeOptions(base, (tmp_path / "adapter",), tmp_path / "exported"))
    model = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "theirs"), str(tmp_path / "exported"))
    check_close(their_logits(model), expected)


@pytest.mark.parametrize("name", [name for name in TIED if name in FAMILIES])  # that transformers has
def test_peft_gets_a_tied_embedding_in_both_its_uses(name, tmp_path):
    import peft

    config = FACTS[name].tied_config
    base, adapter, exported = write_base(tmp_path / "base", name, **config), tmp_path / "a", tmp_path / "peft"
    expected = write_adapter(adapter, base, modules_to_save=[TIED[name]])
    write_adapter(tmp_path / "nothing", base, lora_alpha=0)
    merge(MergeOptions(base, (tmp_path / "nothing",), tmp_path / "theirs", save_format="hf"))
    merge(MergeOptions(base, (adapter,), tmp_path / "merged", save_format="hf"))
    export_peft(MergeOptions(base, (adapter,), exported))
    assert "lm_head" in json.loads((exported / "adapter_config.json").read_text())["modules_to_save"]
    model = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "theirs"), str(exported))
    check_close(their_logits(model), expected)
    check_close(their_logits(model), their_logits(load_theirs(tmp_path / "merged")))
    assert np.abs(folder_logits(base) - expected).max() > 0.01, "worth comparing"
    merge(MergeOptions(base, (exported,), tmp_path / "again"))
    check_close(folder_logits(tmp_path / "again"), expected)


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 3}},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "all layers": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_merge_of_a_peft_adapter_is_pefts_own(settings, tmp_path):
    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    model = train_peft(base, tmp_path / "adapter", **SETTINGS[settings])
    expected = their_logits(model)
    theirs = {name: value.numpy() for name, value in model.merge_and_unload().state_dict().items()}
    merge(MergeOptions(base, (tmp_path / "adapter",), tmp_path / "merged", verify=True))
    ours = read_whole(tmp_path / "merged")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=5e-7, rtol=1e-6, err_msg=name)
    check_close(folder_logits(tmp_path / "merged"), expected)
    plain = folder_logits(base)
    assert np.abs(plain - expected).max() > 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_adapter_on_a_base_in_paddlenlps_form(name, tmp_path):
    base = write_base(tmp_path / "base", name)
    theirs = write_base(tmp_path / "theirs", name, hugging_face=True)
    config = json.loads((theirs / "config.json").read_text())
    write_their_config(theirs, name, config)
    model = train_peft(theirs, tmp_path / "adapter", target_modules="all-linear")
    merge(MergeOptions(base, (tmp_path / "adapter",), tmp_path / "merged", save_format="paddle"))
    check_close(folder_logits(tmp_path / "merged"), their_logits(model))


def test_pickled_weights_of_peft(tmp_path):
    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    model = train_peft(base, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    for source, out in (("adapter", "one"), ("pickled", "two")):
        merge(MergeOptions(base, (tmp_path / source,), tmp_path / out))
    one, two = read_whole(tmp_path / "one"), read_whole(tmp_path / "two")
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


REFUSED = {
    "pissa": ({"init_lora_weights": "pissa"}, "its base was changed before training"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_alone_can_merge_is_refused(case, tmp_path):
    from finetune.errors import UserError

    settings, message = REFUSED[case]
    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    train_peft(base, tmp_path / "adapter", **settings)
    with pytest.raises(UserError, match=message):
        merge(MergeOptions(base, (tmp_path / "adapter",), tmp_path / "merged"))


def test_prefix_of_peft_is_refused(tmp_path):
    import peft

    from finetune.errors import UserError

    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    settings = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    peft.get_peft_model(load_theirs(base), settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"has peft_type 'PREFIX_TUNING': it is a prefix of peft"):
        merge(MergeOptions(base, (tmp_path / "adapter",), tmp_path / "merged"))


def test_tied_layers_that_peft_parted_are_refused(tmp_path):
    from finetune.errors import UserError

    base = write_base(tmp_path / "base", "qwen2", hugging_face=True, tie_word_embeddings=True)
    train_peft(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match="embedding and output layer of this base are one tensor"):
        merge(MergeOptions(base, (tmp_path / "adapter",), tmp_path / "merged"))
