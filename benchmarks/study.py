"""What the benchmarks that train share: a folder of runs made with the same settings."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from floe.errors import FileError
from floe.storage import read_json

Settings = TypeVar("Settings")
FILE = "settings.json"


def record_of(settings: Any, format_number: int) -> dict[str, Any]:
    """A settings dataclass as JSON reads it back."""
    plain = {"format": format_number, **dataclasses.asdict(settings)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def check_same(folder: Path, record: dict[str, Any], what: str) -> None:
    """Nothing, if the folder has no settings yet.

    Raises:
        FileError: it holds ``what`` (runs, points) made with other settings; names which.
    """
    file = folder / FILE
    if not file.exists() or (found := read_json(file)) == record:
        return
    odd = sorted(k for k in found.keys() | record.keys() if found.get(k) != record.get(k))
    raise FileError(file, f"is of {what} with other {', '.join(odd)}; use another --output")


def settings_from(options: argparse.Namespace, kind: Callable[..., Settings]) -> Settings:
    """The settings that were given on the command line; the others are the dataclass's own."""
    names = {field.name for field in dataclasses.fields(kind)} & vars(options).keys()  # type: ignore[arg-type]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return kind(**given)


def numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """For argparse: numbers joined by commas."""

    def numbers(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    return numbers
