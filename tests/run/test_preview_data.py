"""Data files of other tools through the preview: what is told of them, and texts in memory and as a stream."""

import json
import re


def test_what_was_read_by_a_rule_and_what_was_not_used_is_told(preview, tmp_path):
    rows = [{"ques": "q", "ans": 4, "images": []}, {"ques": "q", "ans": "a", "images": ["x"], "url": "y"}]
    file = tmp_path / "mine.csv"
    file.write_bytes("ques,ans,url\r\n问,答,http\r\n".encode("gbk"))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    columns = {"prompt": "ques", "response": "ans"}
    code, out, err = preview(
        1, dataset_name_or_path=str(tmp_path / "rows.jsonl"), columns=columns, lazy=False
    )
    assert code == 0, err
    assert re.search(r"read by rule +1 +numbers read as text\n", out)
    assert re.search(r"fields not used +1 +images\n +1 +url\n", out)
    code, out, err = preview(1, dataset_name_or_path=str(file), columns=columns)
    assert code == 2 and "looks like GBK: set encoding to gbk" in err
    code, out, err = preview(1, dataset_name_or_path=str(file), columns=columns, encoding="gbk")
    assert code == 0 and re.search(r"fields not used +1 +url\n", out), err


def test_a_text_is_divided_and_streamed_alike(preview, tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("word " * 300 + "\nshort\n", encoding="utf-8")
    settings = {"dataset_name_or_path": str(file), "max_length": 64, "src_length": 32, "do_eval": False}
    tables = []
    for more in ({}, {"lazy": True, "max_steps": 5, "save_strategy": "no", "evaluation_strategy": "no"}):
        code, out, err = preview(1, **settings, **more)
        assert code == 0, err
        tables.append(re.findall(r"(?:samples|learned tokens|texts longer).*", out))
    assert tables[0] == tables[1] and any("texts longer than max_length" in line for line in tables[0])
