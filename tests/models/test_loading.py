import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import UserError
from finetune.families.family import get_family, import_object
from finetune.models.loading import build_config, load_model
from finetune.models.resolve import resolve_model
from finetune.models.tensor_readers import plan_readers
from finetune.models.tiny.checkpoint import build_tiny
from finetune.storage.checkpoints import Checkpoint
from finetune.tokenizers.encoder import FamilyEncoder
from finetune.tokenizers.loading import load_tokenizer
from tests.storage.torch_writing import save_bin

INPUT_IDS = np.array([[1, 5, 280, 17, 300, 9]])


def _logits(model) -> np.ndarray:
    """(1, length, vocabulary) for a fixed input."""
    import paddle

    model.eval()
    with paddle.no_grad():
        output = model(paddle.to_tensor(INPUT_IDS))
    return np.asarray((output[0] if isinstance(output, tuple) else output).numpy())


def _rewrite(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "np"})


def _edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_logits_equal_those_of_paddlenlps_own_loading(tiny_folder):
    resolved = resolve_model(tiny_folder)
    reference = import_object(resolved.family.model_class).from_pretrained(str(tiny_folder))
    logits = _logits(load_model(resolved, dtype="float32"))
    assert logits.std() > 1e-3
    np.testing.assert_array_equal(logits, _logits(reference))


def test_generation_stops_at_the_tokenizers_end_token(case, tiny_folder):
    tokenizer = load_tokenizer(tiny_folder)
    encoder = FamilyEncoder(tokenizer, get_family(case.name))
    model = load_model(resolve_model(tiny_folder), dtype="float32", encoder=encoder)
    assert model.generation_config.eos_token_id == encoder.eos_token_id
    assert model.generation_config.pad_token_id == encoder.pad_token_id


def test_overrides_reach_the_config(tiny_folder):
    model = load_model(resolve_model(tiny_folder), dtype="float32", config_overrides={"use_cache": False})
    assert model.config.use_cache is False


def test_parameters_take_the_asked_type(case, tiny_folder):
    if not case.bfloat16_on_cpu:
        pytest.skip(
            "PaddleNLP makes this family's rotary frequencies with a kernel that CPUs lack in bfloat16"
        )
    import paddle

    model = load_model(resolve_model(tiny_folder), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {paddle.bfloat16}


def test_fused_layers_compute_the_same(case, tiny_folder):
    if not case.fused_layers:
        pytest.skip("PaddleNLP has no fused layers for this family")
    resolved = resolve_model(tiny_folder)
    plain = load_model(resolved, dtype="float32")
    fused = load_model(
        resolved, dtype="float32", config_overrides={"fuse_attention_qkv": True, "fuse_attention_ffn": True}
    )
    assert any("qkv_proj" in name for name, _ in fused.named_parameters())
    np.testing.assert_allclose(_logits(fused), _logits(plain), atol=1e-6)


def test_fused_checkpoint_fits_plain_layers(case, tiny_folder, tmp_path):
    if not case.fused_layers:
        pytest.skip("PaddleNLP has no fused layers for this family")
    resolved = resolve_model(tiny_folder)
    fused = load_model(resolved, dtype="float32", config_overrides={"fuse_attention_qkv": True})
    fused.save_pretrained(str(tmp_path / "fused"))
    plain = load_model(
        resolve_model(tmp_path / "fused"), dtype="float32", config_overrides={"fuse_attention_qkv": False}
    )
    for name, parameter in load_model(resolved, dtype="float32").state_dict().items():
        np.testing.assert_array_equal(plain.state_dict()[name].numpy(), parameter.numpy())


def test_paddlenlps_pdparams_are_read(tiny_folder, tmp_path):
    model = load_model(resolve_model(tiny_folder), dtype="float32")
    model.save_pretrained(str(tmp_path / "saved"), safe_serialization=False)
    assert (tmp_path / "saved" / "model_state.pdparams").is_file()
    np.testing.assert_array_equal(
        _logits(load_model(resolve_model(tmp_path / "saved"), dtype="float32")), _logits(model)
    )


def _write_hugging_face(source, target, *, tied: bool, marked: bool) -> None:
    """The same model as transformers would store it: other names, linear layers transposed."""
    target.mkdir()
    tensors = {}
    for name, array in load_file(source / "model.safetensors").items():
        linear = array.ndim == 2 and "embed_tokens" not in name
        tensors[name.replace("llama.", "model.")] = np.ascontiguousarray(array.T) if linear else array
    if tied:
        del tensors["lm_head.weight"]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"} if marked else None)
    (target / "config.json").write_text((source / "config.json").read_text())
    _edit_config(target, tie_word_embeddings=tied)


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
def test_hugging_face_layout_gives_the_same_logits(llama_folder, tmp_path, marked):
    _write_hugging_face(llama_folder, tmp_path / "hf", tied=False, marked=marked)
    before = sorted(path.name for path in (tmp_path / "hf").iterdir())
    loaded = load_model(resolve_model(tmp_path / "hf"), dtype="float32")
    original = load_model(resolve_model(llama_folder), dtype="float32")
    np.testing.assert_array_equal(_logits(loaded), _logits(original))
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == before


def test_tied_embeddings_need_no_output_weight(llama_folder, tmp_path):
    _write_hugging_face(llama_folder, tmp_path / "hf", tied=True, marked=True)
    model = load_model(resolve_model(tmp_path / "hf"), dtype="float32")
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    np.testing.assert_array_equal(state["lm_head.weight"], state["llama.embed_tokens.weight"])
    np.testing.assert_array_equal(
        state["llama.embed_tokens.weight"],
        load_file(llama_folder / "model.safetensors")["llama.embed_tokens.weight"],
    )


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_tensor_parallel_ranks_hold_parts_of_the_whole(llama_folder, fused):
    resolved = resolve_model(llama_folder)
    model_class = import_object(resolved.family.model_class)
    whole = load_file(llama_folder / "model.safetensors")
    ranks = []
    for rank in range(2):
        overrides = {"tensor_parallel_degree": 2, "tensor_parallel_rank": rank, "fuse_attention_ffn": fused}
        config = build_config(resolved, model_class, dtype="float32", overrides=overrides)
        readers = plan_readers(model_class, config, Checkpoint(llama_folder), family=resolved.family)
        ranks.append({name: np.asarray(read()) for name, read in readers.items()})

    def joined(name, axis):
        return np.concatenate([part[name] for part in ranks], axis=axis)

    mlp = "llama.layers.1.mlp."
    np.testing.assert_array_equal(joined(mlp + "down_proj.weight", 0), whole[mlp + "down_proj.weight"])
    np.testing.assert_array_equal(joined("lm_head.weight", 1), whole["lm_head.weight"])
    np.testing.assert_array_equal(ranks[1]["llama.norm.weight"], whole["llama.norm.weight"])
    gate, up = whole[mlp + "gate_proj.weight"], whole[mlp + "up_proj.weight"]
    if fused:
        half = gate.shape[1] // 2
        expected = np.concatenate([gate[:, half:], up[:, half:]], axis=1)
        np.testing.assert_array_equal(ranks[1][mlp + "gate_up_fused_proj.weight"], expected)
    else:
        np.testing.assert_array_equal(joined(mlp + "gate_proj.weight", 1), gate)


def _write_weights(folder, tensors, kind) -> None:
    """Replaces a folder's weights by the same tensors in another container."""
    (folder / "model.safetensors").unlink()
    if kind == "pdparams":
        (folder / "model_state.pdparams").write_bytes(pickle.dumps(tensors, 4))
    elif kind == "bin":
        save_bin(folder / "pytorch_model.bin", tensors)
    elif kind == "shards":
        names = sorted(tensors)
        index = {}
        for file, part in {"a.safetensors": names[::2], "b.safetensors": names[1::2]}.items():
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "np"})
            index |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "np"})


@pytest.mark.parametrize("kind", ["safetensors", "shards", "pdparams", "bin"])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_all_weight_faults_are_listed_together(family, kind, corpus, tmp_path):
    folder = build_tiny(family, tmp_path / family, corpus=corpus, vocab_size=330, num_layers=2)
    tensors = load_file(folder / "model.safetensors")
    norm, lacking = {
        "llama": ("llama.norm.weight", "llama.layers.1.mlp.up_proj.weight"),
        "bloom": ("bloom.ln_f.bias", "bloom.h.1.mlp.dense_h_to_4h.weight"),
    }[family]
    del tensors[lacking]
    tensors[norm] = np.zeros(7, np.float32)
    tensors[f"{family}.stranger.weight"] = np.zeros(2, np.float32)
    if kind == "bin":
        tensors = {
            _hugging_face_name(family, name): array if array.ndim < 2 or "embed" in name else array.T
            for name, array in tensors.items()
        }
    _write_weights(folder, tensors, kind)
    with pytest.raises(UserError) as error:
        load_model(resolve_model(folder), dtype="float32")
    message = str(error.value)
    stranger = f"{family}.stranger.weight"
    if kind == "bin":
        stranger = _hugging_face_name(family, stranger)
    assert f"files lack (1): {lacking}" in message
    assert f"does not know (1): {stranger}" in message
    assert f"have another shape (1): {norm} is [7] in the files, [64] in the model" in message


def _hugging_face_name(family, name):
    return name.replace(f"{family}.", {"llama": "model.", "bloom": "transformer."}[family], 1)


def test_long_lists_are_cut(llama_folder):
    _edit_config(llama_folder, num_hidden_layers=6)
    with pytest.raises(UserError, match=r"files lack \(36\).*and 16 more"):
        load_model(resolve_model(llama_folder), dtype="float32")


RESOLVE_FAULTS = [
    (lambda folder: (folder / "config.json").unlink(), "is not a model folder: it has no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "is no valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
    (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    (
        lambda folder: _edit_config(folder, model_type="unheard_of"),
        "is not supported: no family covers model_type 'unheard_of'.*covered families: .*llama",
    ),
]


@pytest.mark.parametrize(("damage", "message"), RESOLVE_FAULTS)
def test_unusable_folder(llama_folder, damage, message):
    damage(llama_folder)
    with pytest.raises(UserError, match=message):
        resolve_model(llama_folder)


def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(UserError, match=r"model folder .*nowhere does not exist"):
        resolve_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model folder ./nowhere does not exist"):
        resolve_model("./nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"is a file: give the folder"):
        resolve_model(tmp_path / "file")


def test_resolving_imports_no_paddle(llama_folder):
    code = (
        "import sys; from finetune.models.resolve import resolve_model; resolve_model(sys.argv[1]); "
        "import finetune.tokenizers.encoder; "
        "print([name for name in sys.modules if name.startswith('paddle')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(llama_folder)], capture_output=True, text=True, timeout=60
    )
    assert run.stdout.strip() == "[]", run.stderr


def test_a_config_that_no_model_can_be_built_from_ends_in_a_message(llama_folder):
    _edit_config(llama_folder, num_key_value_heads=8)
    with pytest.raises(UserError, match=r"no model can be built from its config.json|shape"):
        load_model(resolve_model(llama_folder), dtype="float32")


def test_codes_of_a_quantisation_that_nothing_is_said_of_are_refused(llama_folder):
    """Read as numbers they would be a model of noise."""

    def code(tensors):
        for name in [name for name in tensors if name.endswith("q_proj.weight")]:
            tensors[name] = (tensors[name] * 1000).astype(np.int8)

    _rewrite(llama_folder, code)
    with pytest.raises(UserError, match=r"whole numbers.*quantization_config.*q_proj.weight \(int8\)"):
        load_model(resolve_model(llama_folder), dtype="float32")
