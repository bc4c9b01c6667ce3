"""The errors floe raises beside ValueError and TypeError, and how messages quote what came.

Each names the thing, the rule and what came. No message shows a password or walks a large value.
"""

from __future__ import annotations

import os
import re
from typing import Any

_LONGEST = 1000  # characters of a message of floe's own errors
_URL = re.compile(r"(\w://)(\S*)")
_WHOLE_URL = re.compile(r"(\w://)(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$\{\w+\}")  # says where a password is, not what
_KEYED = re.compile(
    r"([?&;][\w.-]{0,40}(?:pass|pwd|token|secret|key|sig)[\w.-]{0,40}="
    r"|\b(?:password|passwd|pwd)\s*[=:]\s*|\bbearer\s+)[^\s&;'\",]+",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\b(?:(?:hf_|gh[pousr]_|glpat-|sk-)[A-Za-z0-9]{20,}|github_pat_\w{20,})")


class FileError(ValueError):
    """A file is missing, unreadable, damaged or of another format. ``path`` says which."""

    def __init__(self, path: str | os.PathLike[str], message: str) -> None:
        self.path = os.fspath(path)
        super().__init__(one_line(f"{self.path}: {message}"))


class DataError(ValueError):
    """A data set breaks a rule. ``source`` says where it came from, ``row`` which row (0-based)."""

    def __init__(self, source: str, message: str, row: int | None = None) -> None:
        self.source = source
        self.row = row
        place = source if row is None else f"{source}, row {row}"
        super().__init__(one_line(f"{place}: {message}"))


class SearchError(RuntimeError):
    """A search cannot go on for a reason outside its arguments; finished trials are kept."""


def require(fits: bool, rule: str, value: object, kind: type[Exception] = ValueError) -> None:
    """Raise ``kind`` with the rule, "what must be what", and the value, unless it fits."""
    if not fits:
        raise kind(f"{rule}, got {value!r}")


def require_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """TypeError for what is no int, ValueError for one out of bounds; both ends are included."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    limit = f"at least {least}" if most is None else f"in [{least}, {most}]"
    require(least <= value and (most is None or value <= most), f"{name} must be {limit}", value)


def require_all(good: Any, name: str, rule: str, values: Any) -> None:
    """ValueError that names the first entry of the array ``values`` where ``good`` is False."""
    if not good.all():
        place = tuple(int(axis[0]) for axis in (~good).nonzero())
        raise ValueError(f"{name}{list(place)} must be {rule}, got {values[place]}")


def one_line(text: object, longest: int = _LONGEST) -> str:
    """What an error says, on one line of at most ``longest`` characters, without secrets."""
    words = str(text).partition("\nException raised from ")[0]  # torch adds its C++ frames
    words = words if len(words) <= 4 * longest else words[: 4 * longest]
    line = " ".join(hide_secrets(words).split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def shown(value: object) -> str:
    """``value`` as a message quotes it: short whatever its size, and no part of a URL."""
    if isinstance(value, str):
        head, scheme, _ = value[:2000].partition("://")
        text = head + scheme if scheme else hide_secrets(head)
        return repr(text) if text == value and len(text) <= 60 else repr(text[:57] + "...")
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, list | tuple | dict | set) and len(value) == 0:
        return repr(value)
    if isinstance(value, list | tuple) and len(value) <= 8:
        plain = all(v is None or isinstance(v, bool | int | float | str) for v in value)
        text = f"[{', '.join(map(shown, value))}]" if plain else ""
        if 0 < len(text) <= 60:
            return text
    count = f" of {len(value)}" if isinstance(value, list | tuple | dict | set) else ""
    return f"a {type(value).__name__}{count}"


def hide_secrets(text: str, url: bool = False) -> str:
    """``text`` with the passwords and tokens of its URLs as ``***``.

    With ``url`` the text is one URL, whose password may hold spaces.
    """
    text = (_WHOLE_URL if url else _URL).sub(_without_password, text)
    return _TOKEN.sub("***", _KEYED.sub(r"\1***", text))


def _without_password(url: re.Match[str]) -> str:
    scheme, rest = url.groups()
    before, at, host = rest.rpartition("@")  # a password may hold an @, a host cannot
    user, colon, password = before.partition(":")
    if not at or (not colon and len(before) < 16):  # a name alone; longer, it is a token
        return str(url.group())
    if _VARIABLE.fullmatch(password):
        return str(url.group())
    return f"{scheme}{user + colon if colon else ''}***@{host}"


class CheckError(ValueError):
    """Several things a run needs are wrong, each an error of its own in ``problems``."""

    def __init__(self, problems: list[Exception]) -> None:
        self.problems = problems
        listed = "".join(f"\n  {error}" for error in problems)
        super().__init__(f"{len(problems)} problems were found before the first stage:{listed}")
