"""The cases: what is run, where, and how it has to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_STAGE3 = {"sharding": "stage3", "sharding_parallel_degree": 2}
_RANK_FILES = {"tensor_parallel_degree": 2, "unified_checkpoint": False}
_CONTINUE = {"on_save_error": "continue"}
_ONLY_RESULT = {"save_strategy": "no"}
_GIBIBYTE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command under a limit.

    Attributes:
        group: "full disk", "permission", "address space" or "file size".
        name: What is run, and what is in its way.
        name_zh: The same in Chinese.
        kind: "train", "merge", "ranks" (merge of their files), "export" or "predict".
        settings: Of a training, beside the usual ones.
        is_large: Whether it works on the larger model.
        num_processes: Of a training.
        small: KiB of the disk that the command writes to; None for the machine's own.
        closed: Modes by path below a material ("model/config.json") or below the case's own folder ("out").
        limit: RLIMIT's name and number.
        stdout: Where the output goes.
        code: Of the end.
        says: What the line must hold.
    """

    group: str
    name: str
    name_zh: str
    kind: str = "train"
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_large: bool = False
    num_processes: int = 1
    small: int | None = None
    closed: Mapping[str, int] = field(default_factory=dict)
    limit: tuple[str, int] | None = None
    stdout: str | None = None
    code: int = 1
    says: str = ""


def _disk(name: str, name_zh: str, kibibytes: int, **more: Any) -> Case:
    options = {"says": "No space left on device"} | more
    return Case(group="full disk", name=name, name_zh=name_zh, small=kibibytes, **options)


def _closed(name: str, name_zh: str, path: str, mode: int = 0, **more: Any) -> Case:
    options = {"code": 2, "says": "Permission denied"} | more
    return Case(group="permission", name=name, name_zh=name_zh, closed={path: mode}, **options)


def _addresses(name: str, name_zh: str, gibibytes: float, **more: Any) -> Case:
    options = {"says": r"\(ulimit -v\)"} | more
    limit = ("AS", int(gibibytes * _GIBIBYTE))
    return Case(group="address space", name=name, name_zh=name_zh, limit=limit, **options)


def _sizes(name: str, name_zh: str, num_bytes: int, **more: Any) -> Case:
    options = {"code": 2, "says": r"\(ulimit -f\)"} | more
    return Case(group="file size", name=name, name_zh=name_zh, limit=("FSIZE", num_bytes), **options)


CASES = (
    _disk("training: not even a small file fits", "训练：连小文件都放不下", 32, code=2),
    _disk("training: no room for a checkpoint", "训练：放不下一个检查点", 2000, code=2, says="one checkpoint of this run takes"),
    _disk("training: no room for the result", "训练：放不下结果", 900, settings=_ONLY_RESULT, code=2, says="the result of"),
    _disk("training: the second checkpoint", "训练：第二个检查点", 5000),
    _disk("training: the second checkpoint, on_save_error continue", "训练：第二个检查点，on_save_error continue", 5000,
          settings=_CONTINUE, code=0),
    _disk("training: the final weights", "训练：最终权重", 4000, settings={"save_steps": 4}),
    _disk("2 replicas: the second checkpoint", "2 个副本：第二个检查点", 5000, num_processes=2),
    _disk("2 replicas: the second checkpoint, on_save_error continue", "2 个副本：第二个检查点，on_save_error continue", 5000,
          num_processes=2, settings=_CONTINUE, code=0),
    _disk("2 tensor-parallel ranks, a file each: the second checkpoint", "2 个张量并行 rank，各写一个文件：第二个检查点", 5000,
          num_processes=2, settings=_RANK_FILES),
    _disk("2 ranks, sharding stage 3: the second checkpoint", "2 个 rank，sharding stage 3：第二个检查点", 5000,
          num_processes=2, settings=_STAGE3),
    _disk("2 ranks, sharding stage 3: the final weights", "2 个 rank，sharding stage 3：最终权重", 4000, num_processes=2,
          settings=_STAGE3 | {"save_steps": 4}),
    _disk("merge of an adapter", "合并适配器", 900, kind="merge", code=2),
    _disk("merge of ranks", "合并各 rank 的文件", 900, kind="ranks", code=2),
    _disk("export", "导出", 400, kind="export", code=2, says="has not written the whole model"),
    _disk("prediction", "预测", 4, kind="predict", code=2),
    Case(group="full disk", name="training: what it prints", name_zh="训练：屏幕输出", stdout="/dev/full",
         says="the output of this command: No space left on device"),
    _closed("training: argument file", "训练：参数文件", "arguments.json"),
    _closed("training: model folder", "训练：模型目录", "model"),
    _closed("training: config.json", "训练：config.json", "model/config.json"),
    _closed("training: weights", "训练：权重", "model/model.safetensors"),
    _closed("training: tokenizer", "训练：分词器", "model/tokenizer.model"),
    _closed("training: data folder", "训练：数据目录", "data"),
    _closed("training: data file", "训练：数据文件", "data/train.json"),
    _closed("training: output folder that may not be written", "训练：不可写的输出目录", "out", 0o555),
    _closed("training: output folder that may not be entered", "训练：不可进入的输出目录", "out"),
    _closed("2 replicas: output folder that may not be written", "2 个副本：不可写的输出目录", "out", 0o555, num_processes=2),
    _closed("training: log that may not be written", "训练：不可写的日志", "out/train_log.jsonl"),
    _closed("training: an old checkpoint that may not be deleted", "训练：不可删除的旧检查点", "out/checkpoint-2", 0o555,
            settings={"save_total_limit": 1}, code=0, says="warning: .*checkpoint-2.*Permission denied"),
    _closed("merge: adapter folder", "合并：适配器目录", "adapter", kind="merge"),
    _closed("merge: adapter weights", "合并：适配器权重", "adapter/peft_model-00001-of-00001.safetensors", kind="merge"),
    _closed("merge: place of the result", "合并：结果所在的目录", ".", 0o555, kind="merge"),
    _closed("merge of ranks: a rank's file", "合并各 rank 的文件：其中一个文件", "ranks/model_state.tp01.pdparams", kind="ranks"),
    _closed("export: weights", "导出：权重", "model/model.safetensors", kind="export"),
    _closed("export: place of the result", "导出：结果所在的目录", ".", 0o555, kind="export"),
    _closed("prediction: data file", "预测：数据文件", "data/dev.json", kind="predict"),
    _closed("prediction: place of the answers", "预测：回答所在的目录", "out", 0o555, kind="predict"),
    _addresses("training, 0.1 GiB", "训练，0.1 GiB", 0.1, code=2),
    _addresses("training, 1 GiB", "训练，1 GiB", 1, code=2),
    _addresses("training of a larger model, 2.1 GiB: weights", "训练较大的模型，2.1 GiB：权重", 2.1, is_large=True),
    _addresses("training of a larger model, 2.8 GiB: steps", "训练较大的模型，2.8 GiB：训练步", 2.8, is_large=True),
    _addresses("2 replicas, 1.9 GiB", "2 个副本，1.9 GiB", 1.9, num_processes=2, code=2),
    _addresses("2 replicas of a larger model, 2.6 GiB", "较大模型的 2 个副本，2.6 GiB", 2.6, num_processes=2, is_large=True),
    _addresses("merge of an adapter, 0.1 GiB", "合并适配器，0.1 GiB", 0.1, kind="merge", code=2),
    _addresses("merge into a larger model, 0.3 GiB", "合并到较大的模型，0.3 GiB", 0.3, kind="merge", is_large=True),
    _addresses("export, 1 GiB", "导出，1 GiB", 1, kind="export", code=2),
    _addresses("export of a larger model, 2.1 GiB", "导出较大的模型，2.1 GiB", 2.1, kind="export", is_large=True),
    _addresses("prediction, 1 GiB", "预测，1 GiB", 1, kind="predict", code=2),
    _addresses("prediction with a larger model, 2.3 GiB", "用较大的模型预测，2.3 GiB", 2.3, kind="predict", is_large=True),
    _sizes("training: nothing may be written", "训练：什么都不能写", 0, code=2),
    _sizes("training: a checkpoint", "训练：检查点", 500_000),
    _sizes("2 replicas: a checkpoint", "2 个副本：检查点", 500_000, num_processes=2),
    _sizes("2 tensor-parallel ranks, a file each: a checkpoint", "2 个张量并行 rank，各写一个文件：检查点", 300_000, num_processes=2,
           settings=_RANK_FILES),
    _sizes("2 ranks, sharding stage 3: a checkpoint", "2 个 rank，sharding stage 3：检查点", 500_000, num_processes=2,
           settings=_STAGE3),
    _sizes("merge of an adapter", "合并适配器", 500_000, kind="merge"),
    _sizes("merge of ranks", "合并各 rank 的文件", 500_000, kind="ranks"),
    _sizes("export", "导出", 500_000, kind="export"),
    _sizes("prediction", "预测", 64, kind="predict"),
)  # fmt: skip
