"""The model of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.run.tokenizer import plan_vocabulary

if TYPE_CHECKING:
    from finetune.models.resolve import ResolvedModel
    from finetune.parallel.pipe.stage import Stage
    from finetune.processes.groups import ProcessGroups
    from finetune.run.tokenizer import TokenizerPair
    from finetune.settings.arguments import Arguments


class BaseModel(NamedTuple):
    """What this process holds of the model.

    Attributes:
        model: PaddleNLP's model, whole or of this process's stage.
        stage: Of the pipeline; None without one.
    """

    model: Any
    stage: Stage | None


def load_base_model(
    args: Arguments, resolved: ResolvedModel, pair: TokenizerPair, groups: ProcessGroups
) -> BaseModel:
    """Loads this process's part of the model's weights in the dtype of the run.

    Raises:
        UserError: The tokenizer has more pieces than the model has embeddings, or weights are
            missing, unknown or of another shape.
    """
    from finetune.families.family import import_object
    from finetune.machine.processor import keep_freed_memory
    from finetune.machine.randomness.seeding import seed_everything
    from finetune.models.loading import load_model
    from finetune.models.reward_head import is_reward_model
    from finetune.run.processes import prepare_device
    from finetune.settings.quantisation import scheme_of

    prepare_device(args, groups.layout.world)
    if args.training.device == "cpu":
        keep_freed_memory()
        if resolved.family.cpu_layers:
            import_object(resolved.family.cpu_layers)()
    seed_everything(args.training.seed)
    # The cache of keys and values costs memory in training; `generate` asks for it by itself.
    overrides = args.model_config_kwargs(groups.layout, groups.rank) | {"use_cache": False}
    stage: Stage | None = None

    def build_own_stage(model_class: Any, config: Any) -> Any:
        nonlocal stage
        from finetune.parallel.pipe.stage import build_stage
        from finetune.parallel.pipe.stage_plan import StagePlan

        plan = StagePlan(groups.pipeline.position, groups.pipeline.size, args.model.virtual_pp_degree)
        stage = build_stage(model_class, config, family=resolved.family, plan=plan)
        return stage.model

    model = load_model(
        resolved,
        dtype=parameter_dtype(args),
        config_overrides=overrides,
        encoder=pair.encoder,
        growth=plan_vocabulary(args, resolved, pair),
        build=build_own_stage if groups.pipeline.size > 1 else None,
        quantisation=scheme_of(vars(args.model)),
        head_seed=args.training.seed,
    )
    model.generation_config.use_cache = True
    if is_reward_model(model):
        _note_padding(model, pair)
    return BaseModel(model, stage)


def _note_padding(model: Any, pair: TokenizerPair) -> None:
    """Puts on record what rows are padded with: transformers reads a value at the last token that is no padding.

    Where padding is the token that ends answers, that would be the token before the end. Without a padding token
    transformers refuses rows of several lengths instead.
    """
    encoder = pair.encoder
    is_end = encoder.pad_token_id in (encoder.eos_token_id, *encoder.chat_end_ids)
    model.config.pad_token_id = None if is_end else encoder.pad_token_id


def parameter_dtype(args: Arguments) -> str:
    """Dtype of the weights: half precision is stored only at level O2, otherwise computed on the fly."""
    if args.training.fp16_opt_level != "O2":
        return "float32"
    return "float16" if args.training.fp16 else "bfloat16" if args.training.bf16 else "float32"
