"""The files beside the weights: configuration, tokenizer, chat template, copied byte for byte.

Only what is wrong for a model that is whole again is changed in the configuration: degrees of parallelism, and
the class name of a pipeline model.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.data.templates import trained_template
from finetune.models.other_parts import OTHER_PARTS, WHOLE_CONFIG
from finetune.storage.code_files import copy_code
from finetune.storage.files import read_json_if_present, write_json
from finetune.storage.template_files import copy_named

_PATTERNS = (
    "config.json", "generation_config.json", "lora_config.json", "prefix_config.json", "adapter_facts.json",
    "pre_caches.npy", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "tekken.json", "*.jinja", "configuration_*.py", "modeling_*.py",
    "tokenization_*.py", "*processor_config.json", WHOLE_CONFIG, f"{OTHER_PARTS}.safetensors",
    f"{OTHER_PARTS}-*.safetensors", f"{OTHER_PARTS}.safetensors.index.json", trained_template.PATTERN,
)  # fmt: skip


def is_companion(name: str) -> bool:
    """Whether a file of that name says something of a model or an adapter besides its weights."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _PATTERNS)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies what belongs to a model or an adapter besides its weights; returns the names."""
    names = []
    for path in sorted(source.iterdir()):
        if path.is_file() and is_companion(path.name):
            change = _CHANGES.get(path.name)
            content = read_json_if_present(path) if change else {}
            changed = change(content) if change else content
            if changed == content:
                shutil.copyfile(path, target / path.name)
            else:
                write_json(target / path.name, changed)
            names.append(path.name)
    copy_code(source, target)
    copy_named(source, target)
    return names


def _whole_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model in one piece."""
    whole = dict(config)
    for name, value in (
        ("tensor_parallel_degree", 1),
        ("tensor_parallel_rank", 0),
        ("pipeline_parallel_degree", 1),
        ("virtual_pp_degree", 1),
        ("sep_parallel_degree", 1),
        ("context_parallel_degree", 1),
        ("sequence_parallel", False),
    ):
        if whole.get(name) not in (None, value, -1):
            whole[name] = value
    for name, value in whole.items():
        if isinstance(value, list):
            whole[name] = [_whole_class(item) if isinstance(item, str) else item for item in value]
    return whole


def _whole_class(name: str) -> str:
    """Class of the model whose pipeline form is called that."""
    return name.removesuffix("Pipe") if name.endswith("ForCausalLMPipe") else name


def _whole_adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's configuration; -1 is PaddleNLP's word for an adapter that no rank shares."""
    degree = config.get("tensor_parallel_degree")
    return dict(config) | ({"tensor_parallel_degree": -1} if degree not in (None, -1, 1) else {})


_CHANGES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "config.json": _whole_model,
    "lora_config.json": _whole_adapter,
    "prefix_config.json": _whole_adapter,
}
