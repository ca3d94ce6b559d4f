"""The settings of a quantised base: what they say together, and what an adapter says about its own."""

import shlex
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.settings.model import UNQUANTISED
from finetune.storage.quantisation.record import read_scheme
from finetune.storage.quantisation.scheme import BLOCK_SIZES, QuantisationScheme

BLOCK_SIZE_FIELDS = {
    "weight_blocksize": "block_size",
    "weight_double_quant_block_size": "double_quant_block_size",
}


def scheme_of(values: Mapping[str, Any]) -> QuantisationScheme | None:
    """How the base is quantised by resolved settings; None: it is not."""
    algorithm = values["weight_quantize_algo"]
    if algorithm in (None, UNQUANTISED):
        return None
    return QuantisationScheme(
        algorithm=algorithm,
        block_size=values["weight_blocksize"],
        double_quant=values["weight_double_quant"],
        double_quant_block_size=values["weight_double_quant_block_size"],
    )


def resolve_quantisation(values: MutableMapping[str, Any]) -> list[str]:
    """Takes over how the base of the adapter in lora_path was quantised, where nothing else is said.

    Of an adapter that is on a hub nothing is known yet.
    """
    if not (values["lora"] and values["lora_path"] and Path(values["lora_path"]).is_dir()):
        return []
    try:
        trained = read_scheme(Path(values["lora_path"]))
    except UserError:  # told when the adapter is read
        return []
    asked = values["weight_quantize_algo"]
    if asked is None and trained is not None:
        values["weight_quantize_algo"] = trained.algorithm
        values["weight_double_quant"] = trained.double_quant
        values.update({name: getattr(trained, field) for name, field in BLOCK_SIZE_FIELDS.items()})
        return []
    if asked is None or trained == scheme_of(values):
        return []
    was = f"over a base in {trained.label}" if trained else "over a base that was not quantised"
    return [f"the adapter in lora_path was trained {was}, and this run has weight_quantize_algo {asked}"]


def find_export_command(values: Mapping[str, Any]) -> str | None:
    """The command that does what an argument file for quantisation after training asks for; None where it is none."""
    if not (values["do_ptq"] or values["do_gptq"]):
        return None
    form = "int4" if values["do_gptq"] or "int4" in str(values["quant_type"]) else "int8"
    words = [
        "python export_model.py",
        f"--model_name_or_path {_quoted(values, 'model_name_or_path', '<model>')}",
    ]
    if values["lora_path"]:
        words.append(f"--lora_path {_quoted(values, 'lora_path')}")
    words += [f"--output_path {_quoted(values, 'output_dir', '<output>')}", f"--quantize {form}"]
    if values["dataset_name_or_path"]:
        purpose = "calibration" if values["do_gptq"] else "perplexity"
        words.append(f"--{purpose}_data {_quoted(values, 'dataset_name_or_path')}")
    return " ".join(words)


def _quoted(values: Mapping[str, Any], name: str, missing: str = "") -> str:
    """A setting as a word of a command line; the first of several."""
    value = values[name]
    value = value[0] if isinstance(value, list | tuple) and value else value
    return shlex.quote(str(value)) if value else missing


def check_quantisation(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What the settings of a quantised base cannot be together with, as (names, fault)."""
    if command := find_export_command(values):
        name = "do_gptq" if values["do_gptq"] else "do_ptq"
        yield (
            (name,),
            f"{name} is true, which this version does not have in training: quantise with `{command}` (the weights; "
            f"activations stay as they are); to train with this file, remove {name}",
        )
    for name in BLOCK_SIZE_FIELDS:
        size = values[name]
        if size not in BLOCK_SIZES and BLOCK_SIZES[0] < size < BLOCK_SIZES[-1]:
            yield (name,), f"{name} is {size}: choose one of {', '.join(map(str, BLOCK_SIZES))}"
    scheme = scheme_of(values)
    if scheme is None:
        return
    shown = f"weight_quantize_algo is {scheme.algorithm}"
    if not values["lora"]:
        remedy = "add --lora true, or remove weight_quantize_algo"
        yield ("weight_quantize_algo", "lora"), f"{shown}, but packed weights cannot be trained: {remedy}"
    if values["pissa"]:
        fault = f"{shown} and pissa is true, which would change the packed weights that it starts from: choose one"
        yield ("weight_quantize_algo", "pissa"), fault
    if values["init_lora_weights"].startswith(("pissa", "olora")):
        start = values["init_lora_weights"]
        fault = f"{shown} and init_lora_weights is {start}, which would change the packed weights: choose one"
        yield ("weight_quantize_algo", "init_lora_weights"), fault
