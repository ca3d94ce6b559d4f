"""Trains a toy model on this rank's micro-batches at every sharding stage and saves what came out.

Arguments: degree of data, degree of sharding, a folder for the results. The reference is plain Paddle in one process
on all micro-batches, computed by every rank before it starts.
"""

import dataclasses
import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.distributed.fleet.recompute import recompute

from finetune.parallel.sharding import layer_units, updated_weights
from finetune.parallel.sharding.start import start_replicas
from finetune.processes.groups import Group, start_groups
from finetune.processes.layout import Layout

WIDTH, VOCAB, NUM_MICRO_BATCHES, NUM_STEPS, MAX_NORM = 5, 11, 4, 5, 0.4
SKIPPED_STEP = 3  # computed once more beforehand, without an update
IDLE_STEP = 2  # one micro-batch only, so that all ranks but the first have none
CASES = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 1, waiting": {"stage": 1, "overlaps": False},
    "stage 1, recompute, reentrant": {"stage": 1, "reentrant": True},
    "stage 1, adapter": {"stage": 1, "adapter": "lora"},
    "stage 1, one parameter": {"stage": 1, "adapter": "embedding"},
    "stage 1, slices": {"stage": 1, "words": ("split_param",)},
    "stage 1, slices, recompute, reentrant": {"stage": 1, "words": ("split_param",), "reentrant": True},
    "stage 1, slices, waiting": {"stage": 1, "words": ("split_param",), "overlaps": False},
    "stage 1, slices, own memory": {"stage": 1, "words": ("split_param",), "own_memory": True},
    "stage 2, waiting": {"stage": 2, "overlaps": False},
    "stage 2, two forwards first": {"stage": 2, "in_flight": 2},
    "stage 2, recompute, reentrant": {"stage": 2, "reentrant": True},
    "stage 3, waiting": {"stage": 3, "overlaps": False},
    "stage 1, master gradients": {"stage": 1, "master": True},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 3, recompute, reentrant": {"stage": 3, "reentrant": True},
    "stage 3, recompute, not reentrant": {"stage": 3, "reentrant": False},
    "stage 3, two forwards first": {"stage": 3, "in_flight": 2},
    "stage 0, adapter": {"stage": 0, "adapter": "lora"},
    "stage 2, adapter": {"stage": 2, "adapter": "lora"},
    "stage 3, adapter": {"stage": 3, "adapter": "lora"},
    "stage 3, adapter, recompute, reentrant": {"stage": 3, "adapter": "lora", "reentrant": True},
    "stage 3, adapter, recompute, not reentrant": {"stage": 3, "adapter": "lora", "reentrant": False},
}


class ToyLayer(nn.Layer):
    """Sizes that two and four do not divide, a frozen weight, and one that both layers share."""

    def __init__(self, shared):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 7)
        self.down = nn.Linear(7, WIDTH)
        self.lora = nn.Linear(WIDTH, WIDTH, bias_attr=False)
        self.frozen = self.create_parameter([WIDTH, WIDTH])
        self.frozen.stop_gradient = True
        # Its gradient passes a cast, as in mixed precision, and arrives after that of the layer's input.
        self.scale = self.create_parameter([WIDTH], default_initializer=nn.initializer.Constant(0.9))
        self.shared = shared

    def forward(self, hidden, bias):
        hidden = hidden * self.scale.astype("float64").astype("float32")
        inner = self.down(nn.functional.silu(self.up(self.norm(hidden)))) + hidden @ self.frozen
        return hidden + inner * self.shared + self.lora(hidden) + bias, inner.detach()


class Toy(nn.Layer):
    """Two layers between tied embeddings; `unused` never has a gradient."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        shared = self.create_parameter([1])
        shared.set_value(paddle.full([1], 0.7))
        self.layers = nn.LayerList([ToyLayer(shared), ToyLayer(shared)])
        self.norm = nn.LayerNorm(WIDTH)
        self.unused = self.create_parameter([3, 2])
        self.reentrant = reentrant

    def forward(self, ids):
        hidden = self.embedding(ids)
        if self.reentrant and paddle.is_grad_enabled():
            hidden.stop_gradient = False  # as PaddleNLP does for adapters, where nothing before it is trained
        bias = paddle.full([1], 0.1)
        for layer in self.layers:
            if self.reentrant is None or not paddle.is_grad_enabled():
                hidden, _ = layer(hidden=hidden, bias=bias)
            else:
                hidden, _ = recompute(layer, hidden, bias, use_reentrant=self.reentrant)
        return self.norm(hidden) @ self.embedding.weight.T


def make_model(case):
    paddle.seed(3)
    model = Toy(case.get("reentrant"))
    if part := case.get("adapter"):
        for name, parameter in model.named_parameters():
            parameter.stop_gradient = part not in name
    return model


def batches(step):
    source = np.random.default_rng(step)
    count = 1 if step == IDLE_STEP else NUM_MICRO_BATCHES
    return [paddle.to_tensor(source.integers(0, VOCAB, (2, 6))) for _ in range(count)]


def loss_of(model, ids, scale=1.0):
    logits = model(ids)[:, :-1]
    losses = nn.functional.cross_entropy(logits.reshape([-1, VOCAB]), ids[:, 1:].flatten(), reduction="sum")
    return losses * scale / (10 * NUM_MICRO_BATCHES)


def reference(case):
    """Weights and gradient norms of plain Paddle, one process."""
    model = make_model(case)
    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    decayed = {parameter.name for parameter in trained if parameter.ndim > 1}
    optimizer = paddle.optimizer.AdamW(
        0.05, parameters=trained, weight_decay=0.1, apply_decay_param_fun=decayed.__contains__
    )
    norms = []
    for step in range(NUM_STEPS):
        for ids in batches(step):
            loss_of(model, ids).backward()
        squares = [float((p.grad**2).sum()) for p in trained if p.grad is not None]
        norms.append(sum(squares) ** 0.5)
        for parameter in trained:
            if parameter.grad is not None and norms[-1] > MAX_NORM:
                parameter.grad = parameter.grad * (MAX_NORM / norms[-1])
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
    return {name: parameter.numpy() for name, parameter in model.named_parameters()}, norms


def run_micro_batches(model, replicas, groups, step, in_flight):
    every = batches(step)
    share = groups.layout.data_rank(groups.rank)
    mine = [(ids, 1.0) for ids in every[share :: groups.data.size]]
    most = -(-len(every) // groups.data.size)
    replicas.begin_step(most)
    while replicas.stage == 3 and len(mine) < most:
        mine.append((every[0], 0.0))
    for begin in range(0, most, in_flight):
        losses = [loss_of(model, ids, scale) for ids, scale in mine[begin : begin + in_flight]]
        for number in range(begin, min(begin + in_flight, most)):
            if number < len(mine):
                losses[number - begin].backward()
            replicas.after_micro_batch()


def held(layers):
    """Elements of the parameters that have memory."""
    return sum(p.size for layer in layers for p in layer.parameters() if p._is_initialized())


def watch_layers(model, seen):
    """Notes how many layers are whole while each layer computes."""
    for layer in model.layers:
        own = [[p for name, p in other.named_parameters() if "shared" not in name] for other in model.layers]

        def note(*_, own=own):
            seen.append(sum(all(p._is_initialized() for p in parameters) for parameters in own))

        layer.up.register_forward_post_hook(note)


def watch_arrivals(model, replicas, seen):
    """Notes how many layers' weights are under way while each layer computes."""
    if calls := getattr(replicas, "_calls", None):
        for layer in model.layers:
            layer.up.register_forward_post_hook(lambda *_: seen.append(len(calls._begun)))
        return
    weights = getattr(replicas, "weights", None)
    arrivals = weights.units if weights else [unit.gather for unit in getattr(replicas, "units", [])]
    for layer in model.layers:
        layer.up.register_forward_post_hook(
            lambda *_: seen.append(sum(bool(each.under_way) for each in arrivals))
        )


def train(case, groups):
    model = make_model(case)
    updated_weights._OWN_MEMORY_BYTES = 1 if case.get("own_memory") else 1 << 20
    replicas = start_replicas(
        model,
        groups,
        case["stage"],
        layers=list(model.layers),
        master_gradients=case.get("master", False),
        overlaps=case.get("overlaps", True),
        sharding_words=case.get("words", ()),
    )
    optimizer = paddle.optimizer.AdamW(
        0.05,
        parameters=replicas.optimizer_parameters(),
        weight_decay=0.1,
        apply_decay_param_fun=replicas.is_decayed,
    )
    optimizer = replicas.distribute(optimizer)
    norms, seen, gathers, arriving = [], [], [], []
    watch_layers(model, seen)
    watch_arrivals(model, replicas, arriving)
    gather = layer_units.GatheredTensors
    layer_units.GatheredTensors = lambda *args: (gathers.append(len(args[0])), gather(*args))[1]
    for step in range(NUM_STEPS):
        if step == SKIPPED_STEP:  # as where float16 overflows: nothing is updated, what has begun goes on
            run_micro_batches(model, replicas, groups, step, case.get("in_flight", 1))
            replicas.sum_gradients()
            replicas.scale_gradients(float("inf"))
            replicas.clear_gradients()
        run_micro_batches(model, replicas, groups, step, case.get("in_flight", 1))
        replicas.sum_gradients()
        square = replicas.squared_norm(lambda name: True)
        groups.world.all_reduce(square)
        norms.append(float(square) ** 0.5)
        replicas.drop_absent(replicas.presence().tolist())
        if norms[-1] > MAX_NORM:
            replicas.scale_gradients(MAX_NORM / norms[-1])
        optimizer.step()
        replicas.after_update()
        replicas.clear_gradients()
    facts = {"norms": norms, "left": [n for n, p in model.named_parameters() if p.grad is not None]}
    layer_units.GatheredTensors = gather
    facts["most_arriving"] = max(arriving)
    facts["most_layers_whole"], facts["num_gathers"] = max(seen), len(gathers)
    facts["num_parameters"] = sum(p.size for p in model.parameters())
    facts["num_held"] = held([model])
    facts["num_stored"] = sum(t.size for t in getattr(replicas, "_stored", {}).values())
    facts["num_moments"] = sum(t.size for key, t in optimizer.state_dict().items() if "moment1" in key)
    facts["tensor_names"] = list(replicas.tensor_names().items())
    with paddle.no_grad():
        facts["evaluated"] = float(loss_of(model, batches(0)[0]))
    facts["num_held_after_evaluation"] = held([model])
    with replicas.whole_parameters():
        weights = {name: parameter.numpy() for name, parameter in model.named_parameters()}
        facts["digest"] = sha256(b"".join(each.tobytes() for each in weights.values())).hexdigest()
        facts["evaluated_whole"] = float(loss_of(model, batches(0)[0]))
        name = next(iter(replicas.trained))
        replicas.trained[name].set_value(replicas.trained[name] + 1)
    with replicas.whole_parameters():
        facts["change_kept"] = float(np.abs(replicas.trained[name].numpy() - weights[name] - 1).max())
    for updated in replicas.optimizer_parameters():
        if replicas.tensor_names().get(updated.name) == name:
            part = replicas.whole_of(name, updated)
            facts["slice_changed"] = float(np.abs(part.numpy() - weights[name] - 1).max())
    return weights, facts


def main():
    data, sharding, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    parts = {case.get("adapter") for case in CASES.values()}
    expected = {part: reference({"adapter": part}) for part in parts}
    groups = start_groups(Layout(data=data, sharding=sharding), device="cpu")
    results = {}
    for name, case in CASES.items():
        weights, facts = train(case, groups)
        wanted, norms = expected[case.get("adapter")]
        facts["errors"] = {key: float(np.abs(weights[key] - wanted[key]).max()) for key in wanted}
        facts["norm_error"] = max(abs(a / b - 1) for a, b in zip(facts["norms"], norms, strict=True))
        facts["moved"] = float(max(np.abs(wanted[key] - start.numpy()).max() for key, start in begin(case)))
        results[name] = facts
        print(name, facts["norm_error"], max(facts["errors"].values()), flush=True)
    alone = dataclasses.replace(groups, replicas=groups.data, sharding=Group((groups.rank,)))
    weights, _ = train({"stage": 3}, alone)
    results["replicas only"] = max(
        float(np.abs(weights[key] - expected[None][0][key]).max()) for key in weights
    )
    (folder / f"results.{groups.rank}.json").write_text(json.dumps(results))


def begin(case):
    return make_model(case).named_parameters()


if __name__ == "__main__":
    main()
