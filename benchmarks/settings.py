"""The options of every benchmark: a dataclass says them once, and the command line fills it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any


def option(
    default: Any = dataclasses.MISSING, help: str = "", kind: Any = None, **more: Any
) -> Any:
    """A dataclass field that is the option ``--its-name``; required without a default.

    Args:
        kind: makes the value of the text; from the default's type where that is a number or text.
        more: as `add_argument` takes it.
    """
    if isinstance(default, bool):
        more["action"] = "store_true"
    else:
        more["type"] = kind or (type(default) if isinstance(default, int | float) else str)
    return dataclasses.field(default=default, metadata={"help": help, **more})


class Command:
    """A command line that fills the dataclasses it is made for."""

    def __init__(self, name: str, description: str | None, *kinds: Any) -> None:
        self.kinds = kinds
        self._parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for field in (f for kind in kinds for f in dataclasses.fields(kind) if f.metadata):
            given = field.default is not dataclasses.MISSING
            more = {"default": field.default} if given else {"required": True}
            self._parser.add_argument(f"--{field.name.replace('_', '-')}", **field.metadata, **more)

    def parse(self, arguments: list[str] | None) -> Any:
        """The dataclass, or a tuple of several; exits with usage for what cannot be."""
        given = vars(self._parser.parse_args(arguments))
        with self.refusing():
            filled = tuple(
                kind(**{f.name: given[f.name] for f in dataclasses.fields(kind) if f.metadata})
                for kind in self.kinds
            )
        return filled[0] if len(filled) == 1 else filled

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Exit with usage for a TypeError or ValueError within."""
        try:
            yield
        except (TypeError, ValueError) as error:
            self._parser.error(str(error))


def several(kind: Callable[[str], Any] = str, separator: str = ",") -> Callable[[str], Any]:
    """Kind of an option with several values."""
    return lambda text: tuple(kind(part) for part in text.split(separator))


def count(text: str) -> int:
    """Kind of an option that is a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def one_of(known: Collection[str]) -> Callable[[str], str]:
    """Kind of an option with given values, where `several` makes a list of them."""

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {text!r}")
        return text

    return parse


def shape(names: str) -> Callable[[str], tuple[int, ...]]:
    """Kind of an option of sizes joined by x, as many as in ``names``."""

    def parse(text: str) -> tuple[int, ...]:
        parts = text.split("x")
        if len(parts) != names.count("x") + 1 or not all(p.isdecimal() and int(p) for p in parts):
            raise argparse.ArgumentTypeError(
                f"a shape must be {names} with sizes >= 1, got {text!r}"
            )
        return tuple(int(part) for part in parts)

    return parse
