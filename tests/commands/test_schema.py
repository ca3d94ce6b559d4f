"""`schema`: prints or writes the schema of argument files."""

import json

import pytest

from finetune.commands import schema
from finetune.errors import UserError
from finetune.settings.schema import format_schema


def test_it_is_printed_and_written_once(tmp_path, capsys):
    schema.main([])
    assert capsys.readouterr().out == format_schema()
    path = tmp_path / "schema.json"
    schema.main(["--output", str(path)])
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(format_schema())
    assert '"$schema": "schema.json"' in capsys.readouterr().out
    path.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        schema.main(["--output", str(path)])
    assert path.read_text() == "mine"
    with pytest.raises(UserError, match="cannot be written"):
        schema.main(["--output", str(tmp_path / "no folder" / "schema.json")])
