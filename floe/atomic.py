"""Files and folders that appear whole or not at all, on disk before they are seen."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAGING = ".floe-"  # how names begin that are gone when their writer is done
CARD = "README.md"


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
    _flush_all(new)
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


def _flush_all(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            flush(file)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
