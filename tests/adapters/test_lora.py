"""LoRA's initial weights follow seed and module name, also on a model's parts; PiSSA survives a restart."""

import numpy as np
import paddle
import pytest

from finetune.adapters.files import save_adapter
from finetune.adapters.initial_weights import draw_input_matrix
from finetune.adapters.lora import add_lora, load_lora
from finetune.errors import UserError
from finetune.machine.half_precision import half_precision_on_cpu
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny
from finetune.training.loss import logits_of
from tests.adapters.conftest import make_stage


def matrices(adapted, suffix="lora_A") -> dict[str, np.ndarray]:
    return {name: each.numpy() for name, each in adapted.model.state_dict().items() if name.endswith(suffix)}


def logits(model) -> np.ndarray:
    model.eval()
    return logits_of(model(input_ids=paddle.arange(3, 15).reshape([1, 12]))).numpy()


def test_initial_weights_depend_on_the_seed_and_not_on_other_draws(load, settings):
    model, family = load()
    first = matrices(add_lora(model, settings, family=family, dtype="float32", seed=1))
    paddle.rand([7])
    settings.lora_target_modules = [".*down_proj"]
    again = matrices(add_lora(load()[0], settings, family=family, dtype="float32", seed=1))
    for name, value in again.items():
        np.testing.assert_array_equal(value, first[name])
    other = matrices(add_lora(load()[0], settings, family=family, dtype="float32", seed=2))
    assert all(np.abs(other[name] - again[name]).max() > 0.01 for name in other)
    assert len({value.tobytes() for value in first.values()}) == len(first)


def test_distribution_is_that_of_paddlenlp_and_the_update_starts_at_zero(load, settings):
    model, family = load(hidden_size=64)
    settings.lora_rank = 32
    before = logits(model)
    adapted = add_lora(model, settings, family=family, dtype="float32", seed=1)
    for value in matrices(adapted).values():
        bound = 1 / np.sqrt(value.shape[0])
        assert 0.97 * bound < np.abs(value).max() <= bound
        assert value.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert abs(value.mean()) < 0.1 * bound
    assert all((value == 0).all() for value in matrices(adapted, "lora_B").values())
    np.testing.assert_allclose(logits(adapted), before, atol=1e-6)


def test_a_tensor_rank_gets_its_rows_of_the_whole_matrix(load):
    config = load()[0].config
    whole = paddle.create_parameter([12, 3], "float32")
    draw_input_matrix(whole, config, kind="default", seed=5)
    parts = []
    for rank in range(2):
        config.tensor_parallel_degree, config.tensor_parallel_rank = 2, rank
        part, replicated = (paddle.create_parameter([rows, 3], "float32") for rows in (6, 12))
        part.is_distributed = True
        draw_input_matrix(part, config, kind="default", seed=5)
        draw_input_matrix(replicated, config, kind="default", seed=5)
        np.testing.assert_array_equal(replicated.numpy(), whole.numpy())
        parts.append(part.numpy())
    np.testing.assert_array_equal(np.concatenate(parts), whole.numpy())


def test_a_pipeline_stage_gets_the_whole_models_weights_for_its_layers(load, settings):
    settings.lora_target_modules = [".*q_proj", r"llama\.layers\.0\..*o_proj"]
    settings.modules_to_save = ["embed_tokens"]
    model, family = load()
    whole = matrices(add_lora(model, settings, family=family, dtype="float32", seed=1))
    stage, _ = load()
    make_stage(stage, 2, 4, outside=["llama.embed_tokens", "lm_head"])
    settings.lora_target_modules.append("lm_head")  # a stub here, refused where it is
    part = matrices(add_lora(stage, settings, family=family, dtype="float32", seed=1))
    assert sorted(part) == [f"llama.layers.{number}.self_attn.q_proj.lora_A" for number in (2, 3)]
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name])


def test_what_is_no_linear_layer_is_refused(load, settings):
    settings.lora_target_modules = ["lm_head"]
    model, family = load()
    with pytest.raises(UserError, match="lm_head is a LlamaLMHead, but only linear layers"):
        add_lora(model, settings, family=family, dtype="float32")


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_stage_still_finds_typing_errors(load, settings, family):
    stage, record = load(family)
    make_stage(stage, 2, 4)
    settings.lora_target_modules = [rf".*\.{number}\..*" for number in (0, 3, 4)]
    with pytest.raises(UserError, match=r"no module matches '\.\*\\\\\.4\\\\\.\.\*'\. "):
        add_lora(stage, settings, family=record, dtype="float32")
    settings.lora_target_modules, settings.modules_to_save = None, ["layernorms"]
    with pytest.raises(UserError, match="no module called 'layernorms' with weights of its own; there are: "):
        add_lora(stage, settings, family=record, dtype="float32")


def test_pissa_has_no_more_vectors_than_a_matrix_has(load, settings):
    settings.pissa, settings.lora_rank = True, 4096
    model, family = load()
    with pytest.raises(
        UserError, match=r"lora_rank is 4096, but pissa needs at most \d+ for .*: lower lora_rank"
    ):
        add_lora(model, settings, family=family, dtype="float32")


def test_pissa_starts_where_the_model_is_and_goes_on_where_it_was_saved(load, settings, tmp_path):
    settings.pissa = True
    model, family = load()
    before = logits(model)
    adapted = add_lora(model, settings, family=family, dtype="float32", seed=1)
    np.testing.assert_allclose(logits(adapted), before, atol=1e-5)
    for parameter in adapted.parameters():
        if not parameter.stop_gradient:
            parameter.set_value(parameter + 0.1)
    trained = logits(adapted)
    assert np.abs(trained - before).max() > 0.01
    save_adapter(adapted, tmp_path)
    np.testing.assert_allclose(logits(load_lora(load()[0], tmp_path)), trained, atol=1e-5)


def test_an_adapter_trained_in_half_precision_takes_the_type_of_the_model(load, settings, tmp_path):
    model, family = load()
    adapted = add_lora(model, settings, family=family, dtype="bfloat16", seed=1)
    for parameter in adapted.parameters():
        if not parameter.stop_gradient:
            parameter.set_value(paddle.full(parameter.shape, 0.125, parameter.dtype))
    save_adapter(adapted, tmp_path)
    assert '"dtype": "bfloat16"' in (tmp_path / "lora_config.json").read_text()
    loaded = load_lora(load()[0], tmp_path)
    trained = [each for each in loaded.parameters() if not each.stop_gradient]
    assert trained and {each.dtype for each in trained} == {paddle.float32}
    assert {float(each.max()) for each in trained} == {0.125}
    assert np.isfinite(logits(loaded)).all()


def test_matrices_in_float32_stay_so_beside_weights_in_half_precision(settings, tmp_path):
    """PaddleNLP's trainer has Paddle make half-precision weights of all that are float32."""
    settings.lora_dtype = "float32"
    settings.lora_target_modules = ["q_proj", "embed_tokens"]
    with half_precision_on_cpu():
        model = build_tiny(
            "llama", tmp_path / "tiny", vocab_size=400, num_layers=1, num_heads=2, hidden_size=16
        )
        resolved = resolve_model(model)
        base = load_model(resolved, dtype="bfloat16")
        adapted = add_lora(base, settings, family=resolved.family, dtype="bfloat16", seed=1)
        paddle.amp.decorate(models=adapted, level="O2", dtype="bfloat16")
        types = {name.rpartition(".")[2]: each.dtype for name, each in adapted.named_parameters()}
        assert types["lora_A"] == types["lora_B"] == paddle.float32 and types["weight"] == paddle.bfloat16
        with paddle.amp.auto_cast(level="O2", dtype="bfloat16"):
            loss = (
                logits_of(adapted(input_ids=paddle.arange(4, 10).reshape([2, 3])))
                .astype("float32")
                .square()
                .mean()
            )
        loss.backward()
        assert {each.grad.dtype for each in adapted.parameters() if not each.stop_gradient} == {
            paddle.float32
        }
