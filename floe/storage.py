"""Files of every kind: whole or not at all, on disk before they are seen, read strictly."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from floe.errors import FileError
from floe.types import Array

STAGING = ".floe-"  # how names begin that are gone when their writer is done
CARD = "README.md"
HEADER = "meta"  # the entry of an array file that says what the others are
_HUGE = 10**30
_ZIP = (zipfile.BadZipFile, NotImplementedError)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold: equal content gives equal bytes


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename. An OSError leaves what was there."""
    beside = path.with_name(f"{STAGING}{secrets.token_hex(8)}")  # nobody else's
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


@contextmanager
def staging(final: Path) -> Iterator[Path]:
    """An empty folder to fill before :func:`publish` moves it to ``final``; gone at the end.

    Its name is drawn, so it is nobody else's. It lies in ``final``, or beside it where there is
    none yet, and so on the same disk.
    """
    home = final if final.is_dir() else final.parent
    home.mkdir(parents=True, exist_ok=True)
    drawn = Path(tempfile.mkdtemp(prefix=STAGING, dir=home))
    try:
        folder = drawn / "new"  # the drawn one is closed to other users
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(drawn, ignore_errors=True)


def publish(new: Path, final: Path) -> None:
    """Move ``new``, of :func:`staging`, to ``final``.

    Where ``final`` is a folder already, the files go into it in the order of their names. They
    replace those of their names, but a README.md stays, which may be the user's; so does all else.
    An error puts back what was there; a kill between two files leaves some old, some new.
    """
    for file in new.rglob("*"):
        if file.is_file():
            flush(file)
    if not final.is_dir():
        new.rename(final)
        flush(final.parent)
        return
    files = sorted(p.relative_to(new) for p in new.rglob("*") if p.is_file())
    files = [f for f in files if str(f) != CARD or not os.path.lexists(final / f)]
    kept = Path(tempfile.mkdtemp(dir=new.parent))
    for name in files:
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(final / name):
            shutil.copy2(final / name, kept / name, follow_symlinks=False)
    done = []
    try:
        for name in files:
            (new / name).replace(final / name)
            done.append(name)
    except BaseException:
        for name in done:
            if os.path.lexists(kept / name):
                (kept / name).replace(final / name)
            else:
                (final / name).unlink()
        raise
    flush(final)


def copy_folder(source: Path, final: Path) -> None:
    """A copy of ``source``'s files at ``final``, as :func:`publish` puts them there."""
    with staging(final) as new:
        shutil.copytree(source, new, dirs_exist_ok=True)
        publish(new, final)


def remove_if_empty(folder: Path) -> None:
    """Delete a folder in which nothing is left."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, of values that any of its readers can hold.

    Taking a key that is not there is a FileError, too, in any object of the file.

    Raises:
        FileError: it is missing, damaged or something else; or a value in it is a whole number
            beyond 63 bits, beyond 1e200, text above 100,000 characters, or nested above 64 deep:
            its key is named.
    """
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=partial(_Object, path),
            parse_int=_whole,
        )
    except FileNotFoundError:
        raise FileError(path, "is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(path, f"cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileError(path, f"must hold a JSON object, got {type(value).__name__}")
    check_values(path, value)
    return value


def check_values(path: str | os.PathLike[str], value: Any) -> None:
    """FileError, with its key, for a value of a file that is out of :func:`read_json`'s bounds."""
    flaw = _flaw(value)
    if flaw is not None:
        raise FileError(path, f"{flaw[0].removeprefix('.')[:200]} must be {flaw[1]}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for json.loads; ValueError where a key occurs twice."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"a key occurs twice: {key[:200]!r}")
        values[key] = value
    return values


class _Object(dict[str, Any]):
    """An object in a file: the file is at fault where a key is taken that is not there."""

    def __init__(self, path: Path, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(unique_keys(pairs))
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise FileError(self.path, f"{key} is missing")


def _whole(digits: str) -> int:
    return int(digits) if len(digits) < 30 else _HUGE  # reading more digits takes quadratic time


def _flaw(value: Any, depth: int = 0) -> tuple[str, str] | None:
    """The place of the first value out of bounds and its rule, or None."""
    if depth > 64:
        return "", "nested at most 64 deep"
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            flaw = _flaw(part, depth + 1)
            if flaw is not None:
                place = f".{key}" if isinstance(value, dict) else f"[{key}]"
                return place + flaw[0], flaw[1]
    elif isinstance(value, str):
        return ("", "text of at most 100,000 characters") if len(value) > 100_000 else None
    elif isinstance(value, int):
        return ("", "a whole number of at most 63 bits") if abs(value) >= 2**63 else None
    elif isinstance(value, float) and 1e200 < abs(value) < float("inf"):
        return "", "a number of at most 1e200"
    return None


def hash_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of the values in which ``new``, made JSON, differs from the JSON object ``old``."""
    new = json.loads(json.dumps(new))
    return [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]


def sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_arrays(
    path: str | os.PathLike[str], what: str, header: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    """Write the arrays and, as JSON, the header, which holds the "format"; ``what`` names them.

    Raises:
        FileError: it cannot be written; what was there stays.
    """
    text = json.dumps(dict(header), sort_keys=True, allow_nan=False)
    buffer, first = io.BytesIO(), {HEADER: np.frombuffer(text.encode(), dtype=np.uint8)}
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in (first | dict(arrays)).items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
            with archive.open(entry, "w", force_zip64=True) as member:
                npy.write_array(member, np.asarray(array, order="C"), allow_pickle=False)
    try:
        write_bytes(Path(path), buffer.getvalue())
    except OSError as error:
        raise FileError(path, f"cannot write the {what}: {error.strerror}") from error


def load_arrays(
    path: str | os.PathLike[str], what: str, version: int
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Header and arrays of a file of format ``version``.

    Raises:
        FileError: the file is missing, damaged, or of another format.
    """
    try:
        arrays = _read_arrays(path)
    except FileNotFoundError:
        raise FileError(path, f"no such file; saved {what} were expected") from None
    except (OSError, ValueError, EOFError, OverflowError, MemoryError, *_ZIP) as error:
        raise FileError(path, f"not a readable {what} file ({error})") from error
    if HEADER not in arrays:
        raise FileError(path, f"must hold the entry {HEADER!r} of a {what} file, got none")
    try:
        header = dict(json.loads(arrays.pop(HEADER).tobytes().decode()))
        written = header["format"]
        header["meta"] = dict(header["meta"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(
            path, f"its entry {HEADER!r} is not that of a {what} file ({error})"
        ) from error
    check_values(path, header)
    if written != version:
        raise FileError(path, f"format must be {version}, got {written!r}; measure the model again")
    return header, arrays


def _read_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise ValueError(f"{entry.filename} must be stored as it is, not packed or locked")
            with archive.open(entry) as member:
                arrays[entry.filename.removesuffix(".npy")] = npy.read_array(
                    member, allow_pickle=False
                )
    return arrays
