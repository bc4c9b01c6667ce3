import json

import pyarrow
import pyarrow.parquet
import pytest

from floe.data import load_rows
from floe.errors import DataError, FileError

ROW = {"prompt": "p", "completion": "c"}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_jsonl(tmp_path):
    odd = {
        "prompt": "a\u2028b",
        "completion": "é",
        "task": "t",
        "choices": ["x", "y"],
        "answer": "y",
    }
    path = write(tmp_path / "a.jsonl", lines(ROW) + "\n" + json.dumps(odd, ensure_ascii=False))
    assert load_rows(path) == [ROW, {**odd, "answer": 1}]
    assert load_rows(path, limit=1) == [ROW]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_line_endings_and_bom(tmp_path, ending, start):
    text = json.dumps(ROW) + ending + json.dumps(ROW) + ending
    assert load_rows(write(tmp_path / "a.jsonl", start + text.encode())) == [ROW, ROW]
    table = ending.join(["prompt,completion", "p,c", 'p,"a,b"']) + ending
    assert load_rows(write(tmp_path / "a.csv", start + table.encode())) == [
        ROW,
        {"prompt": "p", "completion": "a,b"},
    ]


def test_a_line_of_a_megabyte(tmp_path):
    long = {"prompt": "x" * 1_000_000, "completion": "c"}
    assert load_rows(write(tmp_path / "a.jsonl", lines(long))) == [long]
    table = f"prompt,completion\n{long['prompt']},c\n"
    assert load_rows(write(tmp_path / "a.csv", table)) == [long]


def test_json_list_and_parquet(tmp_path):
    rows = [{**ROW, "choices": ["a", "b"], "answer": answer} for answer in (0, 1)]
    assert load_rows(write(tmp_path / "a.json", json.dumps(rows))) == rows
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_rows(tmp_path / "a.parquet") == rows
    assert load_rows(tmp_path / "a.parquet", limit=1) == rows[:1]
    with pytest.raises(FileError, match="must be a parquet file"):
        load_rows(write(tmp_path / "b.parquet", "no"))


def test_mapping_is_explicit(tmp_path):
    raw = {"question": "q", "options": ["a", "b"], "label": 1, "answer": "text that is no choice"}
    path = write(tmp_path / "a.jsonl", lines(raw))
    columns = {"prompt": "question", "choices": "options", "answer": "label"}
    assert load_rows(path, columns=columns) == [
        {"prompt": "q", "completion": "b", "choices": ["a", "b"], "answer": 1}
    ]
    # `answer` is the completion here and not read as the index of a choice
    rows = load_rows(path, columns={"prompt": "question", "completion": "answer"})
    assert rows == [{"prompt": "q", "completion": raw["answer"]}]
    with pytest.raises(DataError, match=r"row 0: prompt needs .*'prompt', found question, options"):
        load_rows(write(tmp_path / "b.jsonl", lines({"question": "q", "options": "o"})))
    with pytest.raises(DataError, match="task needs the column 'subject', found question"):
        load_rows(path, columns={**columns, "task": "subject"})
    with pytest.raises(ValueError, match=r"columns must map fields among .*, got 'text'"):
        load_rows(path, columns={"text": "question"})


def test_csv_choices_are_a_json_list(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,choices,answer\np,"[""a"",""b""]",1\n')
    assert load_rows(path)[0]["answer"] == 1
    assert load_rows(path)[0]["completion"] == "b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "p"}\n\n{"a\xff', r"row 2: must be UTF-8, got byte 0xff in line 3"),
        (lines(ROW) + "{", r"row 1: line 2 must be valid JSON"),
        (lines(ROW) + "[1]", r"row 1: line 2 must be a JSON object, got list"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "a key occurs twice"),
        (lines({**ROW, "prompt": 3}), "row 0: prompt must be text, got int"),
        (lines(ROW, {**ROW, "completion": None}), "row 1: completion must not be null"),
        (lines({**ROW, "choices": ["a", "b"]}), "choices and answer must come together"),
        (lines({**ROW, "choices": ["a"], "answer": 0}), "two or more different texts"),
        (lines({**ROW, "choices": ["a", "a"], "answer": 0}), "two or more different texts"),
        (lines({**ROW, "choices": ["a", 2], "answer": 0}), "must be a list of non-empty texts"),
        (lines({**ROW, "choices": "a", "answer": 0}), "choices must be a list or a JSON list"),
        (lines({**ROW, "choices": ["a", "b"], "answer": 2}), "or its index below 2, got 2"),
        (lines({**ROW, "choices": ["a", "b"], "answer": "c"}), "got 'c'"),
        (lines({**ROW, "choices": ["a", "b"], "answer": True}), "got True"),
        ("[" * 100_000, "must be valid JSON"),
        ("", "must hold at least one row, got none"),
        ("\n \n", "must hold at least one row, got none"),
    ],
)  # fmt: skip
def test_bad_jsonl(tmp_path, content, message):
    path = write(tmp_path / "bad.jsonl", content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(path)
    assert caught.value.source == str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,completion\np\n", "row 0: must have 2 fields, got 1"),
        ("prompt,completion\np,c\np,c,d\n", "row 1: must have 2 fields, got 3"),
        ('prompt,completion\np,"c\n', "line 2 must be valid CSV"),
        ("prompt,prompt\np,c\n", "column names must differ"),
        ("prompt,answer\np,c\n", "choices and answer must come together"),
        ("", "at least one row"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / "bad.csv", content))


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        load_rows(tmp_path / "no.jsonl")
    with pytest.raises(FileError, match=r"must end in \.jsonl"):
        load_rows(write(tmp_path / "a.txt", "x"))
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(FileError, match="must be a file, got a folder"):
        load_rows(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="split must be given for the hub data set 'org/name'"):
        load_rows("org/name")
    path = write(tmp_path / "a.jsonl", lines(ROW))
    with pytest.raises(ValueError, match="are for hub data sets, got the file"):
        load_rows(path, split="train")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        load_rows(path, limit=0)
    with pytest.raises(DataError, match="must be a JSON list of objects, got dict"):
        load_rows(write(tmp_path / "a.json", "{}"))
