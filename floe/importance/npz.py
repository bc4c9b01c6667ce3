"""Named arrays with a header in one npz file: whole or not at all, no pickle, equal bytes."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from floe.atomic import write_bytes
from floe.errors import FileError
from floe.runs import check_values

HEADER = "meta"
_ZIP = (zipfile.BadZipFile, NotImplementedError)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can hold: equal content gives equal bytes


def save(
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
                npy.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
    try:
        write_bytes(Path(path), buffer.getvalue())
    except OSError as error:
        raise FileError(path, f"cannot write the {what}: {error.strerror}") from error


def load(
    path: str | os.PathLike[str], what: str, version: int
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Header and arrays of a file of format ``version``.

    Raises:
        FileError: the file is missing, damaged, or of another format.
    """
    try:
        arrays = _read(path)
    except FileNotFoundError:
        raise FileError(path, f"no such file; saved {what} were expected") from None
    except (OSError, ValueError, EOFError, OverflowError, MemoryError, *_ZIP) as error:
        raise FileError(path, f"not a readable {what} file ({error})") from error
    if HEADER not in arrays:
        raise FileError(path, f"must hold the entry {HEADER!r} of a {what} file, got none")
    try:
        header = dict(json.loads(arrays.pop(HEADER).tobytes().decode()))
        found = header["format"]
        header["meta"] = dict(header["meta"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(
            path, f"its entry {HEADER!r} is not that of a {what} file ({error})"
        ) from error
    check_values(path, header)
    if found != version:
        raise FileError(path, f"format must be {version}, got {found!r}; measure the model again")
    return header, arrays


def _read(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
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
