"""What is fed with damaged files, through the same code as the commands, up to where weights would be trained."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from finetune.errors import UserError
from finetune.storage.checkpoints import Checkpoint, read_file
from tests.fuzz.folders import copy_damaged, draw_damages
from tests.fuzz.mutations import (
    BYTE_CHANGES,
    JSON_CHANGES,
    PLACES,
    VALUES,
    WHOLE_CONTENTS,
    change_bytes,
    change_json,
    dump_json,
)
from tests.fuzz.runner import Target, WrongWeights

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 320,
    "max_length": 128,
}
LINES = [
    {"src": "类型#上衣*风格#职场", "tgt": "这款上衣职场必备。"},
    {"src": ["a red dress"], "tgt": ["The red dress fits well."]},
    {"src": "a", "tgt": "b"},
]


def _corpus(folder: Path) -> Path:
    path = folder / "corpus.json"
    lines = (ROOT / "data" / "train.json").read_text(encoding="utf-8").splitlines()[:100]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _prepare_model(folder: Path, family: str = "llama") -> Path:
    from finetune.models.tiny.checkpoint import build_tiny

    return build_tiny(family, folder / family, corpus=_corpus(folder), **SMALL)


def _prepare_run(folder: Path) -> None:
    """A model, data, and the least argument file."""
    _prepare_model(folder)
    data = folder / "data"
    data.mkdir()
    for split in ("train", "dev"):
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in LINES * 2)
        (data / f"{split}.json").write_text(text, encoding="utf-8")


def _arguments(good: Path, **settings: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(good / "llama"),
        "dataset_name_or_path": str(good / "data"),
        "output_dir": "out",
        "do_train": True,
        "device": "cpu",
        "max_steps": 2,
        "max_length": 64,
        "src_length": 32,
        "per_device_train_batch_size": 2,
    } | settings


@contextmanager
def _stop_at(module: str, name: str, act: Any = lambda *_given: None) -> Iterator[None]:
    """Ends the command where it would call something."""
    import importlib

    holder = importlib.import_module(module)
    for part in name.split(".")[:-1]:
        holder = getattr(holder, part)
    name = name.rpartition(".")[2]
    original = getattr(holder, name)

    def stop(*given: Any, **named: Any) -> None:
        act(*given, **named)
        raise SystemExit(0)

    setattr(holder, name, stop)
    try:
        yield
    finally:
        setattr(holder, name, original)


def _finetune(words: list[str]) -> None:
    import sys

    import finetune_generation

    argv, sys.argv = sys.argv, ["finetune_generation.py", *words]
    try:
        finetune_generation.main()
    finally:
        sys.argv = argv


def _load_paddle() -> None:
    import paddlenlp.trainer
    import paddlenlp.transformers  # noqa: F401

    import finetune.run.trainer  # noqa: F401


# Argument files


_PATH_WORDS = ("path", "dir", "file", "template", "checkpoint")


def _draw_argument_file(good: Path) -> st.SearchStrategy[Any]:
    from finetune.settings.registry import foreign_settings, known_aliases, known_settings
    from finetune.settings.synonyms import known_synonyms

    known = known_settings()
    names = st.sampled_from(
        [*known, *known, *known_aliases(), *foreign_settings(), *known_synonyms(), "unknown", ""]
    )

    def draw_value(name: str) -> st.SearchStrategy[tuple[str, Any]]:
        setting = known.get(name)
        likely = [True, False, 0, 1, -1, 2, 0.5, "1", "auto", "none", None, 3, 1e-9]
        if setting is not None:
            likely += [*setting.choices, *setting.words, setting.default]
        value = st.one_of(st.sampled_from(likely), st.sampled_from(likely), VALUES)
        return st.tuples(st.just(name), value.map(lambda value: _confined(name, value)))

    shipped = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/*_argument.json"))
    return st.fixed_dictionaries(
        {
            "seed": st.sampled_from(["", *shipped]),
            "settings": st.lists(names.flatmap(draw_value), min_size=1, max_size=4),
            "bytes": st.one_of(st.none(), st.none(), st.none(), st.none(), st.none(), BYTE_CHANGES),
            "whole": st.one_of(*[st.none()] * 15, WHOLE_CONTENTS),
            "words": st.one_of(st.just([]), st.just([]), st.lists(names.flatmap(draw_value), max_size=2)),
        }
    )


def _confined(name: str, value: Any) -> Any:
    """Keeps what a case writes inside its folder, and names off the network."""
    if isinstance(value, list):
        return [_confined(name, each) for each in value]
    if isinstance(value, dict):
        return {key: _confined(name, each) for key, each in value.items()}
    if isinstance(value, str) and value and any(word in name for word in _PATH_WORDS):
        return f"./{value.replace('..', '.')}"
    return value


def _run_argument_file(good: Path, case: Any, place: Path) -> None:
    settings = _arguments(good)
    if case["seed"]:
        shipped = json.loads((ROOT / case["seed"]).read_text(encoding="utf-8"))
        of_several = [name for name in shipped if name.endswith("_degree") or name.startswith("sharding")]
        settings = {name: value for name, value in shipped.items() if name not in of_several} | settings
    content = dump_json(settings | dict(case["settings"]))
    content = change_bytes(content, case["bytes"]) if case["bytes"] else content
    (place / "arguments.json").write_bytes(content if case["whole"] is None else case["whole"])
    words = itertools.chain.from_iterable([f"--{name}", _word(value)] for name, value in case["words"])
    with _stop_at("finetune.run.model", "load_base_model", _build_training_arguments):
        _finetune(["arguments.json", *words])


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("\0", "")  # which no command line can hold


def _build_training_arguments(args: Any, *_unused: Any) -> None:
    from finetune.run.training_arguments import build_training_arguments

    json.dumps(args.to_json(), ensure_ascii=False).encode()
    build_training_arguments(args)


# Data files


def _draw_data_file(_good: Path) -> st.SearchStrategy[Any]:
    alike = st.sampled_from(ROWS).map(lambda row: [row, row])
    rows = st.one_of(alike, alike, st.lists(st.one_of(st.sampled_from(ROWS), VALUES), min_size=1, max_size=4))
    return st.fixed_dictionaries(
        {
            "rows": rows,
            "changes": st.one_of(st.none(), JSON_CHANGES),
            "layout": st.sampled_from(["lines", "lines", "list", "csv", "indented"]),
            "suffix": st.sampled_from([".json", ".jsonl", ".csv", ".txt", ".tsv", ".parquet"]),
            "bytes": st.one_of(st.none(), st.none(), BYTE_CHANGES),
            "whole": st.one_of(*[st.none()] * 15, WHOLE_CONTENTS),
            "settings": st.fixed_dictionaries(
                {
                    "chat_template": st.sampled_from([None, "chatml", "llama2", "alpaca"]),
                    "dataset_format": st.sampled_from([*[None] * 20, *_formats()]),
                    "zero_padding": st.booleans(),
                    "on_bad_line": st.sampled_from(["error", "skip"]),
                    "preference": st.sampled_from([None, "chosen"]),
                    "truncation": st.sampled_from(["left", "right", "drop", "error"]),
                    "validation_split": st.sampled_from([None, None, 0.5, 1]),
                }
            ),
        }
    )


def _formats() -> tuple[str, ...]:
    from finetune.settings.data import DATASET_FORMATS

    return DATASET_FORMATS


ROWS: list[Any] = [
    *LINES,
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"query": "a", "response": "b", "system": "c"},
    {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"},
                  {"role": "assistant", "content": "c", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[]"},
    {"text": "a text"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}], "rejected": []},
]  # fmt: skip


def _run_data_file(good: Path, case: Any, place: Path) -> None:
    rows = change_json(case["rows"], case["changes"]) if case["changes"] else case["rows"]
    rows = rows if isinstance(rows, list) else [rows]
    if case["layout"] == "csv":
        content = b"src,tgt\n" + b"\n".join(dump_json(row) for row in rows)
    elif case["layout"] == "lines":
        content = b"\n".join(dump_json(row) for row in rows)
    else:
        content = json.dumps(rows, indent=1 if case["layout"] == "indented" else None).encode(
            "utf-8", "surrogatepass"
        )
    content = change_bytes(content, case["bytes"]) if case["bytes"] else content
    path = place / f"data{case['suffix']}"
    path.write_bytes(content if case["whole"] is None else case["whole"])
    settings = _arguments(good, dataset_name_or_path=str(path), preview=2, **case["settings"])
    (place / "arguments.json").write_bytes(dump_json(settings))
    _finetune(["arguments.json"])


# Model folders


def _prepare_models(folder: Path) -> None:
    _prepare_run(folder)
    _prepare_model(folder, "qwen2")
    _write_shards(folder / "llama", folder / "llama_sharded")
    _write_pickles(folder / "llama", folder / "llama_pickled")


def _write_shards(source: Path, folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {f"model-{i + 1:05}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, folder / shard, metadata={"format": "np"})
    mapped = {name: shard for shard, held in shards.items() for name in held}
    index = {"metadata": {"total_size": sum(each.nbytes for each in weights.values())}, "weight_map": mapped}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_pickles(source: Path, folder: Path) -> None:
    from safetensors.numpy import load_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model_state.pdparams").write_bytes(pickle.dumps(dict(weights), protocol=4))


MODELS = ("llama", "llama", "qwen2", "llama_sharded", "llama_pickled")


def _draw_model_folder(good: Path) -> st.SearchStrategy[Any]:
    def draw(name: str) -> st.SearchStrategy[Any]:
        files = sorted(path.name for path in (good / name).iterdir())
        weights = [file for file in files if "model" in file and "tokenizer" not in file]
        settings = st.sampled_from([{"preview": 1}, {}, {}])
        return st.tuples(
            st.just(name), draw_damages([*files, "config.json", "config.json", *weights, *weights]), settings
        )

    return st.sampled_from(MODELS).flatmap(draw)


def _run_model_folder(good: Path, case: Any, place: Path) -> None:
    name, damages, settings = case
    folder = copy_damaged(good / name, place / "model", damages)
    check_values(folder)
    (place / "arguments.json").write_bytes(
        dump_json(_arguments(good, model_name_or_path=str(folder), **settings))
    )
    with _stop_at("finetune.run.model", "adapt"):
        _finetune(["arguments.json"])


def check_values(folder: Path) -> None:
    """Compares what our reader gives for safetensors files with the format's own library.

    Raises:
        WrongWeights: The library refuses what we read, or reads something else.
    """
    import safetensors

    for path in sorted(folder.glob("*.safetensors")):
        try:
            found = {name: array for name, array in read_file(path).arrays.items()}
        except UserError:
            continue
        try:
            expected = dict(safetensors.deserialize(path.read_bytes()))
        except Exception as error:
            raise WrongWeights(
                f"WrongWeights: {path.name} is read, but safetensors refuses it: {error}"
            ) from None
        if found.keys() != expected.keys():
            raise WrongWeights(f"WrongWeights: {path.name} holds {sorted(expected)}, read {sorted(found)}")
        for name, array in found.items():
            same = list(array.shape) == list(expected[name]["shape"])
            if not same or np.asarray(array.read()).tobytes() != bytes(expected[name]["data"]):
                raise WrongWeights(f"WrongWeights: {path.name} holds other values of {name}")
    try:
        Checkpoint(folder)
    except UserError:
        return


# Adapters


def _prepare_adapters(folder: Path) -> None:
    """Adapters in the form of this project and of peft, by a run and a merge of this project."""
    from finetune.merge.lora import main as merge

    _prepare_run(folder)
    settings = _arguments(
        folder,
        output_dir=str(folder / "paddle"),
        lora=True,
        lora_rank=2,
        save_strategy="no",
        disable_tqdm=True,
    )
    (folder / "arguments.json").write_bytes(dump_json(settings))
    _finetune([str(folder / "arguments.json")])
    base = ["--model_name_or_path", str(folder / "llama")]
    merge(
        [
            *base,
            "--lora_path",
            str(folder / "paddle"),
            "--merge_model_path",
            str(folder / "peft"),
            "--save_format",
            "peft",
        ]
    )


def _draw_adapter_folder(good: Path) -> st.SearchStrategy[Any]:
    def draw(name: str) -> st.SearchStrategy[Any]:
        files = [
            path.name
            for path in (good / name).iterdir()
            if "adapter" in path.name or "peft_model" in path.name
        ]
        files += [path.name for path in (good / name).glob("lora_config.json")]
        return st.tuples(st.just(name), draw_damages(sorted(files)))

    return st.sampled_from(["paddle", "peft"]).flatmap(draw)


def _run_adapter_folder(good: Path, case: Any, place: Path) -> None:
    from finetune.merge.lora import main as merge

    name, damages = case
    folder = copy_damaged(good / name, place / "adapter", damages)
    check_values(folder)
    merge(
        [
            "--model_name_or_path",
            str(good / "llama"),
            "--lora_path",
            str(folder),
            "--merge_model_path",
            str(place / "out"),
        ]
    )


# Checkpoints


def _prepare_checkpoints(folder: Path) -> None:
    _prepare_run(folder)
    settings = _arguments(folder, output_dir=str(folder / "run"), save_steps=1, disable_tqdm=True)
    (folder / "arguments.json").write_bytes(dump_json(settings))
    _finetune([str(folder / "arguments.json")])


def _draw_checkpoint(good: Path) -> st.SearchStrategy[Any]:
    run = good / "run"
    files = sorted(str(path.relative_to(run)) for path in run.rglob("checkpoint-2/*") if path.is_file())
    own = ["arguments.json", "trainer_state.json", "all_results.json", "train_log.jsonl"]
    others = [name for name in own if (run / name).is_file()]
    return st.tuples(draw_damages([*files, *files, *others], max_size=2), st.booleans())


def _run_checkpoint(good: Path, case: Any, place: Path) -> None:
    from finetune.checkpoints.folder import MANIFEST_NAME, _facts, _file_names

    damages, is_signed = case
    folder = copy_damaged(good / "run", place / "out", damages)
    manifest, checkpoint = folder / "checkpoint-2" / MANIFEST_NAME, folder / "checkpoint-2"
    if is_signed and manifest.is_file() and all(not name.endswith(MANIFEST_NAME) for name, *_ in damages):
        content = json.loads(manifest.read_bytes())
        names = [
            name
            for name in _file_names(checkpoint)
            if (checkpoint / name).is_file() and name != MANIFEST_NAME
        ]
        manifest.unlink()
        manifest.write_text(
            json.dumps(content | {"files": {name: _facts(checkpoint / name) for name in names}})
        )
    settings = _arguments(good, output_dir=str(folder), save_steps=1, disable_tqdm=True, max_steps=3)
    (place / "arguments.json").write_bytes(dump_json(settings))
    with _stop_at("finetune.training.trainer", "FinetuneTrainer._loop"):
        _finetune([str(place / "arguments.json")])


# Pickles


def _prepare_pickles(folder: Path) -> None:
    from tests.storage.hostile_files import holding, save_archive, tensor, write_all

    arrays = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.ones(3, np.float16),
        "c": {"d": np.zeros(2)},
    }
    for protocol in (2, 3, 4):
        (folder / f"good{protocol}.pdparams").write_bytes(pickle.dumps(arrays, protocol=protocol))
    save_archive(folder / "good.bin", holding(tensor()))
    for path in list(write_all(folder)):
        if path.stat().st_size > 10_000_000:
            path.unlink()  # too long to be changed; tests/storage reads them as they are


def _draw_pickle(good: Path) -> st.SearchStrategy[Any]:
    names = sorted(path.name for path in good.iterdir())
    kinds = [*names, *["good2.pdparams", "good3.pdparams", "good4.pdparams", "good.bin"] * (len(names) // 4)]
    return st.tuples(st.sampled_from(kinds), st.one_of(st.none(), BYTE_CHANGES, BYTE_CHANGES))


def _run_pickle(good: Path, case: Any, place: Path) -> None:
    name, changes = case
    content = (good / name).read_bytes()
    path = place / name
    path.write_bytes(change_bytes(content, changes) if changes else content)
    for array in read_file(path).arrays.values():
        np.asarray(array.read()).tobytes()


# Templates

PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{% if m.role == 'user' %}", "{% else %}", "{% endif %}", "{{ m.content }}",
    "{{ m['content'] | trim }}", "{% set x = 'a' %}", "{% set x = x ~ x %}", "{{ x * 99999999 }}", "{{ raise_exception('no') }}",
    "{% for a in range(99999) %}", "{% macro f() %}{{ f() }}{% endmacro %}", "{{ f() }}", "{{ messages }}", "{{ ''.__class__ }}",
    "{{ loop.index0 }}", "{%- generation -%}", "{%- endgeneration -%}", "{{ bos_token }}", "{{ m.content.split('a')[99] }}",
    "{% include 'x' %}", "{{ 1 / 0 }}", "{{ m.content | center(10**9) }}", "{{ '%9999999d' % 1 }}", "<|im_start|>", "\n", "}}", "{#",
    "{{ (" , ") }}", "{% endset %}", "{% set x %}", "{{ x | tojson }}", "{{ strftime_now('%Y') }}", "{{ namespace(a=1).a }}",
    "{% call f() %}{% endcall %}", "{% filter upper %}", "{% endfilter %}", "{{ ''.join([x] * 99999) }}",
)  # fmt: skip
WHOLE_TEMPLATES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{% endif %}{% endfor %}",
)


def _draw_template(_good: Path) -> st.SearchStrategy[Any]:
    free = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
    changed = st.tuples(st.sampled_from(WHOLE_TEMPLATES), PLACES, st.sampled_from(PIECES)).map(_insert)
    source = st.one_of(free, changed, changed)
    return st.tuples(
        source,
        st.sampled_from(["file", "config", "part", "json"]),
        st.one_of(st.none(), st.none(), BYTE_CHANGES),
    )


def _insert(given: tuple[str, float, str]) -> str:
    text, share, piece = given
    place = int(share * len(text))
    return text[:place] + piece + text[place:]


def _run_template(good: Path, case: Any, place: Path) -> None:
    source, where, changes = case
    shutil.copytree(good / "llama", place / "model")
    name, content = "template.jinja", source.encode()
    template: str = "./template.jinja"
    if where == "config":
        path = place / "model" / "tokenizer_config.json"
        path.write_bytes(dump_json(json.loads(path.read_bytes()) | {"chat_template": source}))
        template = "tokenizer"
    elif where in ("part", "json"):
        parts = {"conversation": [source, "{{ bot }}"], "query": source}
        name, content = "template.json", dump_json(parts if where == "part" else {"chat_template": source})
        template = "./template.json"
    (place / name).write_bytes(change_bytes(content, changes) if changes else content)
    settings = _arguments(good, model_name_or_path=str(place / "model"), chat_template=template, preview=1)
    (place / "arguments.json").write_bytes(dump_json(settings))
    _finetune(["arguments.json"])


TARGETS = (
    Target(name="argument files", num_cases=20_000, prepare=_prepare_run, draw=_draw_argument_file, run=_run_argument_file, load=_load_paddle),
    Target(name="data files", num_cases=10_000, prepare=_prepare_run, draw=_draw_data_file, run=_run_data_file),
    Target(name="model folders", num_cases=2000, prepare=_prepare_models, draw=_draw_model_folder, run=_run_model_folder, load=_load_paddle),
    Target(name="adapter folders", num_cases=500, prepare=_prepare_adapters, draw=_draw_adapter_folder, run=_run_adapter_folder, load=_load_paddle),
    Target(name="checkpoints", num_cases=500, prepare=_prepare_checkpoints, draw=_draw_checkpoint, run=_run_checkpoint, load=_load_paddle),
    Target(name="pickles", num_cases=200, prepare=_prepare_pickles, draw=_draw_pickle, run=_run_pickle),
    Target(name="templates", num_cases=100, prepare=_prepare_run, draw=_draw_template, run=_run_template),
)  # fmt: skip
