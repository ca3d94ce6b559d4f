"""Settings of the model and of the method; each field is the record of one setting (`records.setting`)."""

from dataclasses import dataclass
from typing import Any

from finetune.settings.records import LAYOUT, MODEL_CONFIG, POSITIVE, SHARE_BELOW_ONE, Range, setting
from finetune.storage.quantisation.scheme import ALGORITHMS, BLOCK_SIZES

FROZEN_PARTS = ("freeze_layers", "freeze_parameters_ratio", "freeze_parameters", "trainable_parameters")
"""Settings that choose what is trained in full fine-tuning."""
UNQUANTISED = "off"
"""Value of weight_quantize_algo that leaves the base as it is, whatever an adapter was trained on."""
QUANTISE_LATER = (
    "fine-tune first, and quantise the result: python export_model.py --quantize int8, int4 or nf4"
)

# One row per setting: default, help, help in Chinese, further facts.
# fmt: off


@dataclass(kw_only=True)
class ModelArguments:
    """Which weights, which method, and the options PaddleNLP's model configuration takes."""

    model_name_or_path: str | None = setting(None,
        "Folder with the weights, or a name: on PaddleNLP's hub, hf://org/name[@revision], modelscope://..., aistudio://.... "
        "Required.",
        "权重所在目录，或名称：PaddleNLP 模型库中的名称、hf://org/name[@版本]、modelscope://...、aistudio://...。必填。",
        is_path=True)
    tokenizer_name_or_path: str | None = setting(None,
        "Folder or name of the tokenizer; null: the model's own.", "分词器的目录或名称；null：用模型自带的。",
        is_path=True)
    text_only: bool = setting(False,
        "Of a multimodal model (images, sounds) train the text part, and keep the other parts as they are; false: such a model "
        "is refused.",
        "对多模态模型（图像、声音）只训练文本部分，其余部分保持原样；false：拒绝此类模型。")
    lora: bool = setting(False, "Train low-rank updates (LoRA) instead of all weights.",
        "训练低秩增量（LoRA），而不是全部权重。")
    lora_path: str | None = setting(None,
        "Adapter that LoRA starts from, of this project, PaddleNLP or peft: its folder, or a name such as "
        "hf://org/name[@revision]; it decides rank, alpha and layers.",
        "LoRA 训练的起点：本项目、PaddleNLP 或 peft 的适配器，写目录或名称（如 hf://org/name[@版本]）；"
        "秩、alpha 和所作用的层由它决定。", is_path=True)
    lora_rank: int = setting(8, "Rank of the LoRA update.", "LoRA 增量的秩。", range=Range(1, 65_536))
    lora_alpha: float | None = setting(None,
        "The LoRA update is scaled by lora_alpha / lora_rank; null: 2 x lora_rank.",
        "LoRA 增量按 lora_alpha / lora_rank 缩放；null：2 x lora_rank。", range=POSITIVE)
    lora_dropout: float = setting(0.0, "Dropout on the input of the LoRA update.",
        "LoRA 增量输入端的 dropout。", range=SHARE_BELOW_ONE)
    lora_target_modules: list[str] | None = setting(None,
        "Linear layers, and the embedding, that LoRA adapts: all, default, ends of names as PaddleNLP or Hugging Face have them "
        "(q_proj,v_proj), or regular expressions for whole names; null: what suits the model family.",
        "LoRA 所作用的线性层和词嵌入：all、default、PaddleNLP 或 Hugging Face 名称的末段（q_proj,v_proj），"
        "或匹配完整名称的正则表达式；null：按模型系列选取。")
    modules_to_save: list[str] | None = setting(None,
        "Modules that LoRA trains and saves whole, by the last part of their names: embed_tokens,lm_head "
        "for new tokens; null: none. Without LoRA, and with parts frozen: further trainable_parameters.",
        "LoRA 训练时整体训练并保存的模块，写名称的最后一段：新增词元时用 embed_tokens,lm_head；null：无。"
        "不用 LoRA 而冻结部分参数时，作为 trainable_parameters 的补充。")
    rslora: bool = setting(False, "Scale the LoRA update by lora_alpha / sqrt(lora_rank) (rsLoRA).",
        "按 lora_alpha / sqrt(lora_rank) 缩放 LoRA 增量（rsLoRA）。")
    use_dora: bool = setting(False,
        "Train the length of every column of the updated weights beside their direction (DoRA).",
        "除方向外，还训练更新后权重每一列的长度（DoRA）。")
    lora_use_mixer: bool = setting(False, "Train a square matrix between the two of LoRA (MosLoRA).",
        "在 LoRA 的两个矩阵之间再训练一个方阵（MosLoRA）。", common=False)
    vera: bool = setting(False,
        "Train two vectors of every layer beside random matrices that all layers share (VeRA); switches lora on.",
        "各层共用随机矩阵，只训练每层的两个向量（VeRA）；同时启用 lora。")
    vera_rank: int = setting(256, "Rank of VeRA's shared matrices, which takes far more than LoRA's.",
        "VeRA 共用矩阵的秩，应远大于 LoRA 的秩。", range=Range(1, 65_536), common=False)
    projection_prng_key: int = setting(0, "What VeRA's shared matrices are made from, as in peft.",
        "生成 VeRA 共用矩阵的种子，与 peft 相同。", range=Range(0, 2**63), common=False)
    d_initial: float = setting(0.1, "What VeRA's vectors of the rank start from.", "VeRA 中长度为秩的向量的初始值。",
        range=Range(-1000, 1000), common=False)
    save_projection: bool = setting(True,
        "Write VeRA's shared matrices beside the adapter; false: they are made from projection_prng_key again.",
        "把 VeRA 的共用矩阵存于适配器旁；false：由 projection_prng_key 重新生成。", common=False)
    lokr: bool = setting(False,
        "Train two small matrices of every layer whose Kronecker product is the update (LoKr); switches lora on.",
        "训练每层的两个小矩阵，其克罗内克积即为增量（LoKr）；同时启用 lora。")
    lokr_dim: int = setting(8, "Rank of LoKr's matrices where they are products.",
        "LoKr 的矩阵写成乘积时的秩。", range=Range(1, 65_536), common=False)
    lokr_alpha: float | None = setting(None, "The LoKr update is scaled by lokr_alpha / lokr_dim; null: lokr_dim.",
        "LoKr 增量按 lokr_alpha / lokr_dim 缩放；null：lokr_dim。", range=POSITIVE, common=False)
    lokr_factor: int = setting(-1,
        "Size of LoKr's first matrix where it divides the layer's, at most the root of it otherwise; -1: near the root.",
        "LoKr 第一个矩阵的大小（能整除层的大小时），否则为不超过其平方根的上限；-1：接近平方根。",
        range=Range(-1, 65_536), common=False)
    decompose_both: bool = setting(False, "Write LoKr's first matrix as a product of the rank, too.",
        "LoKr 的第一个矩阵也写成该秩的乘积。", common=False)
    rank_pattern: dict[str, Any] | None = setting(None,
        "Ranks of single layers: end of a layer's name, as a regular expression, to rank; null: lora_rank for all.",
        "个别层的秩：层名末尾（正则表达式）到秩的映射；null：全部用 lora_rank。", common=False)
    alpha_pattern: dict[str, Any] | None = setting(None,
        "The same for lora_alpha.", "与 rank_pattern 相同，用于 lora_alpha。", common=False)
    lora_bias: str = setting("none", "Biases that LoRA trains, too: none, all, or those of adapted layers.",
        "LoRA 同时训练的偏置：none（无）、all（全部）或 lora_only（所作用的层）。", choices=("none", "all", "lora_only"),
        common=False)
    lora_dtype: str | None = setting(None,
        "Type of the LoRA matrices; null: that of the weights. float32 beside weights in half precision.",
        "LoRA 矩阵的类型；null：与权重相同。权重为半精度时可取 float32。", choices=("float32", "bfloat16", "float16"),
        common=False)
    init_lora_weights: str = setting("default",
        "What LoRA starts from: A uniform or gaussian and B zero, or parts of the weights (pissa, olora; "
        "pissa_niter_N: from N rounds of a randomised decomposition).",
        "LoRA 的初始值：A 均匀或高斯分布、B 为零，或取自权重本身（pissa、olora；pissa_niter_N：用 N 轮随机分解）。",
        choices=("default", "gaussian", "pissa", "pissa_niter_N", "olora"), common=False)
    lora_plus_scale: float = setting(1.0, "Factor on the learning rate of LoRA's B matrices (LoRA+).",
        "LoRA 的 B 矩阵学习率的倍数（LoRA+）。", range=POSITIVE)
    pissa: bool = setting(False, "Start LoRA from the weight's leading singular vectors (PiSSA).",
        "以权重的主奇异向量初始化 LoRA（PiSSA）。")
    weight_quantize_algo: str | None = setting(None,
        "Hold the base of LoRA in 4 or 8 bits; off: as it is. null: as lora_path was trained, else as it is.",
        "以 4 位或 8 位保存 LoRA 的基座；off：保持原样。null：与 lora_path 训练时相同，否则保持原样。",
        choices=(*ALGORITHMS, UNQUANTISED))
    weight_blocksize: int = setting(64, "Weights that share a scale in nf4 and fp4: a power of two.",
        "nf4 和 fp4 中共用一个缩放系数的权重个数：2 的幂。",
        range=Range(BLOCK_SIZES[0], BLOCK_SIZES[-1], is_interval=True))
    weight_double_quant: bool = setting(False, "Hold the scales of nf4 and fp4 in 8 bits, too.",
        "nf4 和 fp4 的缩放系数也用 8 位保存。")
    weight_double_quant_block_size: int = setting(256,
        "Scales that share a scale of their own under weight_double_quant: a power of two.",
        "weight_double_quant 时共用一个二级系数的缩放系数个数：2 的幂。", common=False,
        range=Range(BLOCK_SIZES[0], BLOCK_SIZES[-1], is_interval=True))
    freeze_layers: int = setting(0, "Full fine-tuning: the first n decoder layers are not trained.",
        "全参数微调时，前 n 个解码层不训练。", range=Range(0, 65_536))
    freeze_parameters_ratio: float = setting(0.0,
        "Full fine-tuning: parameters from the bottom up (embedding, then layers) that are not trained, up to this "
        "share of all.", "全参数微调时，自底向上（先词嵌入，后各层）不训练的参数占全部参数的比例上限。",
        range=Range(0, 1, is_interval=True))
    freeze_parameters: list[str] | None = setting(None,
        "Full fine-tuning: parameters that are not trained, by whole names, neighbouring parts of names (layers.3, "
        "embed_tokens), as PaddleNLP or Hugging Face has them, or regular expressions.",
        "全参数微调时不训练的参数：完整名称、名称中相邻的若干段（layers.3、embed_tokens，PaddleNLP 或 Hugging Face "
        "的名称均可），或正则表达式。")
    trainable_parameters: list[str] | None = setting(None,
        "Full fine-tuning: parameters that are trained although the settings above freeze them; given alone, only these "
        "are trained. Named as in freeze_parameters.",
        "全参数微调时仍要训练的参数，即使上面的设置将其冻结；单独给出时只训练这些参数。写法与 freeze_parameters 相同。")
    prefix_tuning: bool = setting(False, "Train key and value prefixes instead of weights.",
        "训练 key 和 value 的前缀，而不是权重。")
    prefix_path: str | None = setting(None, "Prefix folder that prefix tuning starts from.",
        "前缀微调的起点：已有前缀的目录。", is_path=True)
    num_prefix_tokens: int = setting(128, "Length of the trained prefix, in tokens.",
        "所训练前缀的长度（词元数）。", range=Range(1, 65_536))
    neftune: bool = setting(False, "Add uniform noise to the embeddings in training (NEFTune).",
        "训练时给词嵌入加均匀噪声（NEFTune）。")
    neftune_noise_alpha: float = setting(5.0,
        "NEFTune noise is bounded by alpha / sqrt(length x hidden size).",
        "NEFTune 噪声的上界为 alpha / sqrt(长度 x 隐层维度)。", range=POSITIVE)
    router_aux_loss_coef: float | None = setting(None,
        "Weight of the loss that spreads tokens over experts; 0: none; null: as the model's configuration, which asks for "
        "it with output_router_logits true.",
        "使词元均匀分布到各专家的损失的权重；0：不使用；null：按模型配置（output_router_logits 为 true 时使用）。",
        range=Range(0, 1000))
    use_flash_attention: bool = setting(False, "Use the flash attention kernel (GPU).",
        "使用 flash attention 算子（GPU）。", readers=(MODEL_CONFIG,), gpu_only=True)
    fuse_attention_qkv: bool | None = setting(None,
        "Hold query, key and value projections as one matrix; null: as the model's configuration says.",
        "把 query、key、value 投影合为一个矩阵；null：按模型配置。", readers=(MODEL_CONFIG,))
    fuse_attention_ffn: bool | None = setting(None,
        "Hold gate and up projections as one matrix; null: as the model's configuration says.",
        "把 gate 和 up 投影合为一个矩阵；null：按模型配置。", readers=(MODEL_CONFIG,))
    use_fused_rms_norm: bool = setting(False, "Use the fused RMSNorm kernel (GPU).",
        "使用融合的 RMSNorm 算子（GPU）。", readers=(MODEL_CONFIG,), gpu_only=True)
    use_fused_rope: bool = setting(False, "Use the fused rotary embedding kernel (GPU).",
        "使用融合的旋转位置编码算子（GPU）。", readers=(MODEL_CONFIG,), gpu_only=True)
    use_fused_linear: bool = setting(False, "Use linear layers with the bias fused in (GPU).",
        "使用融合了偏置的线性层（GPU）。", readers=(MODEL_CONFIG,), gpu_only=True, common=False)
    use_fused_dropout_add: bool = setting(False, "Use the fused dropout and residual kernel (GPU).",
        "使用融合的 dropout 与残差相加算子（GPU）。", readers=(MODEL_CONFIG,), gpu_only=True, common=False)
    use_fused_linear_cross_entropy: bool = setting(False, "Fuse the output projection with the loss (GPU).",
        "把输出投影与损失融合计算（GPU）。", readers=(MODEL_CONFIG,), gpu_only=True)
    recompute_granularity: str = setting("full", "How much recompute runs again in the backward pass.",
        "反向时重新计算的范围。", choices=("full", "full_attn", "core_attn"), readers=(MODEL_CONFIG,))
    no_recompute_layers: list[int] | None = setting(None, "Indices of layers that are not recomputed.",
        "不做重计算的层的序号。", readers=(MODEL_CONFIG,), common=False)
    pp_recompute_interval: int = setting(1,
        "Without effect: recompute and no_recompute_layers choose the layers.",
        "不起作用：由 recompute 和 no_recompute_layers 决定哪些层重计算。", readers=(MODEL_CONFIG,),
        common=False, range=Range(0, 65_536), ignored="recompute and no_recompute_layers choose the layers")
    recompute_use_reentrant: bool = setting(False, "Use Paddle's PyLayer form of recompute.",
        "使用 Paddle 的 PyLayer 方式做重计算。", readers=(MODEL_CONFIG,), common=False)
    offload_recompute_inputs: bool = setting(False, "Keep the inputs of recomputed layers in host memory.",
        "把重计算层的输入放在内存中。", readers=(MODEL_CONFIG,), common=False)
    virtual_pp_degree: int = setting(1,
        "Chunks of layers per pipeline stage (needs a pipeline_parallel_degree above 1).",
        "每个流水线阶段分成的层块数（需要 pipeline_parallel_degree 大于 1）。",
        readers=(LAYOUT, MODEL_CONFIG), common=False, may_change=True, range=Range(1, 1024))
    tensor_parallel_output: bool = setting(False,
        "Without effect: split logits stay split while the loss is computed.",
        "不起作用：计算损失时 logits 始终保持切分。", readers=(MODEL_CONFIG,), common=False, quiet=True,
        ignored="the logits stay split while the loss is computed, which gives the same")
    hang_timeout: int = setting(600,
        "Seconds without progress on some process after which all say what they do; 0: never.",
        "某个进程多少秒没有进展后，各进程报告自己在做什么；0：从不。", common=False, may_change=True,
        range=Range(0, 10**7))
    rehearse_half_precision: bool = setting(False,
        "Compute in the file's bf16 or fp16 on CPU, by rounding after every operation: a rehearsal for GPUs.",
        "在 CPU 上按文件中的 bf16 或 fp16 计算（每个运算后舍入）：为 GPU 运行做预演。")
    max_skipped_steps: int = setting(20,
        "float16 steps skipped in a row, because gradients overflowed, after which the run stops.",
        "float16 训练因梯度溢出连续跳过多少步后停止运行。", may_change=True, range=Range(1, 10**9))
    on_save_error: str = setting("stop",
        "What to do when the disk takes no checkpoint: stop the run, or train on and say so.",
        "磁盘无法写入检查点时：停止运行，或继续训练并给出提示。", choices=("stop", "continue"), common=False,
        may_change=True)
    replica_check_steps: int = setting(0,
        "Compare weights that must agree across processes every n steps, beside start and saves; 0: only "
        "there.", "除开始和保存时外，每 n 步比较一次各进程应当一致的权重；0：只在开始和保存时。",
        common=False, may_change=True, range=Range(0, 10**9))
    deterministic: bool = setting(False,
        "On a GPU, use kernels that add in one order, so that a run repeats to the last digit; slower.",
        "在 GPU 上使用求和顺序固定的算子，使运行结果逐位可重复；较慢。", common=False, may_change=True)
    hidden_dropout_prob: float | None = setting(None,
        "Dropout of hidden states; null: as the model's configuration.",
        "隐层状态的 dropout；null：按模型配置。", readers=(MODEL_CONFIG,), common=False,
        range=SHARE_BELOW_ONE)
    attention_probs_dropout_prob: float | None = setting(None,
        "Dropout of attention weights; null: as the model's configuration.",
        "注意力权重的 dropout；null：按模型配置。", readers=(MODEL_CONFIG,), common=False,
        range=SHARE_BELOW_ONE)
    from_aistudio: bool = setting(False,
        "Look names of models, tokenizers and adapters up on AI Studio, as aistudio://user/name does.",
        "在 AI Studio 上查找模型、分词器和适配器的名称，与写 aistudio://user/name 相同。")
    save_to_aistudio: bool = setting(False, "Upload the final weights to AI Studio.",
        "把最终权重上传到 AI Studio。")
    aistudio_repo_id: str | None = setting(None, "AI Studio repository to upload to.",
        "要上传到的 AI Studio 仓库。")
    aistudio_repo_private: bool = setting(True, "Create the AI Studio repository as private.",
        "把 AI Studio 仓库建为私有。")
    aistudio_repo_license: str = setting("Apache License 2.0", "Licence named in the AI Studio repository.",
        "AI Studio 仓库注明的许可证。")
    aistudio_token: str | None = setting(None, "AI Studio access token; never written to arguments.json.",
        "AI Studio 访问令牌；不会写入 arguments.json。", is_secret=True)


def _refused(default: Any, help_text: str, help_zh: str, /, instead: str = QUANTISE_LATER) -> Any:
    """A setting whose default is the only value that works."""
    return setting(
        default, f"{help_text} (not available yet).", f"{help_zh}（尚不支持）。",
        working=(default,), instead=instead, common=False)


@dataclass(kw_only=True)
class QuantArguments:
    """Quantisation switches of PaddleNLP's later scripts: known, but only their off values are accepted so far."""

    do_ptq: bool = _refused(False, "Quantise after training", "训练后量化")
    do_qat: bool = _refused(False, "Train with quantisation in the loop", "量化感知训练")
    do_gptq: bool = _refused(False, "Quantise with GPTQ", "用 GPTQ 量化",
        instead="fine-tune first, and quantise the result: python export_model.py --quantize int4 --calibration_data")
    do_awq: bool = _refused(False, "Quantise with AWQ", "用 AWQ 量化")
    quant_type: str = _refused("a8w8", "Number format of quantised weights", "量化权重的数值格式")
    shift: bool = _refused(False, "Shift activations before quantising", "量化前平移激活值")
    smooth: bool = _refused(False, "Smooth activations before quantising", "量化前平滑激活值")
    auto_clip: bool = _refused(False, "Clip weights before quantising", "量化前裁剪权重")
    load_quant_model: bool = _refused(False, "Start from quantised weights", "从量化后的权重开始",
        instead="give a quantised folder as model_name_or_path (docs/quantised_bases.md)")
