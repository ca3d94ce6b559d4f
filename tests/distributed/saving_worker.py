"""Loads each folder under tensor x pipeline parallelism, saves it and an optimizer's state after one step."""

import sys
from pathlib import Path

import paddle

paddle.set_device("cpu")

from finetune.checkpoints.folder import write_checkpoint  # noqa: E402
from finetune.checkpoints.model_weights import save_model_weights  # noqa: E402
from finetune.checkpoints.optimizer_state import load_optimizer, save_optimizer  # noqa: E402
from finetune.checkpoints.writers import RankFileWriter, WholeTensorWriter  # noqa: E402
from finetune.models.loading import load_model, load_weights  # noqa: E402
from finetune.models.resolve import resolve_model  # noqa: E402
from finetune.parallel.pipe.stage import build_stage  # noqa: E402
from finetune.parallel.pipe.stage_plan import StagePlan  # noqa: E402
from finetune.parallel.sharding.replicas import Replicas  # noqa: E402
from finetune.processes.groups import start_groups  # noqa: E402
from finetune.processes.layout import Layout  # noqa: E402
from finetune.run.directory import check_shared_folder  # noqa: E402


def new_optimizer(model):
    return paddle.optimizer.AdamW(0.0, parameters=model.parameters(), weight_decay=0.0)


def run(source: Path, out: Path, groups) -> None:
    resolved = resolve_model(source)
    plan = StagePlan(groups.pipeline.position, groups.pipeline.size)

    def build(model_class, config):
        return build_stage(model_class, config, family=resolved.family, plan=plan).model

    overrides = {
        "tensor_parallel_degree": groups.tensor.size,
        "tensor_parallel_rank": groups.tensor.position,
    }
    model = load_model(resolved, dtype="float32", config_overrides=overrides, build=build)
    check_shared_folder(out, groups)
    replicas = Replicas(model, groups)
    optimizer = new_optimizer(model)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()

    def write(folder: Path) -> None:
        save_model_weights(model, folder, WholeTensorWriter(groups))
        save_optimizer(folder, model, optimizer, WholeTensorWriter(groups), replicas=replicas)

    folder = write_checkpoint(out, 1, write, groups)

    def write_shards(folder: Path) -> None:
        save_model_weights(model, folder, RankFileWriter(groups))
        save_optimizer(folder, model, optimizer, RankFileWriter(groups), replicas=replicas)

    shards = write_checkpoint(out, 2, write_shards, groups)
    before = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for saved in (folder, shards):
        for parameter in model.parameters():
            parameter.set_value(paddle.zeros_like(parameter))
        load_weights(model, saved)
        for name, tensor in model.state_dict().items():
            assert (tensor.numpy() == before[name]).all(), name
        fresh = new_optimizer(model)
        with paddle.utils.unique_name.guard():  # as in a process of its own
            load_optimizer(saved, model, fresh, replicas=replicas, is_stage=True)
            for parameter in model.parameters():
                parameter.grad = paddle.zeros_like(parameter)
            fresh.step()
        moments = fresh.state_dict()
        for name, tensor in model.named_parameters():
            halfway = moments[f"{tensor.name}_moment1_0"].numpy()
            assert abs(halfway - 0.09 * before[name]).max() < 1e-5, name


if __name__ == "__main__":
    groups = start_groups(Layout(tensor=2, pipeline=2), device="cpu")
    root = Path(sys.argv[1])
    for name in sys.argv[2:]:
        run(root / name, root / f"{name}-saved", groups)
        print("DONE", name, flush=True)
