"""Reading rows from JSON lines, JSON, CSV, parquet and the Hugging Face hub, without guessing."""

from __future__ import annotations

import csv
import io
import json
import os
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from floe.errors import DataError, FileError, require
from floe.storage import unique_keys

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
        One table gives the same rows in every format: an empty text is no choices, answer or task.

    Raises:
        FileError: if the file is missing, unreadable or of an unknown kind.
        DataError: for broken text or JSON, a missing column (the text lists those found), a wrong
            type, an answer that may be a choice's text or another's index, a lone surrogate, or an
            empty set; it names the source and the 0-based row.
        ValueError: for an unknown field or a limit below 1.
    """
    unknown = sorted(set(columns or {}) - set(FIELDS))
    if unknown:
        raise ValueError(f"columns must map fields among {', '.join(FIELDS)}, got {unknown[0]!r}")
    require(limit is None or limit >= 1, "limit must be at least 1", limit)
    source = os.fspath(path_or_hub)
    path = Path(source)
    if path.suffix.lower() in _SUFFIXES or path.exists():
        if split or revision or subset:
            raise ValueError(
                f"split, revision and subset are for hub data sets, got the file {source}"
            )
        raws = _read_file(path)
    else:
        raws = iter(_read_hub(source, split, revision, subset))
    read = (_row(source, i, raw, columns) for i, raw in enumerate(raws))
    rows = list(islice(read, limit))
    if not rows:
        raise DataError(source, "must hold at least one row, got none")
    if _unclear(_readings(rows)):
        rows += read  # the whole column decides, whatever the limit
    _answers(source, rows)
    return rows[:limit]


def _read_file(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise FileError(path, f"must end in {', '.join(_SUFFIXES)}")
    try:
        if not path.is_file():
            raise FileError(
                path, "must be a file, got a folder" if path.is_dir() else "does not exist"
            )
        data = path.read_bytes()
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror or error}") from error
    source = str(path)
    if suffix == ".parquet":
        return _parquet(source, data)
    text = _decode(source, data)
    if suffix == ".csv":
        return _csv(source, text)
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
        if line.strip(" \t\r"):
            where = f"line {number}"
            yield _object(_parse(source, line, row, where), source, row, where)
            row += 1


def _json(source: str, text: str) -> Iterator[Row]:
    value = _parse(source, text, None, "the file")
    if not isinstance(value, list):
        raise DataError(source, f"must be a JSON list of objects, got {type(value).__name__}")
    yield from (_object(item, source, row, "an item") for row, item in enumerate(value))


def _parse(source: str, text: str, row: int | None, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # ValueError: also a number too long to read
        raise DataError(source, f"{where} must be valid JSON: {error}", row) from error


def _object(value: Any, source: str, row: int, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(source, f"{where} must be a JSON object, got {type(value).__name__}", row)
    return value


def _csv(source: str, text: str) -> Iterator[Row]:
    before = csv.field_size_limit(sys.maxsize)  # the default refuses fields above 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(reader, [])
        _check_names(source, names)
        for i, row in enumerate(line for line in reader if line):
            if len(row) != len(names):
                raise DataError(source, f"must have {len(names)} fields, got {len(row)}", i)
            yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise DataError(source, f"line {reader.line_num} must be valid CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _parquet(source: str, data: bytes) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        table = file.read()
        table.validate(full=True)
        _check_names(source, table.column_names)
        for batch in table.to_batches(max_chunksize=4096):
            yield from batch.to_pylist()
    except DataError:
        raise
    except Exception as error:  # whatever damaged bytes make of the library
        raise FileError(source, f"must be a parquet file: {error}") from error


def _check_names(source: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise DataError(source, f"column names must differ, got {', '.join(names)}")


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
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
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
    for field in ("choices", "answer", "task"):  # as CSV writes what is not there
        if values.get(field) == "":
            del values[field]
    if ("choices" in values) != ("answer" in values):
        raise DataError(source, "choices and answer must come together, got one of them", index)
    row: Row = {}
    if "choices" in values:
        row = {"choices": _choices(source, index, values["choices"]), "answer": values["answer"]}
        if values.get("completion") == "":
            del values["completion"]
    for field in ("prompt", "completion", "task"):
        if field in values:
            row[field] = _string(source, index, field, values[field])
        elif field == "prompt" or (field == "completion" and "choices" not in row):
            raise _missing(source, index, field, names[field], raw)
    return row


def _missing(source: str, index: int, field: str, name: str, raw: Row) -> DataError:
    if name in raw:
        return DataError(source, f"{field} must not be null (column {name!r})", index)
    listed = ", ".join(map(str, raw)) or "none"
    message = f"{field} needs the column {name!r}, found {listed}; map it in columns"
    return DataError(source, message, index)


def _string(source: str, index: int, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(source, f"{field} must be text, got {type(value).__name__}", index)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"the lone surrogate {value[error.start]!r} at character {error.start}"
        raise DataError(source, f"{field} must be Unicode text, got {what}", index) from error
    return value


def _choices(source: str, index: int, choices: Any) -> list[str]:
    if isinstance(choices, str):  # a CSV field
        choices = _parse(source, choices, index, "choices must be a list or a JSON list and")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise DataError(source, "choices must be a list of non-empty texts", index)
    if len(choices) < 2 or len(set(choices)) != len(choices):
        message = f"choices must be two or more different texts, got {reprlib.repr(choices)}"
        raise DataError(source, message, index)
    return [_string(source, index, "a choice", choice) for choice in choices]


def _answers(source: str, rows: list[Row]) -> None:
    """Make every row's answer the index of the right choice.

    A number is that index. Text may be a choice or an index, and must be read alike in CSV, where
    all is text, and elsewhere: where it could be either, the column decides, if all of its texts
    are the one and not all the other.
    """
    readings = _readings(rows)
    texts = sum(isinstance(row.get("answer"), str) for row in rows)
    named, counted = (
        sum(reading[kind] is not None for reading in readings) == texts for kind in (0, 1)
    )  # whether all texts can be read so
    unclear = _unclear(readings)
    if unclear and named == counted:
        i = unclear[0]
        row, (choice, index) = rows[i], readings[i]
        message = (
            f"answer {row['answer']!r} must be either a choice or the index of one, got both: "
            f"choice {choice} and the index of {row['choices'][index]!r}; give the "
            "index as a number (JSONL, parquet) or the choice's text"
        )
        raise DataError(source, message, i)
    for i, (row, reading) in enumerate(zip(rows, readings, strict=True)):
        if "answer" not in row:
            continue
        order, most = reading if named else reading[::-1], len(row["choices"])
        answer = next((place for place in order if place is not None), row["answer"])
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < most:
            message = f"answer must be a choice or its index below {most}, got "
            raise DataError(source, message + reprlib.repr(row["answer"]), i)
        row["answer"] = answer
        row.setdefault("completion", row["choices"][answer])


_Reading = tuple[int | None, int | None]


def _readings(rows: list[Row]) -> list[_Reading]:
    """Of each row whose answer is text: which choice it is, and which choice's index it says."""
    readings: list[_Reading] = []
    for row in rows:
        answer, choices = row.get("answer"), row.get("choices", [])
        text = answer.strip() if isinstance(answer, str) else ""
        says = text.isdecimal() and len(text) < 10 and int(text) < len(choices)
        choice = choices.index(answer) if isinstance(answer, str) and answer in choices else None
        readings.append((choice, int(text) if says else None))
    return readings


def _unclear(readings: list[_Reading]) -> list[int]:
    return [i for i, (a, b) in enumerate(readings) if a is not None and b is not None and a != b]
