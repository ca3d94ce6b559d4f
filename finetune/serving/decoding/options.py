"""Command-line options that every program which generates shares, checked without importing Paddle."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.adapter_folder import CONFIG_FILES, find_adapter_as_model, find_adapter_faults
from finetune.errors import UserError
from finetune.machine.device import detect_device, device_kind, find_device_fault
from finetune.models.hubs.adapters import is_hub_name, local_adapter
from finetune.serving.decoding.exported import is_exported, read_facts
from finetune.serving.decoding.settings import DecodingSettings
from finetune.storage.checkpoints import find_start
from finetune.storage.quantisation.record import read_scheme

if TYPE_CHECKING:
    from finetune.storage.quantisation.scheme import QuantisationScheme

DTYPES = ("float32", "float16", "bfloat16")
MODES = ("dynamic", "static")
BASES = ("trained", "original")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model answers, and how prompts are written for it.

    Attributes:
        model_name_or_path: Folder or hub name of a model, or a folder written by export_model.py.
        lora_path: Output folder of a LoRA run, or an adapter's name on a hub.
        prefix_path: The same of a prefix-tuning run.
        mode: "dynamic", "static", or None: static for an exported folder.
        device: "cpu", "gpu" or "gpu:1".
        dtype: Type of the weights; None: float32 on CPU, else that of config.json.
        chat_template: As in training; None asks the folder of the adapter or the model.
        system: System text of conversations that have none.
        enable_thinking: What the template is told of thoughts before answers; None: as in training.
        src_length: Most tokens of a prompt; what is older is cut.
        base: "trained": the base of a LoRA run is quantised as it was in training; "original": it is not.
    """

    model_name_or_path: str
    lora_path: Path | None = None
    prefix_path: Path | None = None
    mode: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    chat_template: str | None = None
    system: str | None = None
    enable_thinking: bool | None = None
    src_length: int = 1024
    base: str = BASES[0]

    @property
    def base_quantisation(self) -> QuantisationScheme | None:
        """How the weights under the adapter are quantised.

        Raises:
            UserError: The adapter's record of it cannot be read.
        """
        return read_scheme(self.lora_path) if self.lora_path and self.base == BASES[0] else None

    @property
    def is_static(self) -> bool:
        """Whether an exported graph runs instead of PaddleNLP's layers."""
        return self.mode == "static" or (self.mode is None and is_exported(Path(self.model_name_or_path)))

    @property
    def adapter(self) -> Path | None:
        """Folder of the adapter, of whichever kind."""
        return self.lora_path or self.prefix_path

    def with_local_adapter(self) -> ModelOptions:
        """The same with the folder of an adapter that was given by its name on a hub.

        Raises:
            UserError: No hub has it, or it is no adapter.
        """
        given = {name: path for name in CONFIG_FILES if (path := getattr(self, name))}
        local: dict[str, Any] = {name: local_adapter(path, name) for name, path in given.items()}
        return replace(self, **local)

    def faults(self) -> list[str]:
        """What is wrong with the options themselves, one message each; an adapter on a hub is not looked at."""
        found = []
        if self.lora_path and self.prefix_path:
            found.append(
                "lora_path and prefix_path are both given, but a run trains one of them: leave one out"
            )
        for name in CONFIG_FILES:
            if (folder := getattr(self, name)) and not is_hub_name(folder):
                found += find_adapter_faults(name, folder)
        if fault := find_adapter_as_model(Path(self.model_name_or_path)):
            found.append(fault)
        if fault := find_device_fault(self.device):
            found.append(fault)
        if self.dtype not in (None, "float32") and device_kind(self.device) == "cpu":
            found.append(
                f"dtype is {self.dtype}, which Paddle cannot multiply on CPU: leave --dtype out, or use --device gpu"
            )
        if self.src_length < 1:
            found.append(f"src_length is {self.src_length} but must be at least 1: raise --src_length")
        return found + (self._static_faults() if self.is_static else self._dynamic_faults())

    def _static_faults(self) -> list[str]:
        found = [
            f"{name} is given, but a static model holds its adapter already: give it to export_model.py, or use "
            "--mode dynamic with the model that was exported"
            for name in CONFIG_FILES
            if getattr(self, name)
        ]
        if self.dtype:
            found.append("dtype is given, but a static model has its own: leave --dtype out")
        try:
            read_facts(Path(self.model_name_or_path))
        except UserError as error:
            found += error.faults
        return found

    def _dynamic_faults(self) -> list[str]:
        folder = Path(self.model_name_or_path)
        if not is_exported(folder) or find_start(folder):  # a quantised export holds its weights, too
            return []
        return [
            f"{self.model_name_or_path} is an exported model, which runs with --mode static only: leave --mode out, "
            "or give the folder that was exported"
        ]

    def system_text(self) -> str | None:
        """The system text of conversations that have none: the one given, else that of the training."""
        from finetune.data.templates.trained_template import trained_system

        if self.system is not None:
            return self.system
        folders = filter(None, (self.adapter, Path(self.model_name_or_path)))
        return next((text for folder in folders if (text := trained_system(folder)) is not None), None)

    def thinking(self) -> bool | None:
        """What the template is told of thoughts: what is given, else, for the template of the training, as it was."""
        from finetune.data.templates.trained_template import trained_template, trained_thinking

        if self.enable_thinking is not None or self.chat_template is not None:
            return self.enable_thinking
        for folder in filter(None, (self.adapter, Path(self.model_name_or_path))):
            if trained_template(folder) is not None:
                return trained_thinking(folder)
        return None

    def template_name(self, tokenizer_folder: Path) -> str:
        """The chat template: the one given, else that of the training, the tokenizer's own, its family's, or none."""
        from finetune.data.templates.default_template import family_format
        from finetune.data.templates.template import OWN_NAME, PLAIN_NAMES, load_template
        from finetune.data.templates.trained_template import trained_template

        if self.chat_template is not None:
            return self.chat_template
        for folder in filter(None, (self.adapter, Path(self.model_name_or_path))):
            if (name := trained_template(folder)) is not None:
                return name
        try:
            load_template(OWN_NAME, tokenizer_folder)
        except UserError:
            return family_format(tokenizer_folder) or PLAIN_NAMES[0]
        return OWN_NAME


def _read_switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def add_model_options(
    parser: argparse.ArgumentParser, *, needs_name: bool = True, src_length: int = 1024
) -> None:
    """The options of `ModelOptions`.

    Args:
        parser: Gets them.
        needs_name: Whether the model must be given by this option.
        src_length: Default of the most tokens of a prompt.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_name_or_path",
        required=needs_name,
        help="model folder or hub name, or a folder of export_model.py",
    )
    group.add_argument(
        "--lora_path",
        type=Path,
        help="output folder of a LoRA run, or an adapter's name on a hub; used without merging",
    )
    group.add_argument("--prefix_path", type=Path, help="output folder of a prefix-tuning run")
    group.add_argument(
        "--base",
        choices=BASES,
        default=BASES[0],
        help="under an adapter that was trained over a quantised base: that base, or the original weights (trained)",
    )
    group.add_argument(
        "--mode", choices=MODES, help="static runs an exported folder (default: what the folder is)"
    )
    group.add_argument("--device", help="cpu, gpu or gpu:1 (gpu where Paddle sees one)")
    group.add_argument(
        "--dtype", choices=DTYPES, help="type of the weights (CPU: float32, else config.json's)"
    )
    group.add_argument(
        "--chat_template",
        help="as in training: a name such as chatml, tokenizer, a file, or none (the one of the training, "
        "else the tokenizer's own, else none)",
    )
    group.add_argument(
        "--enable_thinking",
        type=_read_switch,
        metavar="{true,false}",
        help="whether answers begin with thoughts, for templates that have a switch (as in training, else theirs)",
    )
    group.add_argument("--system", help="system text of conversations that have none")
    group.add_argument(
        "--src_length", type=int, default=src_length, help=f"most tokens of a prompt ({src_length})"
    )


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """The options of `DecodingSettings`."""
    group = parser.add_argument_group("generation (greedy, unless one of the sampling options is given)")
    group.add_argument("--max_new_tokens", type=int, default=128, help="most tokens of an answer (128)")
    group.add_argument("--min_new_tokens", type=int, default=0, help="an answer does not end before (0)")
    group.add_argument("--top_k", type=int, help="sample among this many tokens; 1 is greedy, 0 all")
    group.add_argument("--top_p", type=float, help="sample among the tokens that hold this probability (1)")
    group.add_argument(
        "--temperature",
        type=float,
        help="below 1 keeps to the probable tokens, above 1 more even; 0 is greedy (1)",
    )
    group.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 repeats less (1)")
    group.add_argument(
        "--seed", type=int, default=0, help="of sampling; the same seed gives the same text (0)"
    )


def model_options(values: Mapping[str, Any]) -> ModelOptions:
    """The parsed options of `add_model_options`."""
    chosen = {name: values[name] for name in ModelOptions.__dataclass_fields__}
    return ModelOptions(**chosen | {"device": detect_device(values["device"])})


def decoding_settings(values: Mapping[str, Any]) -> DecodingSettings:
    """The parsed options of `add_decoding_options`.

    Raises:
        UserError: A value is out of range.
    """
    top_k, top_p, temperature = values["top_k"], values["top_p"], values["temperature"]
    if top_k is None:
        top_k = 1 if top_p is None and temperature is None else 0
    return DecodingSettings(
        max_new_tokens=values["max_new_tokens"],
        min_new_tokens=values["min_new_tokens"],
        top_k=top_k,
        top_p=1.0 if top_p is None else top_p,
        temperature=1.0 if temperature is None else temperature,
        repetition_penalty=values["repetition_penalty"],
        seed=values["seed"],
    )
