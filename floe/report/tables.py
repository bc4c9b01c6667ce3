"""What a page is made of: sections, pictures, tables; and how numbers read in text."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from floe.artifacts.results import Interval
from floe.report.theme import Draw

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Numbers of a picture; ``name`` is the CSV file's stem, bars part the names in ``header``."""

    name: str
    header: str
    rows: Sequence[Sequence[Cell]]

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return self.header.split(" | ")

    def csv(self) -> str:
        """RFC 4180 text. Floats are written in full, so reading them back gives the same number."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self.rows:
            writer.writerow([repr(cell) if isinstance(cell, float) else cell for cell in row])
        return buffer.getvalue()


@dataclass(frozen=True)
class Picture:
    """A figure: what it is called, shows and cannot show, its numbers, and how it is drawn."""

    key: str
    title: str
    alt: str
    caption: str
    tables: Sequence[Table]
    draw: Draw


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with its pictures; ``missing`` says what was not run where there are none.

    ``verdicts`` are sentences, each with its kind; ``lacking`` pairs of a name and what it needs.
    """

    key: str
    title: str
    lead: str = ""
    pictures: Sequence[Picture] = ()
    missing: str = ""
    verdicts: Sequence[tuple[str, str]] = ()
    lacking: Sequence[tuple[str, str]] = ()


def or_dash(number: Callable[[float], str], value: float | None) -> str:
    """A number as text, a dash for None."""
    return "–" if value is None else number(value)


def significant(value: float, digits: int = 3) -> str:
    """A number to some significant digits, plain where that is short: 0.0123, 1.2e-07, 45,100."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -3 <= exponent < 6:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}"
    return f"{value:.{digits - 1}e}"


def plain(value: float) -> str:
    """A number to six significant digits, without padding zeros."""
    return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.6g}"


def decimals(value: float, places: int = 3) -> str:
    """A number with a fixed count of decimals, so that columns line up."""
    return f"{value:.{places}f}"


def percent(value: float, places: int = 1) -> str:
    """A fraction as percent."""
    return f"{100 * value:.{places}f} %"


def compact(value: float) -> str:
    """A large count in short: 1.19 M."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def size(value: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def seconds(value: float) -> str:
    """Seconds with milliseconds, so that a column of step times lines up."""
    return f"{value:,.3f} s"


def duration(seconds: float) -> str:
    """Seconds as 45 ms, 8.2 s, 3 min 05 s or 2 h 10 min."""
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


def as_float(value: float | None) -> float | None:
    """A number as tables write it, also where it is whole."""
    return None if value is None else float(value)


def flat(interval: Interval | None) -> tuple[Cell, ...]:
    """A value, its ends and its number of rows, as cells."""
    if interval is None:
        return (None,) * 4
    return (interval.value, *(interval.ends or (None, None)), interval.rows)


def spread(interval: Interval | None, number: Callable[[float], str]) -> str:
    """The interval behind a value as [low, high], or a word where there is none."""
    if interval is None:
        return ""
    return f"[{', '.join(map(number, interval.ends))}]" if interval.ends else "no interval"


def overlaps(first: Interval | None, second: Interval | None) -> bool | None:
    """Whether two intervals share a point; None where either is missing."""
    if first is None or second is None or first.ends is None or second.ends is None:
        return None
    return first.ends[0] <= second.ends[1] and second.ends[0] <= first.ends[1]
