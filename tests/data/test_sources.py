import csv
import io
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from floe.data.sources import load_rows
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


COLUMNS = {name: name for name in ("prompt", "completion", "choices", "answer", "task")}
ODD_TEXTS = [
    "007",
    "1",
    "a,b",
    'say "yes"',
    "two\nlines",
    "\r\n",
    " blank ",
    "NaN",
    "None",
    "true",
    "é\u2028",
]


def as_csv(rows):
    """As pandas writes it: all is text, what is missing is empty, a list is JSON."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    for row in rows:
        row = {k: json.dumps(v) if k == "choices" and v else v for k, v in row.items()}
        writer.writerow({k: "" if row[k] is None else row[k] for k in COLUMNS})
    return out.getvalue()


def read_everywhere(tmp_path, rows, monkeypatch):
    """The rows as every kind of source gives them; an error's text where it refuses."""
    rows = [dict.fromkeys(COLUMNS) | row for row in rows]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    hub = datasets.Dataset(table)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: hub)
    found = {}
    for source, split in (
        (write(tmp_path / "a.jsonl", lines(*rows)), None),
        (write(tmp_path / "a.json", json.dumps(rows)), None),
        (write(tmp_path / "a.csv", as_csv(rows)), None),
        (tmp_path / "a.parquet", None),
        ("org/name", "train"),
    ):
        try:
            found[str(source).rpartition(".")[2]] = load_rows(source, columns=COLUMNS, split=split)
        except DataError as error:
            found[str(source).rpartition(".")[2]] = str(error).partition(": ")[2]
    return found


def test_a_table_gives_the_same_rows_in_every_format(tmp_path, monkeypatch):
    asked = {"prompt": "p", "choices": ["a", "b"]}
    rows = [{"prompt": text, "completion": text, "task": text} for text in ODD_TEXTS]
    rows += [{**ROW}, {"prompt": "", "completion": ""}, {**ROW, "task": ""}]
    want = [*rows[:-1], ROW]
    found = read_everywhere(tmp_path, rows, monkeypatch)
    assert len(found) == 5
    assert all(one == want for one in found.values())

    # The index as a number, where choices are numbers themselves.
    rows = [{**asked, "choices": ["4", "0", "1"], "answer": i} for i in (0, 2, 1)]
    found = read_everywhere(tmp_path, rows, monkeypatch)
    want = [{**row, "completion": row["choices"][row["answer"]]} for row in rows]
    assert all(one == want for one in found.values())

    # The choice's text, where it could be an index.
    rows = [{**asked, "choices": ["2", "1", "0"], "answer": a} for a in ("1", "0")]
    rows += [{**asked, "choices": ["40", "41"], "answer": "41"}, {**ROW}]
    found = read_everywhere(tmp_path, rows, monkeypatch)
    assert all([row.get("answer") for row in one] == [1, 2, 1, None] for one in found.values())
    assert all(one[1]["completion"] == "0" for one in found.values())

    # A completion that is missing is the answer, one that is there stays.
    rows = [{**asked, "completion": c, "answer": "b"} for c in ("", None, "Answer: b")]
    found = read_everywhere(tmp_path, rows, monkeypatch)
    for one in found.values():
        assert [row["completion"] for row in one] == ["b", "b", "Answer: b"]


def test_an_answer_that_may_be_read_two_ways_is_refused(tmp_path, monkeypatch):
    rows = [{"prompt": "p", "choices": ["2", "1", "0"], "answer": a} for a in ("1", "0", "2")]
    found = read_everywhere(tmp_path, rows, monkeypatch)
    refusal = "answer '0' must be either a choice or the index of one, got both: choice 2 and the "
    assert all(one.startswith(refusal) for one in found.values())  # "1" is choice 1 either way
    # As numbers they are clear, but not in CSV.
    found = read_everywhere(
        tmp_path, [{**row, "answer": int(row["answer"])} for row in rows], monkeypatch
    )
    assert found.pop("csv").startswith(refusal)
    for one in found.values():
        assert [row["completion"] for row in one] == ["1", "2", "0"]
    # Both kinds in a column: each row for itself.
    rows = [{"prompt": "p", "choices": ["x", "7"], "answer": a} for a in ("x", "1", "7", "0")]
    found = read_everywhere(tmp_path, rows, monkeypatch)
    assert all([row["answer"] for row in one] == [0, 1, 1, 0] for one in found.values())


def test_a_limit_does_not_change_how_answers_are_read(tmp_path):
    table = "prompt,choices,answer\n" + 'p,"[""2"",""1"",""0""]",0\n' * 5
    clear = write(tmp_path / "a.csv", table + 'p,"[""a"",""b""]",1\n')
    assert [row["answer"] for row in load_rows(clear)] == [0, 0, 0, 0, 0, 1]
    assert [row["answer"] for row in load_rows(clear, limit=1)] == [0]
    with pytest.raises(DataError, match="row 0: answer '0' must be either"):
        load_rows(write(tmp_path / "b.csv", table), limit=1)


def test_blank_lines_are_no_rows(tmp_path):
    text = "prompt,completion\n\np,c\n\n\nq,d\n"
    assert len(load_rows(write(tmp_path / "a.csv", text), limit=2)) == 2
    path = write(tmp_path / "a.jsonl", "\n" + lines(ROW) + "\n \n" + lines(ROW))
    assert len(load_rows(path, limit=2)) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            lines(ROW) + '{"prompt": "p", "completion": "c", "x": %s}' % ("1" * 5000),
            "row 1: line 2 must be valid JSON: Exceeds the limit",
        ),
        ("a.json", "[" + "1" * 5000 + "]", "the file must be valid JSON"),
        (
            "a.jsonl",
            lines({"prompt": "p", "choices": ["a", "b"], "answer": "9" * 5000}),
            r"row 0: answer must be .* got '9{12}\.\.\.9{13}'",
        ),
        (
            "a.jsonl",
            '{"prompt": "p", "choices": ["a", "b"], "answer": %s}' % ("9" * 400),
            r"row 0: answer must be .* got 9{18}\.\.\.",
        ),
        ("a.csv", 'prompt,choices,answer\np,"[""a"",""b""]",' + "1" * 5000, "answer must be"),
        ("a.csv", 'prompt,choices,answer\np,"[%s]",1' % ("1" * 5000), "choices must be a list"),
        ("a.csv", 'prompt,choices,answer\np,"%s",1' % ("[" * 100_000), "choices must be a list"),
        ("a.csv", 'prompt,choices,answer\np,"[""a"",""a""]",1', "must be two or more"),
        (
            "a.jsonl",
            lines(ROW, {**ROW, "prompt": "nice \ud83d"}),
            r"row 1: prompt must be Unicode text, got the lone surrogate '\\ud83d' at character 5",
        ),
        ("a.jsonl", lines({**ROW, "task": "\udc00"}), "row 0: task must be Unicode text"),
        (
            "a.jsonl",
            lines({"prompt": "p", "choices": ["a", "\udfff"], "answer": 0}),
            "row 0: a choice must be Unicode text",
        ),
        ("a.json", '[{"prompt": NaN, "completion": "c"}]', "row 0: prompt must be text, got float"),
    ],
)
def test_odd_values_name_file_and_row(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(path)
    assert caught.value.source == str(path)
    assert len(str(caught.value)) < 400


def test_damaged_parquet(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["p"])] * 2, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="column names must differ"):
        load_rows(tmp_path / "twice.parquet")
    text = pyarrow.array([b"ok", b"\xff"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    table = pyarrow.Table.from_arrays([text, text], names=["prompt", "completion"])
    pyarrow.parquet.write_table(table, tmp_path / "bytes.parquet")
    with pytest.raises(FileError, match=r"bytes\.parquet: must be a parquet file: .*UTF"):
        load_rows(tmp_path / "bytes.parquet")


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
        (lines(ROW) + "\x1c\n", "row 1: line 2 must be valid JSON"),
        ("", "must hold at least one row, got none"),
        ("\n \n", "must hold at least one row, got none"),
    ],
)
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
