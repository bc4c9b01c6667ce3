"""The database of a study: made whole, waited for while others hold it, never quoted with secrets.

Optuna's errors and the drivers' may repeat a URL with its password, so none of them is passed on
for another database than SQLite, not even as the context of what is raised.
"""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from floe.errors import SearchError, hide_secrets, one_line
from floe.storage import write_bytes

PATIENCE = 60.0
"""Seconds another program may hold a SQLite database before a search gives up."""
_BETWEEN = 1.0  # seconds SQLite itself waits at a time
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_TROUBLE = (SQLAlchemyError, StorageInternalError, LookupError)  # LookupError: a record is gone
_UNREADABLE = (*_TROUBLE, ValueError, TypeError)  # what damaged records come to
# ValueError: no URL; RuntimeError: tables of another optuna
_NOT_OPENED = (*_TROUBLE, ValueError, ImportError, RuntimeError, OSError)
Say = Callable[[str], None]


def open_storage(place: str | Path, say: Say) -> BaseStorage:
    """Optuna's storage at a database URL, or in the SQLite file of this path.

    Each of its calls waits while another program holds the SQLite file, after ``say`` was told.

    Raises:
        ValueError: if it cannot be opened.
        SearchError: if another program holds it for too long; and later, by any call, if it fails.
    """
    storage: BaseStorage = _patient(_connect, place, say, _NOT_OPENED, opening=True)(place)
    for name in BaseStorage.__abstractmethods__:
        kinds = _UNREADABLE if name.startswith("get_") else _TROUBLE
        setattr(storage, name, _patient(getattr(storage, name), place, say, kinds))
    return storage


def mask(place: str | Path) -> str:
    """A database's URL without its password, or a word in place of what cannot be parsed."""
    if isinstance(place, Path):
        return f"sqlite:///{place}"
    try:
        parsed = make_url(place)
    except (SQLAlchemyError, ValueError):
        return "an unreadable URL"
    nested = {name: "hidden" for name, value in parsed.query.items() if "=" in str(value)}
    if nested:  # a whole connection string, as odbc_connect takes
        place = parsed.update_query_dict(nested).render_as_string(hide_password=False)
    return hide_secrets(place, url=True)


def _connect(place: str | Path) -> BaseStorage:
    if isinstance(place, Path):
        _create_whole(place)
        return optuna.storages.get_storage(_in_file(place))
    parsed = make_url(place)
    engine: dict[str, Any] = {}
    if parsed.drivername.startswith("sqlite"):
        engine["connect_args"] = {"timeout": _BETWEEN}
        if parsed.database and not parsed.database.startswith((":", "file:")):
            engine["poolclass"] = NullPool
            _create_whole(Path(parsed.database))
    template = place.replace("{", "{{").replace("}", "}}")  # optuna fills in what braces name
    return optuna.storages.get_storage(optuna.storages.RDBStorage(template, engine))


def _in_file(file: Path) -> optuna.storages.RDBStorage:
    """SQLite in this file, opened by its path: in a URL ``%``, ``?`` and others mean something."""
    connect = partial(sqlite3.connect, file.absolute(), _BETWEEN, check_same_thread=False)
    engine = {"creator": connect, "poolclass": NullPool}  # no pool: whatever rests is in the file
    return optuna.storages.RDBStorage("sqlite:///study.db", engine)


def _create_whole(file: Path) -> None:
    """Make a SQLite file that is not there yet, or is empty, with every table and index.

    Optuna creates them one by one. Killed in between, the file would keep its tables without the
    index that makes a study's name unique, and every later start would add one more study.
    """
    with FileLock(f"{file}.lock", timeout=PATIENCE):
        if file.exists() and (file.stat().st_size or not file.is_file()):
            return
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "study.db"
            _in_file(whole).engine.dispose()
            write_bytes(file, whole.read_bytes())


def _patient(
    call: Callable[..., Any],
    place: str | Path,
    say: Say,
    kinds: tuple[type[Exception], ...],
    opening: bool = False,
) -> Callable[..., Any]:
    """``call``, tried again while the SQLite file is busy (optuna has rolled back by then)."""

    def patient(*arguments: Any, **keywords: Any) -> Any:
        began, told = time.monotonic(), False
        while True:
            try:
                return call(*arguments, **keywords)
            except kinds as error:
                trouble: Exception = error
            if not _is_busy(trouble) or time.monotonic() - began > PATIENCE:
                break
            if not told:
                say(f"waiting for {mask(place)}: another program has locked it")
            told = True
            time.sleep(0.1)
        # raised out here, it does not carry the driver's error along as its context
        raise _explained(trouble, mask(place), opening) from None

    return patient


def _explained(error: Exception, place: str, opening: bool) -> Exception:
    """What to raise instead of an error of optuna's or the driver's."""
    words = _words(error)
    if _is_busy(error):
        return SearchError(
            f"the search's database {place} has been locked by another program for "
            f"{PATIENCE:.0f} s ({words}); end that program, then search again: finished trials "
            "are kept"
        )
    if opening:
        hint = "; move a damaged file away to search anew" if place.startswith("sqlite") else ""
        return ValueError(f"storage must be a database that opens, got {place} ({words}){hint}")
    return SearchError(
        f"the search's database {place} failed ({words}); its finished trials are kept: make it "
        "work again and search once more"
    )


def _sqlite_error(error: Exception) -> sqlite3.Error | None:
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    origin = getattr(cause, "orig", cause)
    return origin if isinstance(origin, sqlite3.Error) else None


def _is_busy(error: Exception) -> bool:
    code = getattr(_sqlite_error(error), "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _BUSY


def _words(error: Exception) -> str:
    """What was said where it cannot hold a password, else the kind of error alone."""
    spoken = _sqlite_error(error) or error
    if isinstance(spoken, (sqlite3.Error, OSError, RuntimeError)):  # optuna's asks for an upgrade
        return one_line(f"{type(spoken).__name__}: {spoken}", 300)
    return type(error.__cause__ or error).__name__
