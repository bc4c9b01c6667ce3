"""The errors floe raises beside ValueError and TypeError.

Each names the thing, the rule and what came.
"""

from __future__ import annotations

import os


class FileError(ValueError):
    """A file is missing, unreadable, damaged or of another format. ``path`` says which."""

    def __init__(self, path: str | os.PathLike[str], message: str) -> None:
        self.path = os.fspath(path)
        super().__init__(f"{self.path}: {message}")


class DataError(ValueError):
    """A data set breaks a rule. ``source`` says where it came from, ``row`` which row (0-based)."""

    def __init__(self, source: str, message: str, row: int | None = None) -> None:
        self.source = source
        self.row = row
        place = source if row is None else f"{source}, row {row}"
        super().__init__(f"{place}: {message}")
