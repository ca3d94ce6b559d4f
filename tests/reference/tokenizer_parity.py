"""Ids of many lines against the libraries that define them, family by family, by both of the project's readers.

    python -m tests.reference.tokenizer_parity DATA... --results tokenizers.jsonl
    python tools/tokenizer_table.py tokenizers.jsonl

DATA are files or folders with texts of any kind (.json, .jsonl, .txt: every string in them is a line; without any, the
texts of `tests.texts`). To them come the sources of this project, mixtures of symbols, emoji and control characters,
and the names of added tokens in every position of a line. What the ids are compared with:

    llama, mistral, gemma, qwen2, bloom, opt     transformers
    qwen                                         tiktoken with the ranks and the pattern of the published tokenizer
    chatglm2                                     SentencePiece between the names of the published tokenizer's tokens
    formats in which models are published        tests.reference.published_tokenizers says what

Every line is read three times: as a template's own text and as data whose special tokens count (both are what
transformers gives by default), and as data whose special tokens are text (transformers' `split_special_tokens`).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.families.family import get_family
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.encoder import FamilyEncoder, load_encoder
from finetune.tokenizers.fast_encoder import load_fast_encoder
from tests.families.cases import FACTS
from tests.reference.published_tokenizers import KINDS, make_published
from tests.reference.tokenizer_definitions import Ids, Reader, chatglm2, qwen
from tests.texts import NASTY, draw_passages, draw_texts

FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
ADDED: dict[str, dict[str, bool]] = {
    "<think>": {},
    "<think>x": {},
    "<norm>": {"normalized": True},
    "two words": {"normalized": True},
    "<l>": {"lstrip": True},
    "<r>": {"rstrip": True},
    "<lr>": {"lstrip": True, "rstrip": True, "special": True},
    "wörd": {"single_word": True},
    "词语": {},
    "[INST]": {"special": True},
}
PLACES = (
    "{n}",
    "a{n}b",
    "a {n} b",
    " {n}",
    "{n}{n} x",
    "你好{n}\n\n世",
    "x\n{n}",
    "{n} {n}",
    "\u2581{n}\u2581",
    "{n}\n",
)
FAMILIES = ("llama", "mistral", "gemma", "qwen2", "bloom", "opt", "qwen", "chatglm2")
NO_PREFIX = b"\x1a\x02\x18\x00"
"""Behind a SentencePiece model: normalizer_spec.add_dummy_prefix is false."""
MAX_CHARACTERS = 2000


def add_tokens(folder: Path, **config: Any) -> None:
    """Puts `ADDED` behind the vocabulary of a model's folder, as `added_tokens_decoder` has them."""
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text()) | config
    added = {
        str(size + place): {"content": name, **FLAGS, **flags}
        for place, (name, flags) in enumerate(ADDED.items())
    }
    found["added_tokens_decoder"] = (found.get("added_tokens_decoder") or {}) | added
    path.write_text(json.dumps(found))


def awkward_lines() -> list[str]:
    """Texts that make trouble, and tokens in every position."""
    names = [*ADDED, "</s>", "<s>", "<|im_end|>", "<|endoftext|>"]
    placed = [form.format(n=name) for name in names for form in PLACES]
    return [*NASTY, *draw_texts(300), *draw_passages(40_000), *placed]


def collect_lines(data: Sequence[Path], count: int) -> list[str]:
    """Lines of data, of code, and of both with tokens put in; different ones, as many as asked for.

    Args:
        data: Files and folders.
        count: How many.
    """
    generator = random.Random(0)
    sources = Path(__file__).resolve().parents[2]
    real = [text for path in data for text in _strings_below(path)] or draw_passages(400_000)
    code = [
        line for path in sorted(sources.glob("finetune/**/*.py")) for line in path.read_text().splitlines()
    ]
    blocks = ["\n".join(code[start : start + 8]) for start in range(0, len(code), 8)]
    real, blocks = _distinct(real, generator), _distinct(blocks, generator)
    lines = _distinct(awkward_lines(), generator)
    num_placed = count // 8
    lines += [_with_tokens(text, generator) for text in generator.choices(real, k=num_placed)]
    lines += blocks[: count // 8]
    lines += real[: max(0, count - len(lines))]
    if len(lines) < count:
        lines += [line for text in real for line in text.splitlines()]
    lines = _distinct(lines, generator)
    while len(lines) < count:
        lines += [_with_tokens(text, generator) for text in generator.choices(real, k=count - len(lines))]
        lines = _distinct(lines, generator)
    return lines[:count]


def _distinct(texts: Sequence[str], generator: random.Random) -> list[str]:
    found = list(dict.fromkeys(text[:MAX_CHARACTERS] for text in texts))
    generator.shuffle(found)
    return found


def _strings_below(path: Path) -> Iterator[str]:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.suffix not in (".json", ".jsonl", ".txt"):
            continue
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":
            yield from content.splitlines()
            continue
        try:
            yield from _strings_in(json.loads(content))
        except ValueError:
            for line in content.splitlines():
                yield from _strings_in(json.loads(line))


def _strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings_in(each)


def _with_tokens(text: str, generator: random.Random, names: Sequence[str] = ()) -> str:
    """A text with up to three names in it: at its ends, within words, beside blanks, one behind the other."""
    for _ in range(generator.randrange(1, 4)):
        place = generator.choice((0, len(text), generator.randrange(len(text) + 1)))
        name = generator.choice(names or [*ADDED, "</s>", "<s>", "<|endoftext|>"])
        left, right = (generator.choice(("", "", " ", "  ", "\n")) for _ in range(2))
        text = f"{text[:place]}{left}{name}{right}{text[place:]}"
    return text


def make_folder(family: str, folder: Path, vocabulary: Path | None) -> Path:
    """A tiny model of a family with added tokens; with the vocabulary file of a published one where it is given."""
    build_tiny(family, folder)
    if vocabulary is not None:
        import sentencepiece

        for name in ("tokenizer.model", "sentencepiece.bpe.model"):  # transformers' name and PaddleNLP's
            shutil.copyfile(vocabulary, folder / name)
        size = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary)).get_piece_size()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        settings.pop("added_tokens_decoder", None)
        path.write_text(json.dumps(settings))
    if not FACTS[family].blank_in_front:  # nor does transformers for this family
        path = folder / "tokenizer.model"
        path.write_bytes(path.read_bytes() + NO_PREFIX)
    if FACTS[family].ids_from == "transformers":
        add_tokens(folder)
    return folder


def references(family: str, folder: Path) -> dict[bool, Reader]:
    """What gives the right ids: with special tokens as text (True), and as tokens (False)."""
    if FACTS[family].ids_from != "transformers":
        return {"tiktoken": qwen, "sentencepiece": chatglm2}[FACTS[family].ids_from](folder)
    return by_transformers(folder)


def by_transformers(folder: Path) -> dict[bool, Reader]:
    """The readers of transformers' fast tokenizer of a folder."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)

    def read(texts: Sequence[str], *, splits: bool) -> list[Ids]:
        theirs.backend_tokenizer.encode_special_tokens = splits
        found = theirs.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in found]

    return {splits: lambda texts, splits=splits: read(texts, splits=splits) for splits in (False, True)}


def readers(family: str, folder: Path, *, fast: bool) -> dict[str, tuple[Reader, bool]]:
    """The project's: as a template's text, as data, and as data whose special tokens are text.

    Args:
        family: Name of the model's.
        folder: Its folder.
        fast: Whether to read by the libraries without Paddle; otherwise by PaddleNLP's tokenizer.
    """
    split, joined = (_encoder(family, folder, fast=fast, splits_special=splits) for splits in (True, False))
    return {
        "template": (lambda texts: [split.encode_special(text) for text in texts], False),
        "data": (lambda texts: [list(map(int, ids)) for ids in joined.encode_many(texts)], False),
        "split": (lambda texts: [list(map(int, ids)) for ids in split.encode_many(texts)], True),
    }


def _encoder(family: str, folder: Path, *, fast: bool, splits_special: bool) -> Any:
    record = get_family(family)
    if fast:
        encoder, reason = load_fast_encoder(folder, record, splits_special=splits_special)
        assert encoder is not None, reason
        return encoder
    loaded = load_encoder(folder, record, splits_special=splits_special)
    return FamilyEncoder(loaded.tokenizer, record, splits_special=splits_special)


def compare_published(name: str, folder: Path, lines: Sequence[str], *, fast: bool) -> dict[str, Any]:
    """The same for a published format that `make_published` wrote, with its tokens in some of the lines."""
    kind = KINDS[name]
    expected = kind.references(folder) if kind.references else by_transformers(folder)
    lines = lines_with(kind.names, lines)
    return compare(kind.family, folder, lines, fast=fast, expected=expected) | {"family": name}


def lines_with(names: Sequence[str], lines: Sequence[str]) -> list[str]:
    """As many lines: some with each of the names in every position, in an eighth the names stand anywhere."""
    generator = random.Random(1)
    count = len(lines)
    placed = [form.format(n=name) for name in names for form in PLACES][: count // 4]
    mixed = [_with_tokens(text, generator, names) for text in generator.choices(lines, k=count // 8)]
    return list(dict.fromkeys([*placed, *mixed, *lines]))[:count]


def compare(
    family: str,
    folder: Path,
    lines: Sequence[str],
    *,
    fast: bool,
    expected: dict[bool, Reader] | None = None,
) -> dict[str, Any]:
    """Counts lines with other ids than the reference's, which are the family's where none are given."""
    expected = expected or references(family, folder)
    wanted = {splits: read(lines) for splits, read in expected.items()}
    wrong: dict[str, list[str]] = {}
    began = time.perf_counter()
    for name, (read, splits) in readers(family, folder, fast=fast).items():
        found = read(lines)
        wrong[name] = [
            line for line, a, b in zip(lines, found, wanted[splits], strict=True) if list(a) != list(b)
        ]
    return {
        "family": family,
        "reader": "fast" if fast else "PaddleNLP",
        "lines": len(lines),
        "tokens": sum(map(len, wanted[False])),
        "seconds": time.perf_counter() - began,
        "different": {name: len(some) for name, some in wrong.items()},
        "examples": [line[:200] for some in wrong.values() for line in some[:3]],
    }


def main() -> None:
    """Compares what the command line names."""
    parser = argparse.ArgumentParser(
        description="Compare the ids of many lines with those of other libraries."
    )
    parser.add_argument("data", nargs="*", type=Path, help="files or folders with texts")
    parser.add_argument("--lines", type=int, default=20_000, help="how many (20000)")
    parser.add_argument(
        "--results", type=Path, help="file that a line is written to for each family and reader"
    )
    parser.add_argument(
        "--families",
        default=";".join((*FAMILIES, *KINDS)),
        help="names of families and of formats in tests.reference.published_tokenizers, separated by semicolons",
    )
    parser.add_argument("--readers", default="fast,PaddleNLP", help="fast, PaddleNLP or both")
    parser.add_argument(
        "--llama_vocabulary", type=Path, help="tokenizer.model of a published Llama, instead of a tiny one"
    )
    arguments = parser.parse_args()
    lines = collect_lines(arguments.data, arguments.lines)
    published = {"llama": arguments.llama_vocabulary}
    for family in arguments.families.split(";"):
        with tempfile.TemporaryDirectory() as folder:
            vocabulary = published.get(family)
            model = Path(folder) / "model"
            if family in FAMILIES:
                make_folder(family, model, vocabulary)
            else:
                make_published(family, model)
            for reader in arguments.readers.split(","):
                run = compare if family in FAMILIES else compare_published
                result = run(family, model, lines, fast=reader == "fast")
                result["vocabulary"] = "published" if vocabulary else "tiny"
                print(
                    family,
                    reader,
                    result["different"],
                    f"{result['seconds']:.0f} s",
                    *map(repr, result["examples"][:4]),
                )
                if arguments.results:
                    with arguments.results.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(result, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
