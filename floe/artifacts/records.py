"""What a run says of itself: its data, its machine, its finished stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from floe.artifacts.schema import Number, Text, Whole

Environment = dict[str, Any]  # env.json: machine and versions, by name


@dataclass(frozen=True)
class LostRows:
    """How many rows, and the numbers of the first of them."""

    rows: Whole
    first: list[Whole]


@dataclass(frozen=True, kw_only=True)
class DataPart:
    """A part of the data: rows given and kept, tokens, the longest row; what was dropped or cut.

    ``lost`` says that in words, empty if nothing was; ``summary`` says all of it.
    """

    summary: Text
    lost: Text = ""
    rows: Whole = 0
    kept: Whole = 0
    tokens: Whole = 0
    longest: Whole = 0
    dropped: dict[Text, LostRows] = field(default_factory=dict)
    cut: LostRows | None = None


@dataclass(frozen=True)
class DataAccount:
    """data.json: which rows a run uses, and which lost something, by setting of the data."""

    parts: dict[Text, DataPart]


@dataclass(frozen=True)
class StageFile:
    """What tells whether a file of a stage's result is whole."""

    size: Whole
    sha256: Text


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """DONE.json: what a finished stage was made from and what it made, with its time.

    ``inputs`` decide the result, ``notes`` are settings behind them. Of other formats the number
    alone is known.
    """

    format: Whole = 1
    stage: Text = ""
    inputs_hash: Text = ""
    inputs: Any = field(default_factory=dict)
    notes: Any = field(default_factory=dict)
    outputs: dict[Text, StageFile] = field(default_factory=dict)
    seconds: Number | None = None
    finished: Text = ""
