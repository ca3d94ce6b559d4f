"""The token loop: PaddleNLP's text, whatever the batch, for every family and with adapters."""

from __future__ import annotations

import pytest

from finetune.families.family import families, get_family
from finetune.serving.decoding.decoder import StaticDecoder
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.dynamic import DynamicDecoder
from finetune.serving.predict.loading import load_pair, plan_model
from tests.families.decoding import with_lora, with_prefix
from tests.serving.export.builders import build_sharp, dynamic_model, dynamic_text, prompts
from tests.serving.predict.builders import save_prefix

GREEDY = DecodingSettings(max_new_tokens=12, stop_ids=())
SAMPLED = DecodingSettings(
    max_new_tokens=16, top_k=0, top_p=0.9, temperature=1.2, repetition_penalty=1.1, seed=7
)


def decoder_of(model, family: str = "llama") -> DynamicDecoder:
    return DynamicDecoder(model, get_family(family), stop_ids=(2,), pad_token_id=0)


@pytest.mark.parametrize("family", sorted(families()))
def test_greedy_text_is_that_of_paddlenlp_alone_and_in_a_batch(family, tmp_path):
    folder = build_sharp(family, tmp_path / "model")
    model = dynamic_model(folder)
    rows = prompts()
    expected = dynamic_text(model, rows, GREEDY)
    decoder = decoder_of(model, family)
    assert decoder.generate(rows, GREEDY) == expected
    assert [decoder.generate([row], GREEDY)[0] for row in rows[:2]] == expected[:2]
    assert len({token for answer in expected for token in answer}) > 8


@pytest.mark.parametrize("adapt", [with_lora, with_prefix])
def test_an_adapter_answers_and_can_be_switched_off(sharp_llama, adapt):
    import paddle

    base_text = dynamic_text(dynamic_model(sharp_llama), prompts(), GREEDY)
    adapted = adapt(dynamic_model(sharp_llama), get_family("llama"))
    adapted.eval()
    paddle.seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.set_value(paddle.randn(parameter.shape) * 0.3)
    tuned = decoder_of(adapted)
    expected = dynamic_text(adapted if adapt is with_prefix else adapted.model, prompts(), GREEDY)
    base = tuned.without_adapter()
    assert tuned.generate(prompts(), GREEDY) == expected != base_text
    assert base.generate(prompts(), GREEDY) == base_text
    assert tuned.generate(prompts(), GREEDY) == expected


def test_a_sample_depends_on_its_seed_and_number_alone(sharp_llama, exported_llama):
    decoder = decoder_of(dynamic_model(sharp_llama))
    rows = prompts()
    together = decoder.generate(rows, SAMPLED, samples=[5, 6, 7, 8])
    backwards = decoder.generate(rows[::-1], SAMPLED, samples=[8, 7, 6, 5])[::-1]
    alone = [decoder.generate([row], SAMPLED, samples=[5 + place])[0] for place, row in enumerate(rows)]
    assert together == backwards == alone
    assert decoder.generate(rows[:1], SAMPLED, samples=[9]) != together[:1]
    assert StaticDecoder(exported_llama).generate(rows, SAMPLED, samples=[5, 6, 7, 8]) == together


def test_tokens_are_shown_as_they_come_and_rows_end_at_a_stop_id(sharp_llama):
    decoder = decoder_of(dynamic_model(sharp_llama))
    whole = decoder.generate(prompts(), GREEDY)
    stop = whole[0][3]
    settings = DecodingSettings(max_new_tokens=12, stop_ids=(stop,))
    shown: list = []
    answers = decoder.generate(prompts(), settings, on_tokens=shown.append)
    expected = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert answers == expected and len(answers[0]) <= 3
    assert [[token for step in shown for token in step[row]] for row in range(4)] == expected
    longer = DecodingSettings(max_new_tokens=12, min_new_tokens=8, stop_ids=(stop,))
    assert all(len(row) >= 8 for row in decoder.generate(prompts(), longer))


def test_a_pair_loads_its_base_once_unless_the_adapter_changed_it(sharp_llama, lora_folder, tmp_path):
    lora = ModelOptions(model_name_or_path=str(sharp_llama), lora_path=lora_folder)
    base, tuned = load_pair(plan_model(lora))
    assert base.decoder._base is tuned.decoder._base
    assert base.decoder.generate(prompts(), GREEDY) == dynamic_text(
        dynamic_model(sharp_llama), prompts(), GREEDY
    )
    config = lora_folder / "lora_config.json"
    tuned.decoder._model.lora_config.trainable_modules = [".*embed.*"]
    assert config.is_file() and not tuned.decoder.can_switch_off

    prefix = save_prefix(sharp_llama, tmp_path / "prefix")
    base, tuned = load_pair(plan_model(ModelOptions(model_name_or_path=str(sharp_llama), prefix_path=prefix)))
    assert base.decoder.generate(prompts(), GREEDY) != tuned.decoder.generate(prompts(), GREEDY)
