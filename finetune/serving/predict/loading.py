"""From options to responders: what can be checked first, then tokenizer, weights, adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.adapter_folder import has_reward_head
from finetune.adapters.missing_updates import describe_missing
from finetune.data.templates.template import load_template
from finetune.errors import UserError
from finetune.machine.device import device_kind
from finetune.models.reward_head import is_reward_config, reward_config
from finetune.serving.decoding.exported import read_facts
from finetune.serving.decoding.options import BASES, DTYPES, ModelOptions
from finetune.serving.predict.responder import Responder, stop_ids
from finetune.tokenizers.fast_encoder import find_vocabulary

if TYPE_CHECKING:
    from finetune.data.templates.pieces import Template
    from finetune.models.resolve import ResolvedModel
    from finetune.serving.predict.scoring import Scorer


@dataclass
class PlannedModel:
    """A model that is known to be there, before Paddle is imported.

    Attributes:
        options: What was asked for.
        resolved: The model; of an exported folder only configuration and tokenizer.
        template: How conversations are written.
        template_name: As the setting `chat_template` would name it.
        tokenizer: Folder or name of the tokenizer: the adapter's own, if it has one.
        adapter_notes: Lines on layers that the adapter leaves out.
    """

    options: ModelOptions
    resolved: ResolvedModel
    template: Template
    template_name: str
    tokenizer: Path | str
    adapter_notes: list[str] = field(default_factory=list)

    @property
    def position_limit(self) -> int | None:
        """Most tokens of prompt and answer, None without a limit."""
        if self.options.is_static:
            return read_facts(Path(self.options.model_name_or_path)).max_positions
        return self.resolved.family.position_limit(self.resolved.config)

    @property
    def notes(self) -> list[str]:
        """Lines for a person: what runs, how prompts are written, and what an adapter lacks."""
        adapter = f" with {self.options.adapter}" if self.options.adapter else ""
        kind = "static graph" if self.options.is_static else "dynamic"
        name = self.resolved.remote or self.options.model_name_or_path
        line = f"{name}{adapter}: {self.resolved.family.name}, {kind}, chat template {self.template_name}"
        return [line, *self.adapter_notes]


def plan_model(options: ModelOptions, *, takes_rewards: bool = False) -> PlannedModel:
    """Checks everything about a model that needs neither Paddle nor weights.

    Args:
        options: What was asked for.
        takes_rewards: Whether a reward model, which writes no text, will do.

    Raises:
        UserError: Options that contradict each other, no such model, or a faulty template.
    """
    from finetune.models.resolve import resolve_model, trained_over_another

    if faults := options.faults():
        raise UserError(faults)
    options = options.with_local_adapter()
    if faults := options.faults():
        raise UserError(faults)
    resolved = resolve_model(options.model_name_or_path, needs_weights=not options.is_static)
    resolved = _with_head(options, resolved)
    if is_reward_config(resolved.config) and not takes_rewards:
        raise UserError(
            f"{options.adapter or options.model_name_or_path} is a reward model, which gives values and no text: score the "
            "lines of a file with predict_generation.py --data_file ... --output_file ..., or give a model that writes"
        )
    if resolved.stored_format and (scheme := options.base_quantisation):
        remedy = f"add --base {BASES[1]}"
        raise trained_over_another(resolved, options.lora_path, scheme, remedy=remedy)
    adapter = options.adapter
    has_own = adapter is not None and find_vocabulary(adapter, resolved.family.tokenizer) is not None
    tokenizer = adapter if adapter and has_own else resolved.folder or resolved.name
    name = options.template_name(Path(tokenizer))
    template = load_template(name, Path(tokenizer), enable_thinking=options.thinking())
    missing = describe_missing(adapter, resolved.family, resolved.config) if adapter else []
    return PlannedModel(options, resolved, template, name, tokenizer, [*resolved.notes, *missing])


def _with_head(options: ModelOptions, resolved: ResolvedModel) -> ResolvedModel:
    """The model as a reward model where the adapter has a head; one that is a reward model without."""
    has_head = options.lora_path is not None and has_reward_head(options.lora_path)
    if not has_head and not is_reward_config(resolved.config):
        return resolved
    return replace(resolved, config=reward_config(resolved.config, resolved.family))


def load_scorer(plan: PlannedModel) -> Scorer:
    """Loads a reward model.

    Raises:
        UserError: Weights, tokenizer or adapter cannot be used, or do not belong together.
    """
    from finetune.serving.predict.scoring import Scorer
    from finetune.tokenizers.encoder import load_encoder

    encoder = load_encoder(plan.tokenizer, plan.resolved.family, models=[plan.resolved.folder])
    return Scorer(plan, encoder, _load_model(plan, encoder))


def load_responder(plan: PlannedModel) -> Responder:
    """Loads the model.

    Raises:
        UserError: Weights, tokenizer or adapter cannot be used, or do not belong together.
    """
    from finetune.tokenizers.encoder import load_encoder

    options, family = plan.options, plan.resolved.family
    encoder = load_encoder(plan.tokenizer, family, models=[plan.resolved.folder])
    decoder: Any
    if options.is_static:
        from finetune.serving.decoding.decoder import StaticDecoder

        decoder = StaticDecoder(options.model_name_or_path, device=options.device)
    else:
        decoder = _load_dynamic(plan, encoder)
    return Responder(
        encoder,
        plan.template,
        decoder,
        options.src_length,
        position_limit=plan.position_limit,
        system=options.system_text(),
    )


def load_pair(plan: PlannedModel) -> tuple[Responder, Responder]:
    """Loads a model without and with its adapter, the weights of the base once where that is possible."""
    tuned = load_responder(plan)
    if tuned.decoder.can_switch_off:  # type: ignore[attr-defined]
        return replace(tuned, decoder=tuned.decoder.without_adapter()), tuned  # type: ignore[attr-defined]
    base = replace(plan.options, lora_path=None, prefix_path=None, chat_template=plan.template_name)
    return load_responder(plan_model(base)), tuned


def _load_dynamic(plan: PlannedModel, encoder: Any) -> Any:
    from finetune.serving.predict.dynamic import DynamicDecoder

    return DynamicDecoder(
        _load_model(plan, encoder),
        plan.resolved.family,
        stop_ids=stop_ids(encoder, plan.template),
        pad_token_id=encoder.pad_token_id,
        device=plan.options.device,
    )


def _load_model(plan: PlannedModel, encoder: Any) -> Any:
    """The model with its adapter, in evaluation mode, on the device."""
    import paddle

    from finetune.adapters.files import check_tokenizer, count_embeddings
    from finetune.families.family import import_object
    from finetune.models.loading import load_model
    from finetune.models.vocabulary import find_growth, is_other_tokenizer

    options, resolved = plan.options, plan.resolved
    family, dtype = resolved.family, _dtype(plan)
    vocab_size = family.adapt_config(resolved.config).get("vocab_size")
    num_tokens = encoder.num_tokens
    if options.adapter:
        check_tokenizer(options.adapter, len(encoder.tokenizer))
        num_tokens = count_embeddings(options.adapter, family, num_tokens=num_tokens, vocab_size=vocab_size)
    paddle.set_device(options.device)
    if device_kind(options.device) == "cpu" and family.cpu_layers:
        import_object(family.cpu_layers)()
    growth = find_growth(
        vocab_size,
        num_tokens,
        family=family,
        other_tokenizer=is_other_tokenizer(plan.tokenizer, resolved.folder or resolved.name),
    )
    overrides = {"use_cache": True}
    model = load_model(
        resolved,
        dtype=dtype,
        config_overrides=overrides,
        growth=growth,
        quantisation=options.base_quantisation,
    )
    return _adapt(model, options, family, dtype)


def _adapt(model: Any, options: ModelOptions, family: Any, dtype: str) -> Any:
    if options.lora_path:
        from finetune.adapters.lora import load_lora

        adapted = load_lora(model, options.lora_path)
    elif options.prefix_path:
        from finetune.adapters.prefix import load_prefix

        adapted = load_prefix(model, options.prefix_path, family=family)
    else:
        return model
    if dtype != "float32":
        adapted.to(dtype=dtype)
    adapted.eval()
    return adapted


def _dtype(plan: PlannedModel) -> str:
    if plan.options.dtype or device_kind(plan.options.device) == "cpu":
        return plan.options.dtype or "float32"
    config = plan.resolved.config
    own = config.get("torch_dtype") or config.get("dtype")
    return own if own in DTYPES else "float32"
