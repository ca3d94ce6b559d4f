"""GGUF files, read back with the format's library and compared with the model's own files, tensor by tensor."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.models.tiny.checkpoint import build_tiny
from finetune.serving.gguf.__main__ import main
from finetune.serving.gguf.run import check_file, export_gguf
from finetune.serving.gguf.vocabulary import Vocabulary
from finetune.storage.safetensors_files import read_safetensors
from tests.conftest import ROOT

gguf = pytest.importorskip("gguf", reason="the export to GGUF is an extra")

HEADS, GROUPS, LAYERS, HIDDEN = 4, 2, 2, 64
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "bloom": "bloom"}
GATED_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
BLOOM_NAMES = {
    "self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "word_embeddings": "token_embd",
    "word_embeddings_layernorm": "token_embd_norm", "ln_f": "output_norm",
}  # fmt: skip
# Whether neighbours are turned together, the layers' names, groups of keys and values, the kind of tokenizer, the end.
INTERLEAVED = {"llama", "mistral"}
LAYER_NAMES = {name: GATED_NAMES for name in ARCHITECTURES} | {"bloom": BLOOM_NAMES}
NUM_GROUPS = {name: GROUPS for name in ARCHITECTURES} | {"bloom": HEADS}
TINY = {name: {"num_key_value_heads": GROUPS} for name in ARCHITECTURES} | {"bloom": {}}
HAS_ROTARY = {name: True for name in ARCHITECTURES} | {"bloom": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        name: build_tiny(
            name,
            place / name,
            corpus=ROOT / "data" / "dev.json",
            hidden_size=HIDDEN,
            num_layers=LAYERS,
            num_heads=HEADS,
            vocab_size=330,
            **TINY[name],
        )
        for name in ARCHITECTURES
    }


def field(reader, name):
    found = reader.get_field(name)
    return None if found is None else found.contents()


def expected(folder: Path, family: str) -> dict[str, np.ndarray]:
    """What llama.cpp is to find: an [out, in] matrix of every layer, with its own order of rows."""
    found = {}
    for name, stored in read_safetensors(folder / "model.safetensors").arrays.items():
        layer, _, ending = name.rpartition(".")
        values = stored.load()
        outer = layer.rpartition(".")[2]
        parts = layer.split(".")
        if len(parts) > 3:
            number = next(part for part in parts if part.isdigit())
            inner = layer.partition(f".{number}.")[2]
            theirs = f"blk.{number}.{LAYER_NAMES[family][inner]}"
        else:
            theirs = OUTER_NAMES[outer]
        is_table = theirs == "token_embd"
        values = values.T if values.ndim == 2 and not is_table else values
        if family in INTERLEAVED and ("attn_q" in theirs or "attn_k" in theirs):
            heads = HEADS if "attn_q" in theirs else GROUPS
            dim = len(values) // heads
            # Neighbours are turned together: 0, dim/2, 1, dim/2 + 1, ...
            order = [dim // 2 * (place % 2) + place // 2 for place in range(dim)]
            values = values[[head * dim + row for head in range(heads) for row in order]]
        if theirs.endswith("attn_qkv"):
            dim = HIDDEN // HEADS
            rows = [
                (head * 3 + kind) * dim + row
                for kind in range(3)
                for head in range(HEADS)
                for row in range(dim)
            ]
            values = values[rows]
        found[f"{theirs}.{ending}"] = values
    return found


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("type_name", ["f32", "f16", "q8_0"])
def test_every_tensor_is_the_models(folders, family, type_name, tmp_path):
    facts = export_gguf(str(folders[family]), tmp_path / "out", type_name)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    wanted = expected(folders[family], family)
    assert {tensor.name for tensor in reader.tensors} == set(wanted)
    assert field(reader, "general.architecture") == ARCHITECTURES[family] == facts.architecture
    for tensor in reader.tensors:
        values = wanted[tensor.name]
        stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
        assert tuple(tensor.shape[::-1]) == values.shape
        kind = tensor.tensor_type.name
        if values.ndim == 1 or type_name == "f32":
            assert kind == "F32"
            np.testing.assert_array_equal(stored, values)
        elif type_name == "f16" or values.shape[-1] % 32:
            assert kind == "F16"
            np.testing.assert_array_equal(stored, values.astype(np.float16).astype(np.float32))
        else:
            assert kind == "Q8_0"
            blocks = np.abs(values).reshape(-1, 32).max(axis=1, keepdims=True)
            # Half a step of 1/127, and the rounding of the scale to half precision.
            assert (np.abs(stored - values).reshape(-1, 32) <= blocks * (0.5 / 127 + 1e-3)).all()
    assert type_name == "q8_0" or not facts.narrow


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_sizes_and_ids_are_the_models(folders, family, tmp_path):
    folder = folders[family]
    export_gguf(str(folder), tmp_path / "out", "f32")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    name, config = ARCHITECTURES[family], json.loads((folder / "config.json").read_text())
    assert field(reader, f"{name}.block_count") == LAYERS
    assert field(reader, f"{name}.embedding_length") == HIDDEN
    assert field(reader, f"{name}.attention.head_count") == HEADS
    assert field(reader, f"{name}.attention.head_count_kv") == NUM_GROUPS[family]
    assert field(reader, f"{name}.context_length") == config.get(
        "max_position_embeddings", config.get("seq_length")
    )
    dim = config.get("head_dim", HIDDEN // HEADS)
    assert field(reader, f"{name}.rope.dimension_count") == (dim if HAS_ROTARY[family] else None)
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == config["vocab_size"]
    CHECK_TOKENIZER[family](folder, reader, tokens, types)


def check_pieces(folder, reader, tokens, types):
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(next(folder.glob("*.model"))))
    assert tokens == [pieces.id_to_piece(index) for index in range(len(tokens))]
    scores = field(reader, "tokenizer.ggml.scores")
    assert scores == [pieces.get_score(index) for index in range(len(tokens))]
    assert types[:4] == [2, 3, 3, 6] and types[-1] == 1
    assert [field(reader, f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")] == [1, 2]
    assert field(reader, "tokenizer.ggml.model") == "llama"
    assert field(reader, "tokenizer.ggml.add_bos_token")


def check_tokenizer_file(folder, reader, tokens, types):
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = content["model"]["vocab"] | {each["content"]: each["id"] for each in content["added_tokens"]}
    merges = [each if isinstance(each, str) else " ".join(each) for each in content["model"]["merges"]]
    check_merges(reader, tokens, types, ids=ids, merges=merges, pre="bloom", end="</s>")


def check_vocabulary_files(folder, reader, tokens, types):
    ids = json.loads((folder / "vocab.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ids |= {each["content"]: int(key) for key, each in settings["added_tokens_decoder"].items()}
    merges = [line for line in (folder / "merges.txt").read_text().split("\n")[1:] if line]
    check_merges(reader, tokens, types, ids=ids, merges=merges, pre="qwen2", end="<|endoftext|>")


def check_merges(reader, tokens, types, *, ids, merges, pre, end):
    assert field(reader, "tokenizer.ggml.model") == "gpt2"
    assert field(reader, "tokenizer.ggml.pre") == pre
    assert {name: tokens[index] for name, index in ids.items()} == {name: name for name in ids}
    assert field(reader, "tokenizer.ggml.merges") == merges
    assert field(reader, "tokenizer.ggml.eos_token_id") == ids[end] and types[ids[end]] == 3
    assert not field(reader, "tokenizer.ggml.add_bos_token")


CHECK_TOKENIZER = {
    "llama": check_pieces,
    "mistral": check_pieces,
    "qwen2": check_vocabulary_files,
    "qwen3": check_vocabulary_files,
    "bloom": check_tokenizer_file,
}


def changed(folder: Path, target: Path, **fields) -> Path:
    """A copy with other fields in its configuration."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_stretched_positions_are_written(folders, tmp_path):
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    folder = changed(folders["llama"], tmp_path / "a", rope_scaling=llama3, rope_theta=500000.0)
    export_gguf(str(folder), tmp_path / "a-out", "f32")
    reader = gguf.GGUFReader(tmp_path / "a-out" / "model.gguf")
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    assert field(reader, "llama.rope.freq_base") == 500000.0
    # 64 tokens turn the first pair ten times, which is fast; the second pair once in 32 tokens at 500000^(1/8).
    assert len(factors) == HIDDEN // HEADS // 2 and factors[0] == 1.0 and factors[-1] == pytest.approx(8.0)
    assert (np.diff(factors) >= 0).all() and factors[1] > 1.0

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    folder = changed(folders["qwen2"], tmp_path / "b", rope_scaling=yarn)
    export_gguf(str(folder), tmp_path / "b-out", "f32")
    reader = gguf.GGUFReader(tmp_path / "b-out" / "model.gguf")
    assert field(reader, "qwen2.rope.scaling.type") == "yarn"
    assert field(reader, "qwen2.rope.scaling.factor") == 4.0
    assert field(reader, "qwen2.rope.scaling.original_context_length") == 128
    folder = changed(folders["qwen2"], tmp_path / "c", rope_scaling=yarn | {"attention_factor": 1.5})
    with pytest.raises(UserError, match=r"attention_factor 1.5 for yarn"):
        export_gguf(str(folder), tmp_path / "c-out", "f32")
    assert not (tmp_path / "c-out").exists()


def test_a_window_ends_the_texts(folders, tmp_path, capsys):
    folder = changed(folders["mistral"], tmp_path / "model", sliding_window=100)
    main(["--model_name_or_path", str(folder), "--output_path", str(tmp_path / "out")])
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert field(reader, "llama.context_length") == 100
    assert "texts end at 100 tokens" in capsys.readouterr().out


def test_the_trained_template_goes_along(folders, tmp_path):
    folder = changed(folders["qwen2"], tmp_path / "model")
    record = {"chat_template": "chatml", "system": "Be brief."}
    (folder / "trained_template.json").write_text(json.dumps(record))
    export_gguf(str(folder), tmp_path / "out", "f16")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert "<|im_start|>user" in field(reader, "tokenizer.chat_template")
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert tokens[field(reader, "tokenizer.ggml.eot_token_id")] == "<|im_end|>"
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert 'SYSTEM """Be brief."""\n' in text and 'PARAMETER stop "<|im_end|>"\n' in text


def test_what_reads_back_otherwise_is_told(folders, tmp_path):
    export_gguf(str(folders["llama"]), tmp_path / "out", "f32")
    path = tmp_path / "out" / "model.gguf"
    reader = gguf.GGUFReader(path)
    tokens = field(reader, "tokenizer.ggml.tokens")
    sums = {tensor.name: zlib.crc32(np.ascontiguousarray(tensor.data)) for tensor in reader.tensors}
    check_file(path, sums, Vocabulary("llama", tokens, []))
    content = bytearray(path.read_bytes())
    content[reader.tensors[3].data_offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.gguf reads back otherwise.*" + reader.tensors[3].name):
        check_file(path, sums, Vocabulary("llama", tokens, []))


def test_numbers_that_half_precision_has_not_are_told(folders, tmp_path):
    from tests.serving.gguf_files.rewriting import rewrite

    folder = changed(folders["qwen3"], tmp_path / "model")
    rewrite(folder / "model.safetensors", "lm_head.weight", 1e5)
    with pytest.raises(
        UserError, match=r"lm_head\.weight holds 100000, but F16 ends at 65504: use --type f32"
    ):
        export_gguf(str(folder), tmp_path / "out", "f16")
    rewrite(folder / "model.safetensors", "lm_head.weight", np.nan)
    with pytest.raises(UserError, match=r"infinite or none"):
        export_gguf(str(folder), tmp_path / "out", "f32")


def test_an_earlier_export_is_replaced_only_when_asked(folders, tmp_path):
    words = ["--model_name_or_path", str(folders["llama"]), "--output_path", str(tmp_path / "out")]
    main(words)
    with pytest.raises(UserError, match="add --overwrite true"):
        main(words)
    main([*words, "--overwrite", "--type", "q8_0"])
