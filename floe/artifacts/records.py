"""What a run says of itself: its data, its machine, its finished stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from floe.artifacts.schema import IF_SET, Flag, Number, Text, Whole

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


FORMAT = 2
"""Of records of work. 2: the inputs by the names of their settings."""


@dataclass(frozen=True, kw_only=True)
class WorkRecord:
    """STAGE.work/.inputs.json: what begun work is made from.

    ``inputs`` decide the result, ``notes`` are settings behind them; a record of another format
    may hold anything in their place. ``copying``: the finished result is being copied, to go on
    from it.
    """

    format: Whole = 1
    inputs: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    copying: Flag | None = field(default=None, metadata=IF_SET)


@dataclass(frozen=True)
class StageFile:
    """What tells whether a file of a stage's result is whole."""

    size: Whole
    sha256: Text


@dataclass(frozen=True, kw_only=True)
class StageRecord(WorkRecord):
    """STAGE/DONE.json: what a finished stage was made from, its files, its time."""

    stage: Text = ""
    inputs_hash: Text = ""
    outputs: dict[Text, StageFile] = field(default_factory=dict)
    seconds: Number | None = None
    finished: Text = ""
