"""A tiny Llama trained under Fleet's sharding stages 2 and 3 on CPU processes, as a run would have to.

Each rank takes its own micro-batches of a global batch; a loss is divided by the label tokens of the whole one. Fleet
divides gradients by the number of ranks, for which losses make up beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_utils import GroupShardedScaler
from paddle.distributed.fleet.utils.mix_precision_utils import MixPrecisionLayer, MixPrecisionOptimizer
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.fleet_group_sharded import cpu_as_accelerator, wrap_stage_2, wrap_stage_3

VOCAB, NUM_MICRO_BATCHES, MAX_NORM, LOSS_SCALE = 61, 4, 0.5, 1024
WHOLE_ELEMENTS = 100  # norms stay whole at stage 3
Case = Mapping[str, Any]
Facts = dict[str, Any]


def make_model(case: Case) -> Any:
    paddle.seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCAB, use_cache=False, tie_word_embeddings=case.get("tied", False), **sizes
    )
    model = LlamaForCausalLM(config)
    if case.get("lora"):
        model = LoRAModel(model, LoRAConfig(target_modules=[".*q_proj", ".*v_proj"], r=2, lora_alpha=4))
        model.mark_only_lora_as_trainable()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.set_value(paddle.randn(parameter.shape) * 0.1)
    if case.get("recompute"):
        model.recompute_enable()
    if case.get("unused"):  # as experts are that get no token
        model.add_parameter("unused", model.create_parameter([3]))
    if "dtype" in case:
        model.to(dtype=case["dtype"])
    for name, parameter in model.named_parameters():
        if name in case.get("weights", ()):
            parameter.set_value(case["weights"][name].astype(parameter.numpy().dtype))
    model.train()
    return model


def batches(step: int, case: Case) -> list[Any]:
    """Micro-batches of a step, of different lengths; one only in the step that leaves ranks without samples."""
    source = np.random.default_rng(step)
    count = 1 if step == case.get("idle_step") else case.get("num_micro_batches", NUM_MICRO_BATCHES)
    lengths = source.integers(5, 9, count)
    return [paddle.to_tensor(source.integers(0, VOCAB, (2, int(length)))) for length in lengths]


def loss_of(model: Any, ids: Any, label_tokens: int, weight: float = 1.0) -> Any:
    outputs = model(ids)
    logits = (outputs[0] if isinstance(outputs, (tuple, list)) else outputs)[:, :-1].astype("float32")
    losses = paddle.nn.functional.cross_entropy(
        logits.reshape([-1, VOCAB]), ids[:, 1:].flatten(), reduction="sum"
    )
    return losses * (weight / label_tokens)


def count_labels(every: list[Any]) -> int:
    return sum(each.shape[0] * (each.shape[1] - 1) for each in every)


def make_optimizer(parameters: list[Any], case: Case) -> Any:
    return paddle.optimizer.AdamW(
        0.02,
        parameters=parameters,
        weight_decay=0.1,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(MAX_NORM),
        multi_precision="dtype" in case,
    )


def trained_of(model: Any) -> dict[str, Any]:
    return {name: each for name, each in model.named_parameters() if not each.stop_gradient}


def weights_of(model: Any) -> dict[str, Any]:
    return {name: each.astype("float32").numpy() for name, each in model.named_parameters()}


def square_of(gradients: Any) -> float:
    return sum(float((each.astype("float32") ** 2).sum()) for each in gradients if each is not None)


def step_optimizer(optimizer: Any, scaler: Any) -> None:
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def train_alone(case: Case, num_steps: int) -> Facts:
    """Losses, gradient norms and final weights of one process."""
    model = make_model(case)
    trained = list(trained_of(model).values())
    optimizer = make_optimizer(trained, case)
    scaler = paddle.amp.GradScaler(init_loss_scaling=LOSS_SCALE) if case.get("scaler") else None
    facts: Facts = {"losses": [], "norms": []}
    for step in range(num_steps):
        every = batches(step, case)
        losses = []
        for ids in every:
            loss = loss_of(model, ids, count_labels(every))
            (scaler.scale(loss) if scaler else loss).backward()
            losses.append(float(loss))
        facts["losses"].append(sum(losses))
        facts["norms"].append(square_of(each.grad for each in trained) ** 0.5)
        step_optimizer(optimizer, scaler)
        optimizer.clear_grad(set_to_zero=False)
    return facts | {"weights": weights_of(model)}


class FleetRun:
    """This rank's part of a run under Fleet's stage 2 or 3; within `cpu_as_accelerator`.

    Args:
        case: "stage" and what is special about it.
        group: `finetune.processes.groups.Group` of all ranks.
    """

    def __init__(self, case: Case, group: Any):
        self.case, self.group, self.stage = case, group, case["stage"]
        self.inner = model = make_model(case)
        self.trained = trained_of(model)
        optimizer = make_optimizer(list(self.trained.values()), case)
        if case.get("master"):
            model, optimizer = (
                MixPrecisionLayer(model, dtype=case["dtype"]),
                MixPrecisionOptimizer(optimizer),
            )
        self.tasks: list[Any] = []
        if self.stage == 2:
            size = case.get("buffer_elements", 2**23)
            self.model, self.optimizer = wrap_stage_2(model, optimizer, group.handle, buffer_elements=size)
            self.model._set_reduce_overlap(case.get("overlaps", False))
            update = self.optimizer._update_task
            self.optimizer._update_task = lambda task: (self.tasks.append(task), update(task))
        else:
            self.model, self.optimizer = wrap_stage_3(
                model, optimizer, group.handle, whole_elements=WHOLE_ELEMENTS
            )
        scaler = paddle.amp.GradScaler(init_loss_scaling=LOSS_SCALE) if case.get("scaler") else None
        self.scaler = GroupShardedScaler(scaler) if scaler else None
        self.facts: Facts = {"losses": [], "norms": [], "num_gradients_held": 0}

    def train(self, steps: range) -> None:
        """Takes some steps."""
        for step in steps:
            every, losses = batches(step, self.case), []
            mine = [(ids, 1.0) for ids in every[self.group.position :: self.group.size]]
            while len(mine) < -(-len(every) // self.group.size):  # or the others would wait for ever
                mine.append((every[0], 0.0))
            for ids, weight in mine:
                loss = loss_of(self.model, ids, count_labels(every), weight * self.group.size)
                self._note_gradients()
                (self.scaler.scale(loss) if self.scaler else loss).backward()
                losses.append(float(loss) / self.group.size)
                if self.case.get("waits"):
                    self._wait()
            self.facts["losses"] += self.group.all_reduce_numbers([sum(losses)])
            self._wait()
            if not self.scaler:
                self.facts["norms"].append(self._norm())
            step_optimizer(self.optimizer, self.scaler)
            self.optimizer.clear_grad()

    def finish(self) -> Facts:
        """What came of it."""
        parameters = list(self.inner.parameters())
        self.facts["num_held"] = sum(each.size for each in parameters if each._is_initialized())
        self.facts["num_parameters"] = sum(int(np.prod(each.shape)) for each in parameters)
        if self.stage == 3:
            self.model.get_all_parameters(with_freeze_param=True)
        return self.facts | {"weights": weights_of(self.inner)}

    def whole_state(self) -> dict[str, dict[str, Any]]:
        """Moments and master weights, whole, by name of the weight and of the accumulator."""
        own: dict[str, dict[str, Any]] = {name: {} for name in self.trained}
        for name, accumulator, tensor in self._state():
            own[name][accumulator] = tensor
        keys = sorted({(name, key) for each in self.group.gather_objects(
            [[name, key] for name, kept in own.items() for key in kept]) for name, key in map(tuple, each)})  # fmt: skip
        whole: dict[str, dict[str, Any]] = {name: {} for name in self.trained}
        for name, key in keys:
            whole[name][key] = self._whole(name, own[name].get(key), is_number="pow_acc" in key)
        return whole

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continues from what `whole_state` gave; to be called before the first step."""
        kept: dict[str, Any] = {"master_weights": {}}
        for name, parameter in self.trained.items():
            base = self._base(parameter)
            if base is None:
                continue
            for accumulator, whole in state[name].items():
                tensor = self._part(parameter, whole) if whole.size > 1 else whole
                if accumulator == "master":
                    kept["master_weights"][base] = tensor
                else:
                    kept[f"{base}_{accumulator}"] = tensor
        self.optimizer.set_state_dict(kept)

    def _base(self, parameter: Any) -> str | None:
        """What the names of a parameter's accumulators begin with on this rank."""
        if self.stage == 2:
            return (
                parameter.name if self.optimizer.param2rank[parameter.name] == self.group.position else None
            )
        return f"slice@{parameter.name}" if hasattr(parameter, "fw_storage") else parameter.name

    def _state(self) -> Any:
        state = dict(self.optimizer.state_dict())
        masters = state.pop("master_weights", {})
        for name, parameter in self.trained.items():
            base = self._base(parameter)
            if base in masters:
                yield name, "master", masters[base]
            for key, tensor in state.items():
                if base and key.startswith(f"{base}_"):
                    yield name, key.removeprefix(f"{base}_"), tensor

    def _whole(self, name: str, tensor: Any, *, is_number: bool) -> Any:
        parameter = self.trained[name]
        shape = [1] if is_number else list(parameter.shape)
        if self.stage == 2:
            owner = self.optimizer.param2rank[parameter.name]
            whole = tensor.reshape(shape) if tensor is not None else paddle.zeros(shape, dtype="float32")
            self.group.broadcast(whole, owner)
            return whole
        if is_number or not hasattr(parameter, "fw_storage"):
            return tensor
        return paddle.concat(self.group.all_gather(tensor))[: int(np.prod(shape))].reshape(shape)

    def _part(self, parameter: Any, whole: Any) -> Any:
        if self.stage == 2 or not hasattr(parameter, "fw_storage"):
            return whole
        size = self.model._param2buffer_size[parameter.name]
        flat = paddle.concat([whole.flatten(), paddle.zeros([size - whole.size], dtype=whole.dtype)])
        return flat.split(self.group.size)[self.group.position].clone()

    def _wait(self) -> None:
        while self.tasks:
            task = self.tasks.pop(0)
            if task is not None:
                task.wait()

    def _note_gradients(self) -> None:
        held = [_gradient_of(each) for each in self.trained.values()]
        count = sum(each.size for each in held if each is not None and each._is_initialized())
        self.facts["num_gradients_held"] = max(self.facts["num_gradients_held"], count)

    def _norm(self) -> float:
        """The norm of the whole gradient, read between the passes and the optimizer's step."""
        optimizer, position = self.optimizer, self.group.position
        if self.stage == 2:
            owned = [p for p in self.trained.values() if optimizer.param2rank[p.name] == position]
            square = square_of(_gradient_of(each) for each in owned) / self.group.size**2
            return self.group.all_reduce_numbers([square])[0] ** 0.5
        optimizer.update_slice()
        optimizer.update_scaler = True  # which has the step leave that out
        slices = [each.fw_storage for each in self.trained.values() if hasattr(each, "fw_storage")]
        square = self.group.all_reduce_numbers([square_of(map(_gradient_of, slices))])[0]
        return (square + square_of(map(_gradient_of, self.model._unslice_params))) ** 0.5


def _gradient_of(parameter: Any) -> Any:
    return parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad


def train_with_fleet(case: Case, num_steps: int, group: Any) -> Facts:
    """The steps of `train_alone`, on this rank of a group."""
    with cpu_as_accelerator():
        run = FleetRun(case, group)
        resumes = case.get("resumes_at")
        run.train(range(resumes or num_steps))
        if resumes:
            state, losses, norms = run.whole_state(), run.facts["losses"], run.facts["norms"]
            weights = run.finish()["weights"]
            run = FleetRun(case | {"weights": weights}, group)
            run.load(state)
            run.train(range(resumes, num_steps))
            run.facts["losses"], run.facts["norms"] = losses + run.facts["losses"], norms + run.facts["norms"]
        return run.finish()
