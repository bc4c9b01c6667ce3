"""audit/audit.json as values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from floe.report.records import Record
from floe.types import Floats

FORMAT = 1


@dataclass(frozen=True)
class Resampled:
    """A policy under the bootstrap; arrays [L], places from 1 for the first to choose."""

    name: str
    low: Floats
    high: Floats
    probability: Floats
    same: float
    kept: float


@dataclass(frozen=True)
class Part:
    """A policy on fewer rows: mean, low and high shared layers by share of the rows; of halves."""

    name: str
    shares: Floats
    rows: Floats
    overlap: tuple[tuple[float, float, float], ...]
    halves: tuple[float, float, float]


@dataclass(frozen=True)
class Budget:
    """A preset's shared layers with itself at the run's budget, by budget."""

    name: str
    budgets: Floats
    overlap: Floats


@dataclass(frozen=True)
class Audited:
    """What the report shows of an audit; spearman [n, n] with NaN where undefined.

    ``selection`` is the hash of what the audited select stage read.
    """

    selection: str
    count: int
    rows: int
    draws: int
    policy: str
    layers: tuple[int, ...]
    names: tuple[str, ...]
    spearman: Floats
    overlap: Floats
    expected_overlap: float
    resampled: tuple[Resampled, ...]
    parts: tuple[Part, ...]
    budgets: tuple[Budget, ...]
    lacking: tuple[tuple[str, str], ...]
    verdicts: tuple[tuple[str, str], ...]


def audited(data: Record, layers: int) -> Audited:
    """The audit of a run of so many layers.

    Raises:
        FileError: another format, or a missing or wrong value; names file and key.
    """
    if data.integer("format") != FORMAT:
        raise data.fail("format", f"{FORMAT}; audit again")
    if data.integer("layers") != layers:
        raise data.fail("layers", f"{layers} as in the scores; audit again")
    agreement = data.record("agreement")
    policies = {one.text("name"): one for one in data.records("policies")}
    names = _names(agreement)
    policy = data.text("policy")
    if policy not in policies or set(names) != set(policies):
        raise data.fail("policy", "one of the policies that agreement names")
    return Audited(
        selection=data.text("selection"),
        count=data.integer("count"),
        rows=data.integer("rows"),
        draws=data.integer("draws"),
        policy=policy,
        layers=policies[policy].layers("layers", layers),
        names=names,
        spearman=_matrix(agreement, "spearman", len(names)),
        overlap=_matrix(agreement, "overlap", len(names)),
        expected_overlap=agreement.number("expected_overlap"),
        resampled=tuple(_resampled(one, layers) for one in data.records("bootstrap")),
        parts=tuple(_part(one) for one in data.records("subsets")),
        budgets=tuple(_budget(one) for one in data.records("budgets")),
        lacking=_lacking(data),
        verdicts=_verdicts(data.record("verdicts")),
    )


def _names(data: Record) -> tuple[str, ...]:
    value = data.data.get("names")
    if not isinstance(value, list) or any(not isinstance(name, str) for name in value):
        raise data.fail("names", "a list of strings")
    if not value or len(set(value)) != len(value):
        raise data.fail("names", "distinct names")
    return tuple(value)


def _matrix(data: Record, key: str, size: int) -> Floats:
    """[size, size] with NaN for null."""
    value = data.data.get(key)
    rule = f"a {size} by {size} matrix of numbers or null"
    if not isinstance(value, list) or len(value) != size:
        raise data.fail(key, rule)
    for row in value:
        if not isinstance(row, list) or len(row) != size:
            raise data.fail(key, rule)
        if any(v is not None and (isinstance(v, bool) or not isinstance(v, int | float))
               for v in row):  # fmt: skip
            raise data.fail(key, rule)
    return np.array(value, dtype=np.float64)


def _resampled(data: Record, layers: int) -> Resampled:
    return Resampled(
        name=data.text("name"),
        low=data.numbers("rank_low", layers),
        high=data.numbers("rank_high", layers),
        probability=data.numbers("probability", layers),
        same=data.number("same"),
        kept=data.number("kept"),
    )


def _part(data: Record) -> Part:
    shares = data.numbers("shares")
    against = data.records("against_all")
    if len(against) != len(shares):
        raise data.fail("against_all", f"a list of {len(shares)} objects")
    return Part(
        name=data.text("name"),
        shares=shares,
        rows=data.numbers("rows", len(shares)),
        overlap=tuple(_spread(one.record("overlap")) for one in against),
        halves=_spread(data.record("halves").record("overlap")),
    )


def _spread(data: Record) -> tuple[float, float, float]:
    return data.number("mean"), data.number("low"), data.number("high")


def _budget(data: Record) -> Budget:
    budgets = data.numbers("budgets")
    return Budget(data.text("name"), budgets, data.numbers("overlap", len(budgets)))


def _lacking(data: Record) -> tuple[tuple[str, str], ...]:
    needs: list[tuple[str, str]] = []
    for key in ("lacking", "not_resampled"):
        record = data.record(key)
        needs += [(name, record.text(name)) for name in sorted(record.data)]
    return tuple(needs)


def _verdicts(data: Record) -> tuple[tuple[str, str], ...]:
    found = []
    for kind in ("solid", "open", "note"):
        sentences = data.data.get(kind)
        if not isinstance(sentences, list) or any(not isinstance(one, str) for one in sentences):
            raise data.fail(kind, "a list of strings")
        found += [(kind, sentence) for sentence in sentences]
    return tuple(found)
