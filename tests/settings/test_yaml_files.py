"""Argument files in YAML: the same settings as in JSON, and every fault with its line."""

import json
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.settings.argument_file import read_argument_file
from finetune.settings.arguments import parse_arguments
from tests.conftest import ROOT
from tests.settings.argument_files import VALID

pytestmark = pytest.mark.usefixtures("in_a_folder_with_data")

HEAD = "".join(f"{key}: {json.dumps(value)}\n" for key, value in VALID.items())  # four lines


def parse_text(text: str, name: str = "args.yaml", *words: str):
    Path(name).write_bytes(text.encode("utf-8", "surrogatepass"))
    return parse_arguments([name, *words])


def faults_of(text: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        parse_text(text)
    return caught.value.faults


def fault_of(text: str) -> str:
    (fault,) = faults_of(text)
    return fault


def test_comments_lists_and_the_command_line():
    arguments = parse_text(
        "# LoRA\n"
        + HEAD
        + "lora: true  # adapters alone\nlora_target_modules:\n- .*q_proj.*\n- '.*v_proj.*'\n"
        "no_recompute_layers: [0, 1]\ncolumns: {prompt: question, response: no}\nmax_length: 4096\n",
        "args.yml",
        "--max_length",
        "3000",
    )
    assert arguments.model.lora is True and arguments.data.max_length == 3000
    assert arguments.model.lora_target_modules == [".*q_proj.*", ".*v_proj.*"]
    assert arguments.model.no_recompute_layers == [0, 1]
    assert arguments.data.columns == {"prompt": "question", "response": "no"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/*_argument.json")), ids=lambda path: path.parent.name)
def test_shipped_files_say_the_same_in_yaml(path):
    import yaml

    values = json.loads(path.read_text(encoding="utf-8"))
    for flow in (True, False):
        Path("same.yaml").write_text(yaml.safe_dump(values, default_flow_style=flow, allow_unicode=True))
        faults: list[str] = []
        entries = read_argument_file(Path("same.yaml"), faults)
        assert faults == [] and entries is not None
        assert json.dumps(entries.values, sort_keys=True) == json.dumps(values, sort_keys=True)
    Path("json.yaml").write_bytes(path.read_bytes())  # JSON is YAML, too
    assert read_argument_file(Path("json.yaml"), faults).values == values


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("learning_rate: 1e-5", 1e-5),  # a text in YAML 1.1
        ("learning_rate: 1E-5", 1e-5),
        ("learning_rate: .5", 0.5),
        ("learning_rate: 3.e-5", 3e-5),
        ("learning_rate: '2e-5'", 2e-5),
        ("max_steps: 1e3", 1000),
        ("max_steps: 0x10", 16),
        ("max_steps: 0o10", 8),
        ("max_steps: +7", 7),
        ("evaluation_strategy: no", "no"),  # false in YAML 1.1
        ("do_eval: no", False),
        ("do_eval: On", True),
        ("do_eval: FALSE", False),
        ("do_eval: 1", True),
        ("run_name: no", "no"),
        ("run_name: on", "on"),
        ("run_name: 2024-01-01", "2024-01-01"),  # a date in YAML 1.1
        ("run_name: 1:30", "1:30"),  # 90 in YAML 1.1
        ("run_name: '123'", "123"),
        ("run_name: 小桨", "小桨"),
        ('run_name: "a\\tb"', "a\tb"),
        ("run_name: C:\\data#1", "C:\\data#1"),
        ("run_name: |-\n  two\n  lines", "two\nlines"),
        ("run_name: ~", None),
        ("run_name:", None),
        ("run_name: ''", ""),
        ("report_to: none", []),
    ],
)
def test_words(line, expected):
    value = getattr(parse_text(HEAD + line + "\n").training, line.partition(":")[0])
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("lora: true\nlora: false\n", 2, '"lora" stands in line 1 already: keep one'),
        ("dataset_mix:\n- path: a\n  path: b\n", 3, '"path" stands in line 2 already'),
        ("columns:\n\tprompt: a\n", 2, "indent with blanks, not with tabs"),
        ('{\n\t"lora": true}\n', 2, "not with tabs"),
        ("lora: @true\n", 1, "a text that begins with @ stands in quotes"),
        ("lora: %x\n", 1, "begins with % stands in quotes"),
        ("run_name: a: b\n", 1, "a text with a colon and a blank in it stands in quotes"),
        ("lora: true\n  lora_rank: 8\n", 2, "keys begin in one column"),
        ("lora: true\nlearning_rate:1e-4\n", 3, "a blank after the colon"),
        ("  lora: true\nlora_rank: 8\n", 2, "keys of one level begin in one column"),
        ('run_name: "open\n', 2, "a quote or a bracket is not closed"),
        ('run_name: "C:\\data"\n', 1, "a backslash is doubled"),
        ("lora_target_modules: [a, b\n", 2, "a quote or a bracket is not closed"),
        ("lora_target_modules: *q\n", 1, "a text that begins with * stands in quotes"),
        ("columns: &a {prompt: *a}\n", 1, "*a repeats an anchor that does not stand above"),
        ("columns:\n  <<: {prompt: a}\n", 2, "write the entries out"),
        ("run_name: !!python/object/apply:os.system ['x']\n", 1, "the tag !!python/object/apply:os.system"),
        ("run_name: !!str 5\n", 1, "the tag !!str is not read"),
        ("run_name: ! 5\n", 1, "the tag ! is not read"),
        ("? [a, b]\n: 1\n", 1, "a key is a list"),
        ("lora: true\n---\nlora: false\n", 2, "a second document begins here"),
        ("lora: true\nmax_steps: 010\n", 2, "without the leading zero"),
        (f"max_steps: {'9' * 5000}\n", 1, "a number has 5,000 characters"),
        ("lora: true\nrun_name: a\x07b\n", 2, "the control character \\u0007"),
        ("lora: true\nrun_name: a\0b\n", 2, "the control character \\u0000"),
        ("columns: " + "[" * 100 + "]" * 100 + "\n", 1, "nested too deep"),
        ("columns: " + "{a: " * 100_000, 1, "nested too deep"),
    ],
)
def test_what_is_no_argument_file(text, line, said):
    fault = fault_of(text)
    assert fault.startswith(f"argument file args.yaml, line {line}") and said in fault
    assert "\n" not in fault


def test_a_bomb_of_anchors_is_refused_at_once():
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    fault = fault_of("\n".join(levels) + "\n")
    assert fault.startswith("argument file args.yaml, line 4: ") and "more than 10,000 values" in fault


def test_a_few_anchors_are_read():
    arguments = parse_text(HEAD + "run_name: &name trial\nlogging_dir: *name\n")
    assert arguments.training.run_name == arguments.training.logging_dir == "trial"


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "null\n", "- lora\n", "lora\n", "learning_rate:1e-4\n"]
)
def test_a_file_without_settings(text):
    assert fault_of(text) == (
        "argument file args.yaml holds no settings: each line must look like `key: value`, with a blank after the colon"
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rate: abc", 'learning_rate is "abc" in args.yaml, line 5: a finite number is needed'),
        ("learning_rate: .inf", "learning_rate is Infinity in args.yaml, line 5: a finite number"),
        ("learning_rate: .nan", "learning_rate is NaN in args.yaml, line 5: a finite number"),
        ("learning_rate: 1e999", "in args.yaml, line 5: a finite number"),
        ("max_steps: 1.5", "max_steps is 1.5 in args.yaml, line 5: a whole number"),
        ("do_eval: maybe", "in args.yaml, line 5: true or false"),
        ("run_name: 123", "run_name is 123 in args.yaml, line 5: a text is needed, in quotes"),
        ("run_name: true", "run_name is true in args.yaml, line 5: a text is needed, in quotes"),
        ("evaluation_strategy: false", "in args.yaml, line 5: choose one of no, steps, epoch"),
        ("no_recompute_layers: [a]", "in args.yaml, line 5: a list of whole numbers"),
        ('run_name: "\\uD800"', "in args.yaml, line 5: it holds half a character"),
        ("lora_rnk: 4", 'unknown setting "lora_rnk" in args.yaml, line 5: did you mean "lora_rank"?'),
        ("no: 4", 'unknown setting "no" in args.yaml, line 5'),
        ("task_name_or_path: a", "are one setting, but in args.yaml, line 5 they are"),
    ],
)
def test_wrong_values_are_told_with_their_line(line, said):
    assert any(said in fault for fault in faults_of(HEAD + line + "\n"))


def test_files_that_cannot_be_read():
    with pytest.raises(UserError, match=r"argument file absent\.yaml does not exist \(looked in "):
        parse_arguments(["absent.yaml"])
    Path("latin.yaml").write_bytes(b"run_name: caf\xe9\n")
    with pytest.raises(UserError, match=r"argument file latin\.yaml is not UTF-8 text \(byte 13\)"):
        parse_arguments(["latin.yaml"])
    Path("large.yaml").write_text("# comment\n" * 200_000)
    with pytest.raises(UserError, match=r"large\.yaml has more than 1,048,576 bytes"):
        parse_arguments(["large.yaml"])


def test_marks_and_line_ends_of_windows():
    assert parse_text("\ufeff" + HEAD.replace("\n", "\r\n") + "lora: true\r\n", "A.YAML").model.lora is True


def test_the_name_of_a_reward_file_counts():
    data = "model_name_or_path: a/b\ndataset_name_or_path: data\noutput_dir: out\ndo_train: true\n"
    assert parse_text(data, "rm_argument.yml").alignment.loss_type == "reward"


def test_json_with_a_comment_names_yaml():
    Path("args.json").write_text('{\n  # lora\n  "lora": true}')
    with pytest.raises(UserError, match=r"remove them; in a file that ends in \.yaml, # begins one"):
        parse_arguments(["args.json"])
