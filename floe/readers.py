"""Reading rows from JSON lines, JSON, CSV, parquet and the Hugging Face hub, without guessing."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from floe.errors import DataError, FileError

FIELDS = ("prompt", "completion", "choices", "answer", "task")
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
Row = dict[str, Any]


def load_rows(
    path_or_hub: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    revision: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
) -> list[Row]:
    """Rows with ``prompt`` and ``completion``, and ``choices``, ``answer``, ``task`` if any.

    Args:
        path_or_hub: a file ending in .jsonl, .json, .csv or .parquet, or the name of a hub data set
            (read by ``datasets``; it needs ``split``).
        columns: field -> column of the data. Without it the file must use floe's own names, and
            optional ones are taken where they exist. With it only the mapped columns are read, and
            ``prompt`` and ``completion`` where they are not mapped keep their names. Where
            ``choices`` and ``answer`` are there, ``completion`` may be missing: it is the answer.
        split, revision, subset: of a hub data set.
        limit: read at most this many rows.

    Returns:
        One dict per row: ``prompt``, ``completion`` and ``task`` str; ``choices`` list[str] (in CSV
        a JSON list); ``answer`` int, the index of the right choice (the data may give its text).

    Raises:
        FileError: if the file is missing, unreadable or of an unknown kind.
        DataError: for broken text or JSON, a missing column (the text lists those found), a wrong
            type, or an empty set; it names the source and the 0-based row.
        ValueError: for an unknown field or a limit below 1.
    """
    columns = _check_columns(columns)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    source = os.fspath(path_or_hub)
    path = Path(source)
    if path.suffix.lower() in _SUFFIXES or path.exists():
        if split or revision or subset:
            raise ValueError(
                f"split, revision and subset are for hub data sets, got the file {source}"
            )
        found: Iterable[Row] = _read_file(path, limit)
    else:
        found = _read_hub(source, split, revision, subset)
    rows = [_row(source, i, raw, columns) for i, raw in enumerate(islice(found, limit))]
    if not rows:
        raise DataError(source, "must hold at least one row, got none")
    return rows


def _check_columns(columns: Mapping[str, str] | None) -> Mapping[str, str] | None:
    unknown = sorted(set(columns or {}) - set(FIELDS))
    if unknown:
        raise ValueError(f"columns must map fields among {', '.join(FIELDS)}, got {unknown[0]!r}")
    return columns


def _read_file(path: Path, limit: int | None) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise FileError(path, f"must end in {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise FileError(path, "must be a file, got a folder" if path.is_dir() else "does not exist")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror or error}") from error
    source = str(path)
    if suffix == ".parquet":
        return _parquet(source, data, limit)
    text = _decode(source, data)
    if suffix == ".csv":
        return _csv(source, text, limit)
    return _jsonl(source, text) if suffix == ".jsonl" else _json(source, text)


def _decode(source: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        message = f"must be UTF-8, got byte 0x{data[error.start]:02x} in line {line + 1}"
        raise DataError(source, message, line) from error


def _jsonl(source: str, text: str) -> Iterator[Row]:
    row = 0
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 is text
        if line.strip():
            where = f"line {number}"
            yield _object(_parse(source, line, row, where), source, row, where)
            row += 1


def _json(source: str, text: str) -> Iterator[Row]:
    value = _parse(source, text, None, "the file")
    if not isinstance(value, list):
        raise DataError(source, f"must be a JSON list of objects, got {type(value).__name__}")
    for row, item in enumerate(value):
        yield _object(item, source, row, "an item")


def _parse(source: str, text: str, row: int | None, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (json.JSONDecodeError, RecursionError, KeyError) as error:
        raise DataError(source, f"{where} must be valid JSON: {error}", row) from error


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise KeyError("a key occurs twice")
    return row


def _object(value: Any, source: str, row: int, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(source, f"{where} must be a JSON object, got {type(value).__name__}", row)
    return value


def _csv(source: str, text: str, limit: int | None) -> Iterator[Row]:
    before = csv.field_size_limit(sys.maxsize)  # the default refuses fields above 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(reader, [])
        rows = [line for line in islice(reader, limit) if line]
    except csv.Error as error:
        raise DataError(source, f"line {reader.line_num} must be valid CSV: {error}") from error
    finally:
        csv.field_size_limit(before)
    if len(set(names)) != len(names):
        raise DataError(source, f"column names must differ, got {', '.join(names)}")
    for i, row in enumerate(rows):
        if len(row) != len(names):
            raise DataError(source, f"must have {len(names)} fields, got {len(row)}", i)
    return iter([dict(zip(names, row, strict=True)) for row in rows])


def _parquet(source: str, data: bytes, limit: int | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
        return iter(table.slice(0, limit).to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise FileError(source, f"must be a parquet file: {error}") from error


def _read_hub(
    name: str, split: str | None, revision: str | None, subset: str | None
) -> Iterable[Row]:
    if not split:
        raise ValueError(f"split must be given for the hub data set {name!r} (no such file here)")
    import datasets

    try:
        data: Iterable[Row] = datasets.load_dataset(
            name, subset, split=split, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise FileError(name, f"neither a file nor a hub data set that loads: {error}") from error
    return data


def _row(source: str, index: int, raw: Row, columns: Mapping[str, str] | None) -> Row:
    names = dict(columns) if columns is not None else {field: field for field in FIELDS}
    for field, name in names.items():
        if columns is not None and name not in raw:
            raise _missing(source, index, field, name, raw)
    for field in ("prompt", "completion"):
        names.setdefault(field, field)
    values = {f: raw[name] for f, name in names.items() if raw.get(name) is not None}
    row: Row = {}
    if "choices" in values or "answer" in values:
        row = _choices(source, index, values)
        values.setdefault("completion", row["choices"][row["answer"]])
    for field in ("prompt", "completion", "task"):
        if field in values:
            row[field] = _string(source, index, field, values[field])
        elif field != "task":
            raise _missing(source, index, field, names[field], raw)
    return row


def _missing(source: str, index: int, field: str, name: str, raw: Row) -> DataError:
    if name in raw:
        return DataError(source, f"{field} must not be null (column {name!r})", index)
    found = ", ".join(map(str, raw)) or "none"
    message = f"{field} needs the column {name!r}, found {found}; map it in columns"
    return DataError(source, message, index)


def _string(source: str, index: int, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(source, f"{field} must be text, got {type(value).__name__}", index)
    return value


def _choices(source: str, index: int, values: Row) -> Row:
    choices, answer = values.get("choices"), values.get("answer")
    if choices is None or answer is None:
        raise DataError(source, "choices and answer must come together, got one of them", index)
    if isinstance(choices, str):  # a CSV field
        try:
            choices = json.loads(choices)
        except json.JSONDecodeError as error:
            message = f"choices must be a list or a JSON list: {error}"
            raise DataError(source, message, index) from error
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise DataError(source, "choices must be a list of non-empty texts", index)
    if len(choices) < 2 or len(set(choices)) != len(choices):
        message = f"choices must be two or more different texts, got {choices}"
        raise DataError(source, message, index)
    if isinstance(answer, str):
        if answer in choices:
            answer = choices.index(answer)
        elif answer.strip().isdecimal():
            answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        message = f"answer must be a choice or its index below {len(choices)}, got {answer!r}"
        raise DataError(source, message, index)
    return {"choices": choices, "answer": answer}
