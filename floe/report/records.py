"""Typed access to JSON artifacts: a wrong or missing value is a FileError naming file and key."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from floe import storage
from floe.errors import FileError, shown
from floe.types import Floats


class Record:
    """One JSON object of an artifact; ``place`` is its dotted position inside ``path``."""

    def __init__(self, data: dict[str, Any], path: Path, place: str = "") -> None:
        self.data = data
        self.path = path
        self.place = place

    def name(self, key: str) -> str:
        """The dotted name of ``key``, as error messages give it."""
        return f"{self.place}.{key}" if self.place else key

    def fail(self, key: str, rule: str) -> FileError:
        """The error for a value that breaks ``rule``."""
        if key not in self.data:
            return FileError(self.path, f"{self.name(key)} is missing; it must be {rule}")
        return FileError(self.path, f"{self.name(key)} must be {rule}, got {shown(self.data[key])}")

    def has(self, key: str) -> bool:
        """Whether ``key`` is there with a value other than null."""
        return self.data.get(key) is not None

    def number(self, key: str) -> float:
        """A number; NaN and infinities pass, because a diverged run is a result too."""
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, "a number")
        return float(value)

    def integer(self, key: str) -> int:
        """A whole number."""
        value = self.data.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, "a whole number")
        return value

    def maybe_number(self, key: str) -> float | None:
        """A number, or None where the key is absent or null."""
        return self.number(key) if self.has(key) else None

    def maybe_integer(self, key: str) -> int | None:
        """A whole number, or None where the key is absent or null."""
        return self.integer(key) if self.has(key) else None

    def text(self, key: str, default: str | None = None) -> str:
        """A string; ``default`` stands in for an absent one."""
        if default is not None and not self.has(key):
            return default
        value = self.data.get(key)
        if not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.data.get(key)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def numbers(self, key: str, length: int | None = None) -> Floats:
        """A list of numbers, ``[length]`` float64."""
        value = self.data.get(key)
        rule = "a list of numbers" if length is None else f"a list of {length} numbers"
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise self.fail(key, rule)
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
            raise self.fail(key, rule)
        return np.asarray(value, dtype=np.float64)

    def layers(self, key: str, count: int, whole: bool = False) -> tuple[int, ...]:
        """Distinct layer indices below ``count``; ``whole`` asks for each of them exactly once."""
        value = self.data.get(key)
        rule = f"{'a permutation of the' if whole else 'distinct'} layer indices in [0, {count})"
        if not isinstance(value, list) or any(type(v) is not int for v in value):
            raise self.fail(key, rule)
        if any(not 0 <= v < count for v in value) or len(set(value)) != len(value):
            raise self.fail(key, rule)
        if whole and len(value) != count:
            raise self.fail(key, rule)
        return tuple(value)

    def curve(self, key: str) -> Floats:
        """[step, loss] pairs as ``[n, 2]`` float64; absent means empty, a null loss is NaN."""
        value = self.data.get(key, [])
        rule = "a list of [step, loss] pairs"
        if not isinstance(value, list):
            raise self.fail(key, rule)
        points = []
        for pair in value:
            if not isinstance(pair, list) or len(pair) != 2:
                raise self.fail(key, rule)
            step, loss = (math.nan if v is None else v for v in pair)
            if any(isinstance(v, bool) or not isinstance(v, int | float) for v in (step, loss)):
                raise self.fail(key, rule)
            points.append((float(step), float(loss)))
        return np.asarray(points, dtype=np.float64).reshape(-1, 2)

    def record(self, key: str) -> Record:
        """A nested object."""
        value = self.data.get(key)
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return Record(value, self.path, self.name(key))

    def records(self, key: str) -> list[Record]:
        """A list of objects; absent means empty."""
        value = self.data.get(key, [])
        if not isinstance(value, list) or any(not isinstance(v, dict) for v in value):
            raise self.fail(key, "a list of objects")
        return [Record(v, self.path, f"{self.name(key)}[{i}]") for i, v in enumerate(value)]

    def items(self) -> Iterator[tuple[str, Record]]:
        """The values of this object, each itself an object, in order of their keys."""
        for key in sorted(self.data):
            yield key, self.record(key)


def read_text(path: Path) -> str:
    """The UTF-8 text of ``path``; FileError where it is missing or unreadable."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(path, "is missing; the report needs it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, f"cannot be read: {error}") from error


def read_json(path: Path) -> Record:
    """The JSON object in ``path``; see :func:`floe.storage.read_json`."""
    return Record(storage.read_json(path), path)
