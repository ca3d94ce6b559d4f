"""What is shown of every family, by which test, and the families that a claim leaves out.

A test tells for which families it runs by its parameters, which are read here as pytest reads them; so a claim cannot name
a test that looks at fewer families than it says, and a new family is missed where no test takes it up.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from finetune.families.family import families, find_family
from tests import tiny_models
from tests.reference import chatglm2_qwen_curves, curves, gradients, logits, readers

MARKED = "slow_distributed"
"""The mark of tests that are run by name, whose results stand in tables of the documentation."""

FamilyOf = Callable[[Any], "str | None"]


def _named(value: Any) -> str | None:
    """The family of a parameter: its name, a record, or a case of one."""
    name = getattr(value, "family", None) or getattr(value, "name", None) or value
    return name if isinstance(name, str) and name in families() else None


def _family_of_logits(name: str) -> str | None:
    """By what the golden checkpoint says, as a run would find it."""
    config = json.loads(logits.GOLDEN_CHECKPOINTS.read_text())["checkpoints"][name]["config"]
    return find_family(logits.CASES[name].form.config_of(config)).name


def _family_of_variant(name: str) -> str | None:
    return readers.VARIANTS[name].family if name in readers.VARIANTS else None


def _of_cases(cases: Mapping[str, Any], *, lora: bool) -> FamilyOf:
    return lambda name: cases[name].family if cases[name].lora is lora else None


@dataclass(frozen=True)
class Proof:
    """A test that runs for families.

    Attributes:
        test: Path of the file and name of the function, as pytest writes them.
        family_of: A parameter -> the family that it stands for; None where it stands for none.
    """

    test: str
    family_of: FamilyOf = _named

    @property
    def is_marked(self) -> bool:
        """Whether it is left out unless it is asked for."""
        return MARKED in self._mark_names()

    @property
    def needs_torch(self) -> bool:
        """Whether it compares with what PyTorch computes meanwhile."""
        return "parity" in self._mark_names()

    def families(self) -> set[str]:
        """The families that the test runs for."""
        module, function = self._load()
        found = {self.family_of(value) for value in _values(module, function)}
        return {name for name in found if name}

    @property
    def skips(self) -> bool:
        """Whether it may leave a family out while it runs, which no parameter tells."""
        _, function = self._load()
        return "pytest.skip(" in inspect.getsource(inspect.unwrap(function))

    def _mark_names(self) -> set[str]:
        return {mark.name for owner in self._load() for mark in _marks(owner)}

    def _load(self) -> tuple[Any, Any]:
        path, _, name = self.test.partition("::")
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        return module, getattr(module, name)


def _marks(owner: Any) -> list[Any]:
    marks = getattr(owner, "pytestmark", [])
    return marks if isinstance(marks, list) else [marks]


def _values(module: Any, function: Any) -> Iterator[Any]:
    """All values of the parameters of a test and of the fixtures that it asks for, skipped ones left out."""
    given: dict[str, bool] = {}  # parameter -> whether it goes to the fixture of its name
    for mark in _marks(function):
        if mark.name == "parametrize":
            names, rows = mark.args
            names = names.replace(",", " ").split() if isinstance(names, str) else names
            given |= dict.fromkeys(names, bool(mark.kwargs.get("indirect")))
            yield from _values_of_rows(rows)
    for name in inspect.signature(inspect.unwrap(function)).parameters:
        fixture = getattr(module, name, None) or getattr(tiny_models, name, None)
        marker = getattr(fixture, "_fixture_function_marker", None)
        if marker is not None and given.get(name, True):
            yield from () if name in given else marker.params or ()
            yield from _values(module, fixture)


def _values_of_rows(rows: Iterable[Any]) -> Iterator[Any]:
    for row in rows:
        is_marked = isinstance(row, type(pytest.param()))
        values = row.values if is_marked else row
        if not (is_marked and any(mark.name in ("skip", "xfail") for mark in row.marks)):
            yield from values if isinstance(values, tuple) else (values,)


@dataclass(frozen=True)
class Claim:
    """Something that holds for every family.

    Attributes:
        english: The claim, as the page of families says it.
        chinese: The same.
        proofs: Together they run for every family but the exceptions.
        exceptions: Families for which it does not hold, and why, in both languages.
    """

    english: str
    chinese: str
    proofs: tuple[Proof, ...]
    exceptions: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def families(self) -> set[str]:
        """The families that its tests run for."""
        return set().union(*(proof.families() for proof in self.proofs))


def _proofs(*tests: str, family_of: FamilyOf = _named) -> tuple[Proof, ...]:
    return tuple(Proof(test, family_of) for test in tests)


_CURVES = "tests/reference/test_curves.py::test_curve_equals_the_golden_one"
_WRITTEN = "tests/reference/test_chatglm2_qwen.py"
_READ = "tests/reference/test_hugging_face_folders.py"
_BEHAVIOUR = "tests/families/test_behaviour.py"
_RUNS = "tests/end_to_end/test_family_runs.py"


def _curve_claim(english: str, chinese: str, *, lora: bool) -> Claim:
    proofs = (
        Proof(_CURVES, _of_cases(curves.CASES, lora=lora)),
        Proof(
            f"{_WRITTEN}::test_curve_equals_the_golden_one", _of_cases(chatglm2_qwen_curves.CASES, lora=lora)
        ),
    )
    return Claim(english, chinese, proofs)


def _gradient_claim(english: str, chinese: str, *, lora: bool) -> Claim:
    test = "tests/reference/test_gradients.py::test_gradients_equal_the_golden_ones"
    return Claim(english, chinese, (Proof(test, _of_cases(gradients.CASES, lora=lora)),))


CLAIMS = (
    Claim(
        "logits are the reference's, to 1e-5",
        "logits 与参照相同，误差在 1e-5 以内",
        (
            Proof("tests/reference/test_logits.py::test_logits_equal_the_golden_ones", _family_of_logits),
            Proof(f"{_WRITTEN}::test_logits_equal_the_reference"),
        ),
    ),
    _gradient_claim(
        "the gradient of every tensor is the reference's, to 1e-5: all weights",
        "每个张量的梯度与参照相同，误差在 1e-5 以内：全部权重",
        lora=False,
    ),
    _gradient_claim("the same: LoRA", "同上：LoRA", lora=True),
    _curve_claim(
        "20 steps of training have the reference's losses, to 1e-4: all weights",
        "20 步训练的损失与参照相同，误差在 1e-4 以内：全部权重",
        lora=False,
    ),
    _curve_claim("the same: LoRA", "同上：LoRA", lora=True),
    Claim(
        "a tokenizer's ids, and which tokens of a sample are learned",
        "分词器的 id，以及样本中学习哪些 token",
        _proofs(
            "tests/tokenizers/test_tokenizer.py::test_ids_are_those_of_paddlenlp",
            "tests/tokenizers/test_framing.py::test_each_token_of_a_sample",
        ),
    ),
    Claim(
        "packed samples have the logits, losses and gradients of rows of their own: all weights, LoRA, prefix",
        "打包的样本与单独成行的样本有相同的 logits、损失和梯度：全部权重、LoRA、前缀",
        _proofs(
            f"{_BEHAVIOUR}::test_packed_rows_equal_separate_rows",
            f"{_BEHAVIOUR}::test_packed_rows_have_the_loss_and_gradients_of_separate_rows",
            f"{_BEHAVIOUR}::test_changing_one_packed_sample_changes_no_other",
        ),
    ),
    Claim(
        "layouts train the curve of one process",
        "各种布局的训练曲线与单进程相同",
        _proofs("tests/distributed/test_matrix.py::test_the_curve_is_that_of_one_process"),
    ),
    Claim(
        "half precision is near float32, alone and in layouts",
        "半精度接近 float32，单进程和各种布局都是",
        _proofs("tests/distributed/test_precision_matrix.py::test_half_precision"),
    ),
    Claim(
        "a run that was cut continues to the same digits: float32 with the shipped file",
        "中断的运行继续后得到同样的数字：float32，用随附的文件",
        _proofs("tests/end_to_end/test_families.py::test_file_trains_saves_resumes_and_evaluates"),
    ),
    Claim(
        "the same in bfloat16: all weights, LoRA, prefix",
        "bfloat16 也一样：全部权重、LoRA、前缀",
        _proofs(f"{_RUNS}::test_dpo_of_all_weights", f"{_RUNS}::test_supervised_methods"),
    ),
    Claim(
        "LoRA over 4 or 8 bits trains as over the values that these stand for",
        "4 位或 8 位之上的 LoRA，与在其所代表的数值之上训练相同",
        _proofs("tests/models/test_quantised_layers.py::test_the_curve_is_that_over_the_dequantised_base"),
    ),
    Claim(
        "DPO: loss and gradients are those of its definition, a shared prompt changes nothing, and it runs and continues",
        "DPO：损失和梯度符合定义，共用提示不改变结果，能运行、能继续",
        _proofs(
            "tests/families/test_preference_loss.py::test_a_step_is_that_of_the_definition",
            "tests/families/test_shared_prompts.py::test_logits_are_those_of_separate_rows",
            "tests/families/test_shared_prompts.py::test_gradients_are_those_of_separate_rows",
            f"{_RUNS}::test_dpo_of_all_weights",
        ),
    ),
    Claim(
        "a reward model gives a text one value in rows of every kind, is saved, loaded, trained and continued",
        "奖励模型在各种行中给一段文本同一个值，能保存、加载、训练、继续",
        _proofs(
            "tests/models/test_reward_head.py::test_rows_of_every_kind_give_what_single_texts_give",
            "tests/models/test_reward_head.py::test_a_saved_reward_model_is_loaded_again",
            f"{_RUNS}::test_other_methods_on_pairs",
        ),
    ),
    Claim(
        "a merged adapter computes what the adapter computes",
        "合并后的模型与适配器的计算结果相同",
        _proofs(
            "tests/merge/test_lora.py::test_merged_logits_are_those_of_the_adapter",
            "tests/distributed/test_merge_layouts.py::test_a_merged_adapter_computes_what_the_adapter_computes",
        ),
    ),
    Claim(
        "files of ranks become the one model that they were cut from",
        "各 rank 的文件合成切分之前的那个模型",
        _proofs("tests/merge/test_tensor_parallel.py::test_split_then_merge_is_identity"),
    ),
    Claim(
        "a folder in Hugging Face's form has the same logits, and comes back unchanged",
        "Hugging Face 形式的目录有相同的 logits，转换回来没有变化",
        _proofs("tests/merge/test_hf.py::test_there_and_back_is_identity"),
    ),
    Claim(
        "others write the tokens of `predict` from a trained model in Hugging Face's form: transformers, or the reference",
        "训练后的 Hugging Face 形式的目录，由 transformers 或参照实现生成的 token 与 `predict` 相同",
        (
            Proof(f"{_READ}::test_transformers_writes_the_same_tokens", _family_of_variant),
            Proof(f"{_READ}::test_numpy_writes_the_same_tokens", _family_of_variant),
        ),
    ),
    Claim(
        "answers with the cache are those without, alone and among others: all weights, LoRA, prefix",
        "使用缓存的回答与不用缓存的相同，单独或与其他请求一起：全部权重、LoRA、前缀",
        _proofs(
            f"{_BEHAVIOUR}::test_cached_steps_give_the_logits_of_one_pass",
            f"{_BEHAVIOUR}::test_a_padded_batch_gives_each_row_its_own_answer",
            "tests/serving/batching/test_same_as_alone.py::test_every_family_decodes_rows_that_come_and_go",
        ),
    ),
    Claim(
        "the static graph writes the text of the model",
        "静态图写出与模型相同的文本",
        _proofs("tests/serving/export/test_static_text.py::test_greedy_text_is_that_of_the_dynamic_model"),
    ),
)
