"""Training in bfloat16 and float16 gives the losses of PyTorch, and one AdamW update the same master weights."""

from __future__ import annotations

import importlib.util
import json
import os

import numpy as np
import pytest

from tests.conftest import read_log, run_entry, write_arguments
from tests.reference.curves import COMMON, HERE, NUM_STEPS, build_adapter, build_model
from tests.reference.half_curves import GOLDEN, HALF_CASES

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"
live = pytest.mark.skipif(
    not HAS_TORCH and not REQUIRED, reason="PyTorch is not installed; make parity installs it"
)
LOSS_TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def our_curves(tmp_path_factory):
    """Our curve of each case, through the entry script, computed once."""
    folder = tmp_path_factory.mktemp("half_curves")
    found: dict[str, list[dict]] = {}

    def curve(name: str) -> list[dict]:
        if name not in found:
            half, model = HALF_CASES[name], folder / "model"
            if not model.exists():
                build_model(model)
            settings = COMMON | half.case.arguments | half.arguments()
            if half.case.lora:
                settings |= {"lora_path": str(build_adapter(folder / f"{name}_adapter", model))}
            places = {
                "model_name_or_path": str(model),
                "dataset_name_or_path": str(HERE / "data"),
                "output_dir": str(folder / name),
            }
            assert run_entry(write_arguments(folder / f"{name}.json", **settings | places)) == 0
            found[name] = read_log(folder / name)
        return found[name]

    return curve


@pytest.fixture(scope="module")
def live_curves():
    """The reference, trained now."""
    from tests.reference.transformers_half_training import half_curves

    return half_curves()


def assert_close(ours: list[dict], reference: list[dict]) -> None:
    assert len(ours) == len(reference) == NUM_STEPS
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.015, "the curve must move, or closeness says nothing"
    for step, (mine, theirs) in enumerate(zip(ours, reference, strict=True), start=1):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=LOSS_TOLERANCE), f"step {step}"
    # Later ones drift: in bfloat16 the gradients of these LoRA matrices are mostly what rounding leaves. PyTorch's own
    # first norm at level O1 is 2.3 % below that in float32.
    assert ours[0]["grad_norm"] == pytest.approx(reference[0]["grad_norm"], rel=0.03)


@pytest.mark.parametrize("name", HALF_CASES)
def test_losses_are_those_of_the_golden_curve(our_curves, name):
    assert_close(our_curves(name), json.loads(GOLDEN.read_text())["curves"][name])


@pytest.mark.parity
@live
@pytest.mark.parametrize("name", HALF_CASES)
def test_losses_are_those_of_a_live_run_of_pytorch(our_curves, name, live_curves):
    assert_close(our_curves(name), live_curves[name])


@pytest.mark.parity
@live
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_master_weights_after_one_update_are_pytorchs(dtype):
    """The same half-precision weights and gradients: AdamW leaves the same float32 weights."""
    import paddle
    import torch

    from finetune.machine.half_precision import half_precision_on_cpu

    draw = np.random.default_rng(0)
    weight, gradient = (
        torch.from_numpy(draw.normal(0, size, (64, 33)).astype(np.float32)).to(getattr(torch, dtype))
        for size in (0.5, 0.1)
    )
    master = weight.float().clone().requires_grad_()
    master.grad = gradient.float()
    torch.optim.AdamW([master], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1).step()

    with half_precision_on_cpu():
        layer = paddle.nn.Embedding(64, 33)
        layer.weight.set_value(weight.float().numpy())
        paddle.amp.decorate(models=layer, level="O2", dtype=dtype)
        parameter = layer.weight
        parameter.grad = paddle.to_tensor(gradient.float().numpy()).astype(dtype)
        optimizer = paddle.optimizer.AdamW(
            1e-2, parameters=[parameter], weight_decay=0.1, multi_precision=True
        )
        optimizer.step()
        ours = optimizer._master_weights[parameter.name].numpy()
        rounded = parameter.astype("float32").numpy()
    np.testing.assert_allclose(ours, master.detach().numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(rounded, torch.from_numpy(ours).to(weight.dtype).float().numpy())
