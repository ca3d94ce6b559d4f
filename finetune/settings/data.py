"""Settings of the data and of generation; each field is the record of one setting (`records.setting`)."""

from dataclasses import dataclass
from typing import Any

from finetune.settings.records import COUNT, POSITIVE, TOKENS, Range, setting

# The keys of `finetune.data.reading.formats.FORMATS`.
DATASET_FORMATS = ("src_tgt", "alpaca", "query_response", "messages", "sharegpt", "text", "preference")

# One row per setting: default, help, help in Chinese, further facts.
# fmt: off


@dataclass(kw_only=True)
class DataArguments:
    """Where the samples come from and how they become rows of tokens."""

    dataset_name_or_path: str | None = setting(None,
        "Folder with train.json and dev.json (or any data files), a file (.json, .jsonl, .csv, .tsv, .txt, "
        ".parquet, .arrow), a name of a dataset_info.json, several of these with commas between, or a built-in "
        "dataset name. Required unless dataset_mix is given.",
        "含 train.json 和 dev.json（或任意数据文件）的目录、一个文件（.json、.jsonl、.csv、.tsv、.txt、.parquet、"
        ".arrow）、dataset_info.json 中的名称、用逗号隔开的多个，或内置数据集的名称。未给 dataset_mix 时必填。",
        is_path=True, aliases=("task_name_or_path",))
    eval_dataset: str | None = setting(None,
        "File or folder to evaluate on, or several with commas between, beside any training data; null: the dev "
        "split of the training data.",
        "用于评估的文件或目录，可用逗号隔开多个，可与任何训练数据同用；null：训练数据的 dev 部分。", is_path=True)
    dataset_dir: str | None = setting(None,
        "Folder with LLaMA-Factory's dataset_info.json, whose names dataset_name_or_path may give.",
        "含 LLaMA-Factory 的 dataset_info.json 的目录，其中的名称可用于 dataset_name_or_path。", is_path=True)
    task_name: str | None = setting(None, "Part of a built-in dataset to use.", "内置数据集中要用的部分。")
    dataset_format: str | None = setting(None, "Shape of the examples; null: recognised from the first ones.",
        "样本的格式；null：由前几条样本识别。", choices=DATASET_FORMATS)
    dataset_mix: list[dict[str, Any]] | None = setting(None,
        'Several training sets: a list of {"path": ..., "ratio": weight, "max_samples": n}; as JSON on the '
        "command line.",
        '多个训练集：由 {"path": ..., "ratio": 权重, "max_samples": n} 组成的列表；命令行上写成 JSON。')
    columns: dict[str, Any] | None = setting(None,
        'Names of the fields of the files: {"prompt": "question_text", "response": "reply"}; as JSON on the '
        "command line.", '文件中各字段的名称：{"prompt": "问题", "response": "回答"}；命令行上写成 JSON。')
    encoding: str = setting("utf-8", "Encoding of the data files, such as gbk or utf-16.",
        "数据文件的编码，例如 gbk 或 utf-16。")
    text_document: str = setting("line",
        "What one document of a .txt file is: a line, a paragraph (up to a blank line), or the file.",
        ".txt 文件中一篇文档是什么：一行、一段（到空行为止）或整个文件。", choices=("line", "paragraph", "file"))
    split_texts: bool = setting(True,
        "Running text longer than max_length becomes several samples, and nothing is lost; false: truncation "
        "decides.", "超过 max_length 的纯文本分成多条样本，不丢内容；false：由 truncation 决定。")
    preference: str | None = setting(None,
        "What to learn from preference pairs; null: such files are refused.",
        "从偏好数据中学什么；null：拒绝这类文件。", choices=("chosen",))
    validation_split: float | None = setting(None,
        "Held back from the training data when there is no dev file: a ratio below 1, or a count.",
        "没有 dev 文件时从训练数据中留出的部分：小于 1 为比例，否则为条数。", range=POSITIVE)
    max_train_samples: int | None = setting(None, "Most training examples, drawn by the seed.",
        "最多使用的训练样本数，按随机种子抽取。", range=COUNT)
    max_eval_samples: int | None = setting(None, "Most evaluation examples, drawn by the seed.",
        "最多使用的评估样本数，按随机种子抽取。", range=COUNT)
    on_bad_line: str = setting("error", "What a faulty line does: stop the run, or be left out and counted.",
        "遇到有错的行：停止运行，或跳过并计数。", choices=("error", "skip"))
    self_cognition_samples: int = setting(0,
        "Examples added that teach the model its name (model_name) and maker (model_author).",
        "加入多少条样本，让模型知道自己的名字（model_name）和开发者（model_author）。", range=Range(0, 10**6))
    self_cognition_file: str | None = setting(None,
        "Questions and answers with {{name}} and {{author}} in them; null: our own.",
        "含有 {{name}} 和 {{author}} 的问答文件；null：用自带的。")
    model_name: str | None = setting(None,
        'Name the model shall know; a Chinese and an English one as "中文名 English".',
        "要让模型知道的名字；中英文各一个时写作“中文名 English”。", is_pair_of_names=True)
    model_author: str | None = setting(None, "Who made the model, in the same form.",
        "模型的开发者，写法相同。", is_pair_of_names=True)
    src_length: int = setting(1024, "Most tokens kept of the source; cut from the left.",
        "源文本最多保留的词元数；从左侧截断。", range=TOKENS)
    max_length: int = setting(2048, "Most tokens of source and target together.",
        "源文本与目标文本合计最多的词元数。", range=Range(2, 2**24))
    truncation: str = setting("left",
        "Samples that are too long: left cuts the source on the left and then the target on the right, "
        "right cuts at max_length, drop leaves them out, error stops the run.",
        "过长的样本：left 先从左截源文本，再从右截目标文本；right 在 max_length 处截断；drop 丢弃；error "
        "停止运行。", choices=("left", "right", "drop", "error"))
    train_on: str = setting("all",
        "Which answers of a conversation are learned: all in one sample, the last one, or each in a sample of its own, "
        "for templates that rewrite earlier messages.",
        "学习对话中的哪些回答：all 在同一条样本中学习全部，last 只学最后一个，each 每个回答各成一条样本（用于会改写前面消息的模板）。",
        choices=("all", "last", "each"))
    zero_padding: bool = setting(False, "Pack samples into full rows (InTokens); also accepted as intokens.",
        "把多条样本拼满一行（InTokens）；也可写作 intokens。", aliases=("intokens",))
    pad_to_multiple_of: int | None = setting(None, "Pad rows to a multiple of this many tokens.",
        "把每行补齐到此词元数的整数倍。", range=Range(1, 65_536))
    eval_with_do_generation: bool = setting(False,
        "Evaluate by generating text (BLEU-4, ROUGE) instead of by loss.",
        "用生成的文本（BLEU-4、ROUGE）评估，而不是用损失。")
    save_generation_output: bool = setting(False,
        "Write the text generated in evaluation to generated_output.json.",
        "把评估时生成的文本写入 generated_output.json。", may_change=True)
    preview: int = setting(0,
        "Show this many training samples, and figures of all of them, instead of training; 0: train.",
        "不训练，而是显示这么多条训练样本及全部样本的统计；0：训练。", may_change=True, range=Range(0, 10**6))
    longest_first: int = setting(0,
        "Try this many steps on the longest rows instead of training: memory that is short shows at once. Nothing is "
        "saved, and the most memory is told; 0: train.",
        "不训练，而是用最长的行试跑这么多步：显存不足会立刻显现。不保存任何结果，最后报告最大内存；0：训练。",
        may_change=True, range=Range(0, 10**6))
    data_cache: bool = setting(True, "Keep tokenized data on disk for the next run with the same files.",
        "把分词后的数据留在磁盘上，供下次使用同样文件的运行读取。", may_change=True)
    data_cache_dir: str | None = setting(None,
        "Where they are kept; null: ~/.cache/paddle_finetune/data (XDG_CACHE_HOME is honoured).",
        "存放位置；null：~/.cache/paddle_finetune/data（遵从 XDG_CACHE_HOME）。", may_change=True)
    lazy: bool = setting(False,
        "Read the training data as a stream instead of loading it: for files larger than memory. Needs "
        "max_steps.", "把训练数据作为流读取而不整体载入：用于大于内存的文件。需要 max_steps。")
    shuffle_buffer_size: int = setting(10_000,
        "Samples of a stream that the next one is drawn from; 1: the order of the files.",
        "从流中的多少条样本里抽取下一条；1：按文件顺序。", range=COUNT)
    chat_template: str | None = setting(None,
        "Name of a conversation format (llama2, qwen3, ...; see docs/chat_templates.md), a template file or the folder "
        "of one, tokenizer for the tokenizer's own, or none for the texts as they are; null: the tokenizer's own "
        "for conversations, none for src and tgt.",
        "对话格式的名称（llama2、qwen3 等，见 docs/chat_templates_zh.md）、模板文件或其所在目录，tokenizer 表示用分词器自带的，"
        "none 表示文本原样；null：对话用分词器自带的，src 与 tgt 不用模板。", is_path=True)
    enable_thinking: bool | None = setting(None,
        "What the chat template is told of thoughts before answers (Qwen3, DeepSeek-R1): false begins answers behind an "
        "empty place for them, which is not learned; true and null leave it to the answer.",
        "告诉对话模板回答前是否有思考内容（Qwen3、DeepSeek-R1）：false 在回答前放一个空的思考块，且不学习它；true 与 null 由回答决定。")
    split_special_tokens: bool = setting(True,
        "Names of special tokens in the data (</s>, <|im_end|>) are plain text; false: they become these "
        "tokens, as in PaddleNLP.",
        "数据中出现的特殊词元名（</s>、<|im_end|>）按普通文本处理；false：与 PaddleNLP 一样变为这些词元。")
    system: str | None = setting(None,
        "System text of examples that have none; null: the template's, if any.",
        "没有系统文本的样本所用的系统文本；null：模板自带的（若有）。")

    @property
    def intokens(self) -> bool:
        """The earlier name of ``zero_padding``."""
        return self.zero_padding


@dataclass(kw_only=True)
class GenerationArguments:
    """How text is generated, in evaluation and prediction."""

    max_new_tokens: int | None = setting(None, "Most tokens to generate; null: what src_length leaves of max_length, at most 256.",
        "最多生成的词元数；null：max_length 减去 src_length，但不超过 256。", range=TOKENS)
    top_k: int = setting(1, "Sample among the k likeliest tokens; 1: greedy, 0: no limit.",
        "在概率最高的 k 个词元中采样；1：贪心，0：不限。", range=Range(0, 10**7))
    top_p: float = setting(1.0, "Sample among the likeliest tokens that hold this share of probability.",
        "在累计概率达到此值的最可能词元中采样。", range=Range(0, 1, low_allowed=False, is_interval=True))
    temperature: float = setting(1.0, "Divide the logits by this before sampling.",
        "采样前 logits 除以此值。", range=POSITIVE)


MAX_DEFAULT_NEW_TOKENS = 256
"""A model that has not learned to end writes to the limit for every prompt, and a thousand tokens take minutes."""


def default_new_tokens(data: DataArguments) -> int:
    """How many tokens are generated where `max_new_tokens` is null."""
    return min(data.max_length - data.src_length, MAX_DEFAULT_NEW_TOKENS)
