"""Mutated data files: each is refused by name, or read as a plain reader of its format reads it."""

import csv
import io
import json
import random
import time

import pyarrow
import pyarrow.parquet
import pytest
from helpers.attack import trials
from helpers.tiny import tiny_tokenizer

from floe.data.rows import encode, encode_choices
from floe.data.sources import load_rows
from floe.errors import DataError, FileError

FIELDS = ("prompt", "completion", "choices", "answer", "task")
TEXTS = [
    "a",
    "",
    "7",
    "007",
    "1",
    "0",
    "NaN",
    "true",
    "é",
    "\U0001f600",
    "a,b",
    '"',
    "two\nlines",
    "\r\n",
    "\t",
    " ",
    "\x00",
    "\ufeff",
    "\u2028",
    "<e>",
    "{prompt}",
    "x" * 5000,
]
ODD_VALUES = [None, 3, 0.5, True, float("nan"), [], {}, ["a"], ["a", "b"], "9" * 400, 10**400, -1]
PIECES = [
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r",
    b'"',
    b",",
    b"\\",
    b"[",
    b"{",
    b"}",
    b"[" * 5000,
    b"1" * 5000,
    b"\\ud800",
    b"\\udc00\\ud83d",
    b"NaN",
    b"1e999",
    b"null",
    b'"prompt": "p", ',
    b"\xe2\x80\xa8",
]


def a_row(draw):
    row = {"prompt": draw.choice(TEXTS), "completion": draw.choice(TEXTS)}
    if draw.random() < 0.5:
        row["choices"] = draw.sample(["0", "1", "2", "x", "y", "é", '"'], draw.randint(2, 4))
        answer = draw.randrange(len(row["choices"]))
        row["answer"] = draw.choice([answer, str(answer), row["choices"][answer]])
    if draw.random() < 0.3:
        row["task"] = draw.choice(TEXTS)
    return row


def damage(draw, rows):
    """Wrong types and missing values; kept out of parquet, where a column has one type."""
    for row in draw.sample(rows, draw.randint(0, 1)):
        field = draw.choice(FIELDS)
        if draw.random() < 0.3:
            row.pop(field, None)
        else:
            row[field] = draw.choice([*ODD_VALUES, "\ud83d", *TEXTS])
    return rows


def as_jsonl(draw, rows):
    ascii_only = draw.random() < 0.8
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in damage(draw, rows)]
    return draw.choice(["\n", "\r\n", "\n\n"]).join(lines).encode("utf-8", "surrogatepass")


def as_json(draw, rows):
    return json.dumps(damage(draw, rows), indent=draw.choice([None, 1])).encode()


def as_csv(draw, rows):
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    writer.writerow(FIELDS)
    for row in rows:
        cells = {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
        writer.writerow([cells.get(field, "") for field in FIELDS])
    return out.getvalue().encode()


def as_parquet(draw, rows):
    whole = [{k: str(v) if k == "answer" else v for k, v in row.items()} for row in rows]
    table = pyarrow.Table.from_pylist([dict.fromkeys(FIELDS) | row for row in whole])
    out = io.BytesIO()
    compression = draw.choice(["none", "snappy", "zstd"])
    pyarrow.parquet.write_table(
        table,
        out,
        compression=compression,
        use_dictionary=draw.random() < 0.5,
        write_page_checksum=draw.random() < 0.5,
    )
    return out.getvalue()


WRITERS = {"jsonl": as_jsonl, "json": as_json, "csv": as_csv, "parquet": as_parquet}


def mutate(draw, data):
    data = bytearray(data)
    for _ in range(draw.choice([0, 1, 1, 2, 5])):
        if not data:
            break
        place, length = draw.randrange(len(data)), draw.choice([1, 1, 5, 50])
        match draw.randrange(5):
            case 0:
                data[place] ^= 1 << draw.randrange(8)
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = draw.choice(PIECES)
            case 3:
                data[place : place + length] = bytes(draw.randrange(256) for _ in range(length))
            case 4:
                data[place:place] = data[max(0, place - length) : place]
    return bytes(data)


def plain_rows(path):
    """The file's rows by its format's plain reader, every value as it is written."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def check(found, raw):
    """One accepted row against the plain one; empty is missing but in prompt and completion."""
    given = {k: v for k, v in raw.items() if k in FIELDS and v is not None}
    given = {k: v for k, v in given.items() if v != "" or k in ("prompt", "completion")}
    assert found["prompt"] == given["prompt"]
    assert found.get("task") == given.get("task")
    assert (
        ("choices" in found) == ("choices" in given) == ("answer" in given) == ("answer" in found)
    )
    if "choices" in found:
        choices, answer = given["choices"], given["answer"]
        assert found["choices"] == (json.loads(choices) if isinstance(choices, str) else choices)
        right = found["choices"][found["answer"]]
        if isinstance(answer, str):
            assert right == answer or int(answer) == found["answer"]
        else:
            assert type(answer) is int
            assert answer == found["answer"] >= 0
        assert found["completion"] == (given.get("completion") or right)
    else:
        assert found["completion"] == given["completion"]


@pytest.mark.parametrize("kind", WRITERS)
def test_mutated_files_are_refused_or_read_exactly(tmp_path, kind):
    tokenizer, accepted, count = tiny_tokenizer(), 0, trials(250)
    for seed in range(count):
        draw = random.Random(f"{kind} {seed}")
        rows = [a_row(draw) for _ in range(draw.randint(1, 6))]
        path = tmp_path / f"{seed}.{kind}"
        path.write_bytes(mutate(draw, WRITERS[kind](draw, rows)))
        began = time.monotonic()
        found, refusal = attempt(load_rows, path)
        if found is None:
            assert str(path) in refusal
        else:
            for one, other in zip(found, plain_rows(path), strict=True):
                check(one, other)
            accepted += 1
            encode_all(found, tokenizer)
        assert time.monotonic() - began < 2
    assert count / 10 < accepted < count


def attempt(call, *args, **settings):
    """What came, or None and the refusal."""
    try:
        return call(*args, **settings), ""
    except (DataError, FileError) as error:
        return None, str(error)


def encode_all(rows, tokenizer):
    """Every used row's tokens are its text; the others are listed."""
    encoded, refusal = attempt(encode, rows, tokenizer, max_length=400)
    if encoded is None:
        assert "no row with a target is left" in refusal
        return
    lost = {number for numbers in encoded.dropped.values() for number in numbers}
    assert sorted([row.index for row in encoded.rows] + sorted(lost)) == list(range(len(rows)))
    for row in encoded.rows:
        assert tokenizer.decode(row.response[:-1]) == rows[row.index]["completion"]
        prompt, cut = rows[row.index]["prompt"], row.index in encoded.cut
        assert cut or tokenizer.decode(row.prompt) == prompt
    encode_choices([row for row in rows if "choices" in row], tokenizer)
