"""What a template cannot write is gathered like any other fault: all named at once, or skipped and counted."""

import pytest

from finetune.data.reading.mixing import DataSource
from finetune.data.reading.records import FaultCollector
from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.samples.dataset import load_prompts, load_samples
from finetune.data.stream.settings import StreamSettings
from finetune.data.stream.stream import SampleStream
from finetune.data.templates.template import load_template
from finetune.errors import UserError

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
LENGTHS = {"src_length": 100, "max_length": 200}


@pytest.fixture
def template(tmp_path):
    (tmp_path / "t.jinja").write_text(NO_SYSTEM)
    return load_template(tmp_path / "t.jinja")


@pytest.fixture
def file(write_lines):
    pair = {"query": "q", "response": "a"}
    return write_lines(pair, {**pair, "system": "s"}, pair, {**pair, "system": "t"}, pair)


@pytest.mark.parametrize("load", [load_samples, load_prompts])
def test_all_are_named_at_once(file, encoder, template, load):
    lengths = LENGTHS if load is load_samples else {"src_length": 100}
    with pytest.raises(UserError) as caught:
        load([file], encoder, template, **lengths)
    assert len(caught.value.faults) == 2
    assert f"{file}:2: " in caught.value.faults[0] and f"{file}:4: " in caught.value.faults[1]
    assert "no system here" in caught.value.faults[0]


@pytest.mark.parametrize("load", [load_samples, load_prompts])
def test_they_are_skipped_and_counted(file, encoder, template, load):
    lengths = LENGTHS if load is load_samples else {"src_length": 100}
    faults = FaultCollector(skip=True)
    kept, _ = load([file], encoder, template, faults=faults, **lengths)
    assert len(kept) == 3 and faults.num_faults == 2


@pytest.mark.parametrize("skips", [True, False])
def test_a_stream_does_the_same(file, encoder, template, skips):
    settings = StreamSettings(seed=1, shuffle_buffer_size=1, skip_bad_lines=skips)
    source = DataSource(name="d", files=(file,))
    stream = SampleStream([source], BulkBuilder(encoder, template, **LENGTHS), settings)
    if skips:
        assert len(stream.read_first(9)) == 3 and stream.report.num_faulty_lines == 2
        return
    with pytest.raises(UserError, match=r"train\.json:2.*no system here"):
        stream.read_first(9)


def test_the_report_has_them_beside_what_could_not_be_read(file, encoder, template):
    faults = FaultCollector(skip=True)
    _, report = load_samples([file], encoder, template, faults=faults, **LENGTHS)
    report.add_faults(faults)
    assert "skipped: 2 faulty lines, the first:" in report.describe()
