"""What of a run's settings decides how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.machine.device import device_kind
from finetune.run.layout import sharding_stage
from finetune.run.model import parameter_dtype
from finetune.settings.engine_words import split_words
from finetune.settings.quantisation import scheme_of
from finetune.settings.sharding_words import SLICE_WORDS

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.settings.arguments import Arguments

FLOAT_BYTES, HALF_BYTES = 4, 2


@dataclass(frozen=True, kw_only=True)
class MemoryFacts:
    """Settings of a run, as far as memory depends on them.

    Attributes:
        device: Kind of the device: "cpu", "gpu", ...
        stores_half: Whether weights are in half precision (level O2).
        computes_half: Whether products are (levels O1 and O2).
        adapter_half: Whether an adapter's weights are in half precision.
        master_gradients: Whether gradients are added up in float32.
        sharding: Stage 0 to 3.
        slices: Whether stage 1 cuts parameters.
        num_micro_batches: Of an optimizer step, on one rank.
        num_chunks: Parts of a pipeline stage.
        recompute: What runs again in the backward pass: "full", "full_attn", "core_attn"; "" for nothing.
        kept_layers: Layers that are not recomputed.
        fused_attention: Whether scores are never written to memory.
        sequence_parallel: Whether rows are divided over tensor ranks.
        linear_bytes: Of an element of the linear layers of a base that is held packed; None: as other weights.
        dense_mask: Whether rows come with a mask of their own, [rows, tokens, tokens].
    """

    device: str = "cpu"
    stores_half: bool = False
    computes_half: bool = False
    adapter_half: bool = False
    master_gradients: bool = False
    sharding: int = 0
    slices: bool = False
    num_micro_batches: int = 1
    num_chunks: int = 1
    recompute: str = ""
    kept_layers: frozenset[int] = frozenset()
    fused_attention: bool = False
    sequence_parallel: bool = False
    linear_bytes: float | None = None
    dense_mask: bool = False

    @property
    def weight_bytes(self) -> int:
        """Of an element of the model's weights."""
        return HALF_BYTES if self.stores_half else FLOAT_BYTES

    @property
    def compute_bytes(self) -> int:
        """Of an element of what products read and give."""
        return HALF_BYTES if self.computes_half else FLOAT_BYTES

    @property
    def trained_bytes(self) -> int:
        """Of an element of an adapter."""
        return HALF_BYTES if self.adapter_half else FLOAT_BYTES


def facts_of(args: Arguments, resolved: ResolvedModel) -> MemoryFacts:
    """The facts of a run.

    Args:
        args: Its settings.
        resolved: Its model.
    """
    model, training = args.model, args.training
    stores_half = parameter_dtype(args) != "float32"
    adapter_half = model.lora_dtype in ("float16", "bfloat16") if model.lora_dtype else stores_half
    words = split_words(training.sharding_parallel_config)
    packs = bool(args.data.zero_padding and resolved.family.packing)
    mask = _packed_mask(args, resolved) if packs or args.alignment.loss_type else None
    return MemoryFacts(
        device=device_kind(str(training.device)),
        stores_half=stores_half,
        computes_half=bool(training.fp16 or training.bf16),
        adapter_half=adapter_half,
        master_gradients=bool(training.amp_master_grad),
        sharding=sharding_stage(args),
        slices=bool(SLICE_WORDS & set(words)),
        num_micro_batches=int(training.gradient_accumulation_steps),
        num_chunks=int(model.virtual_pp_degree),
        recompute=str(model.recompute_granularity) if training.recompute else "",
        kept_layers=frozenset(model.no_recompute_layers or ()),
        fused_attention=bool(model.use_flash_attention),
        sequence_parallel=bool(training.sequence_parallel),
        linear_bytes=_linear_bytes(args, resolved),
        dense_mask=mask == "block",
    )


def _packed_mask(args: Arguments, resolved: ResolvedModel) -> str | None:
    return resolved.family.packed_mask(
        resolved.config,
        fused=args.model.use_flash_attention,
        half=bool(args.training.bf16 or args.training.fp16),
        has_prefix=args.model.prefix_tuning,
        shares_prompts=args.alignment.loss_type is not None,
    )


def _linear_bytes(args: Arguments, resolved: ResolvedModel) -> float | None:
    if scheme := scheme_of(vars(args.model)):
        return scheme.bytes_per_weight
    if form := resolved.stored_format:
        # A scale and a zero point for each group, in half precision.
        scales = 2 * HALF_BYTES / form.group_size if form.group_size > 0 else 0.0
        return form.bits / 8 + scales
    return None
