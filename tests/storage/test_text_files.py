"""Text files of users: their length, their encoding, and what is said of them."""

from __future__ import annotations

import pytest

from finetune.errors import UserError
from finetune.storage.files import read_json_object, read_text


def test_a_file_may_be_as_long_as_the_limit_and_no_longer(tmp_path):
    file = tmp_path / "text.json"
    file.write_bytes(b"x" * 10)
    assert read_text(file, max_bytes=10) == "x" * 10
    with pytest.raises(UserError, match=rf"{file} cannot be read \(it has more than 9 bytes\): shorten it"):
        read_text(file, max_bytes=9, remedy="shorten it")


def test_a_byte_order_mark_is_left_out(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "上衣".encode())
    assert read_text(file) == "上衣"


def test_the_first_byte_that_is_no_utf8_is_named(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("上".encode() + "é".encode("latin-1"))
    with pytest.raises(UserError, match=rf"{file} is no UTF-8 text \(byte 0xe9 at 3\)"):
        read_text(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt cannot be read \(No such file or directory\)"):
        read_text(tmp_path / "gone.txt")


def test_half_of_a_character_is_told_with_its_file(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text('{"eos_token": "\\ud800"}', encoding="ascii")
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json is no valid JSON \(\\ud800 is half of a character\): "
    ):
        read_json_object(path)
    path.write_text('{"eos_token": "\\ud83d\\ude00"}', encoding="ascii")  # a whole one
    assert read_json_object(path) == {"eos_token": "\U0001f600"}
