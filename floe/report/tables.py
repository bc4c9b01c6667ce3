"""Tables beside the pictures, and how numbers read in text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

from floe.artifacts.results import Interval
from floe.report.theme import Draw

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Numbers of a picture under column names; ``name`` is the CSV file's stem."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def csv(self) -> str:
        """RFC 4180 text. Floats are written in full, so reading them back gives the same number."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            writer.writerow(
                ["" if c is None else repr(c) if isinstance(c, float) else c for c in row]
            )
        return buffer.getvalue()


@dataclass(frozen=True)
class Picture:
    """A figure: what it is called, shows and cannot show, its numbers, and how it is drawn."""

    key: str
    title: str
    alt: str
    caption: str
    tables: tuple[Table, ...]
    draw: Draw


def significant(value: float | None, digits: int = 3) -> str:
    """A number to some significant digits, plain where that is short: 0.0123, 1.2e-07, 45,100."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -3 <= exponent < 6:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}"
    return f"{value:.{digits - 1}e}"


def decimals(value: float | None, places: int = 3) -> str:
    """A number with a fixed count of decimals, so that columns line up."""
    if value is None:
        return "–"
    return f"{value:.{places}f}" if math.isfinite(value) else str(value)


def percent(value: float | None, places: int = 1) -> str:
    """A fraction as percent."""
    return "–" if value is None else f"{100 * value:.{places}f} %"


def count(value: int | None) -> str:
    """A whole number with thousands separated."""
    return "–" if value is None else f"{value:,}"


def compact(value: float | None) -> str:
    """A large count in short: 1.19 M."""
    if value is None:
        return "–"
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def size(value: float | None) -> str:
    """Bytes in GiB or MiB."""
    if value is None:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def duration(seconds: float | None) -> str:
    """Seconds as 45 ms, 8.2 s, 3 min 05 s or 2 h 10 min."""
    if seconds is None:
        return "–"
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def decimal(value: float | None) -> float | None:
    """A number as tables write it, also where it is whole."""
    return None if value is None else float(value)


def spread(interval: Interval | None, number: Callable[[float], str]) -> str:
    """The interval behind a value as [low, high], or a word where there is none."""
    if interval is None:
        return ""
    if interval.ends is None:
        return "no interval"
    return f"[{', '.join(map(number, interval.ends))}]"


def overlaps(one: Interval | None, other: Interval | None) -> bool | None:
    """Whether two intervals share a point; None where either is missing."""
    if one is None or other is None or one.ends is None or other.ends is None:
        return None
    return one.ends[0] <= other.ends[1] and other.ends[0] <= one.ends[1]


def plain(value: float) -> str:
    """A number to six significant digits, without padding zeros."""
    return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.6g}"


def seconds(value: float | None) -> str:
    """Seconds with milliseconds, so that a column of step times lines up."""
    return "–" if value is None else f"{value:,.3f} s"


def plural(number: int, noun: str) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def label(text: str, length: int = 30) -> str:
    """A name made safe for a figure: printable characters only, shortened in the middle."""
    clean = "".join(c if c.isprintable() else "\ufffd" for c in text)
    if len(clean) <= length:
        return clean
    keep = length - 1
    return clean[: keep - keep // 3] + "…" + clean[len(clean) - keep // 3 :]
