"""Every answer is the one that the same request gets alone, whoever joins and leaves meanwhile."""

from __future__ import annotations

import pytest

from finetune.families.family import families, get_family
from finetune.serving.batching.dynamic_batch import DynamicRows
from finetune.serving.batching.static_batch import StaticRows
from finetune.serving.decoding.decoder import StaticDecoder
from finetune.serving.predict.dynamic import DynamicDecoder
from tests.families.cases import FACTS
from tests.families.decoding import CONTEXT_END, NUM_PREFIX_TOKENS, with_lora, with_prefix
from tests.serving.batching.builders import Told, alone, decoding, make_row
from tests.serving.export.builders import build_sharp, dynamic_model, export_folder, prompts
from tests.serving.predict.builders import save_prefix

SETTINGS = (
    {"max_new_tokens": 17},
    {"max_new_tokens": 4, "temperature": 1.2, "seed": 5},
    {"max_new_tokens": 1},
    {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 2**63 - 1},
    {"max_new_tokens": 9},
    {"max_new_tokens": 22, "temperature": 1.2, "seed": 7},
)
LENGTHS = (5, 9, 3, 12, 30, 1, 7, 20, 16)


def check_rows(maker, decoder, *, stop_ids=(), ending=()) -> None:
    """Nine requests on three places: some join rows that are half done, some find the places empty."""
    told = Told()
    rows = [
        make_row(
            told, number, [*prompt, *ending], sample=0, stop_ids=stop_ids, **SETTINGS[number % len(SETTINGS)]
        )
        for number, prompt in enumerate(prompts(LENGTHS))
    ]
    expected = [alone(decoder, row) for row in rows]
    with decoding(maker) as engine:
        for row in rows:
            engine.submit([[row]])
        told.wait(len(rows))
        assert engine.num_rows == 0
    assert [row.tokens for row in rows] == expected
    assert len({token for row in rows for token in row.tokens}) > 20
    assert {update.finish for update in told.last.values()} <= {"stop", "length"}


def decoder_of(model, family: str = "llama") -> DynamicDecoder:
    return DynamicDecoder(model, get_family(family), stop_ids=(2,), pad_token_id=0)


@pytest.mark.parametrize("family", sorted(families()))
def test_every_family_decodes_rows_that_come_and_go(family, tmp_path):
    decoder = decoder_of(dynamic_model(build_sharp(family, tmp_path / "model")), family)
    check_rows(DynamicRows(decoder), decoder, ending=CONTEXT_END if FACTS[family].sees_ahead else ())


@pytest.mark.parametrize(("adapt", "num_prefix"), [(with_lora, 0), (with_prefix, NUM_PREFIX_TOKENS)])
def test_so_do_adapters(sharp_llama, adapt, num_prefix):
    import paddle

    model = adapt(dynamic_model(sharp_llama), get_family("llama"))
    model.eval()
    paddle.seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.set_value(paddle.randn(parameter.shape) * 0.3)
    decoder = decoder_of(model)
    maker = DynamicRows(decoder)
    check_rows(maker, decoder)
    assert maker.form.num_prefix == num_prefix


def test_so_does_a_prefix_where_rows_come_second(tmp_path):
    folder = build_sharp("chatglm2", tmp_path / "model")
    decoder = decoder_of(with_prefix(dynamic_model(folder), get_family("chatglm2")), "chatglm2")
    check_rows(DynamicRows(decoder), decoder)


def test_so_does_an_exported_graph(exported_llama):
    decoder = StaticDecoder(exported_llama)
    check_rows(StaticRows(decoder), decoder)


def test_so_does_an_exported_graph_of_texts_with_contexts(tmp_path):
    model = build_sharp("chatglm", tmp_path / "model")
    prefix = save_prefix(model, tmp_path / "prefix")
    decoder = StaticDecoder(export_folder(model, tmp_path / "static", prefix_path=prefix))
    check_rows(StaticRows(decoder), decoder, ending=CONTEXT_END)


def test_so_does_an_exported_graph_with_a_prefix_and_learned_positions(tmp_path):
    model = build_sharp("opt", tmp_path / "model")
    prefix = save_prefix(model, tmp_path / "prefix")
    decoder = StaticDecoder(export_folder(model, tmp_path / "static", prefix_path=prefix))
    check_rows(StaticRows(decoder), decoder)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_rows_end_at_a_stop_token_in_the_middle_of_others(sharp_llama, exported_llama, kind):
    is_static = kind == "static"
    decoder = StaticDecoder(exported_llama) if is_static else decoder_of(dynamic_model(sharp_llama))
    told = Told()
    whole = alone(decoder, make_row(told, 0, prompts(LENGTHS)[0], max_new_tokens=17))
    check_rows((StaticRows if is_static else DynamicRows)(decoder), decoder, stop_ids=(whole[6], whole[9]))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_answers_to_one_prompt_differ_by_their_number_alone(sharp_llama, exported_llama, kind):
    is_static = kind == "static"
    decoder = StaticDecoder(exported_llama) if is_static else decoder_of(dynamic_model(sharp_llama))
    told = Told()
    prompt = prompts()[1]
    rows = [
        make_row(told, number, prompt, sample=number, temperature=1.5, seed=11, max_new_tokens=10)
        for number in range(5)  # more than there are places
    ]
    with decoding((StaticRows if is_static else DynamicRows)(decoder)) as engine:
        engine.submit([rows])
        told.wait(5)
    assert [row.tokens for row in rows] == [alone(decoder, row, number) for number, row in enumerate(rows)]
    assert len({tuple(row.tokens) for row in rows}) == 5
