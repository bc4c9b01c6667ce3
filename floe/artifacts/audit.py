"""audit/audit.json: how far a choice of layers reproduces, and who agrees with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, ValidationInfo
from typing_extensions import TypedDict  # of Python 3.12, as pydantic needs it

from floe.artifacts.results import Router
from floe.artifacts.schema import (
    LayerNumbers,
    Layers,
    Number,
    Ranking,
    Text,
    Whole,
    as_long_as,
    broken,
    document,
    parse,
    square,
)
from floe.errors import FileError, shown
from floe.storage import read_json, write_json


@dataclass(frozen=True)
class PolicyResult:
    """One policy's answer.

    Attributes:
        name: a policy, or "masks/<preset>".
        scores: [L]; higher = chosen sooner.
        ranking: all layers, first to choose in front. layers: the K chosen, ascending.
        tied: how many layers share the score at which the choice ends, if it splits them: which of
            them are in is decided by index alone. L if all scores are equal, 0 if nothing is tied.
    """

    name: Text
    scores: LayerNumbers
    ranking: Ranking
    layers: Layers
    tied: Whole

    @property
    def constant(self) -> bool:
        """Whether the scores order nothing."""
        return len(set(self.scores)) == 1


def _check_names(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value or len(set(value)) != len(value):
        raise broken("distinct names")
    return value


@dataclass(frozen=True)
class Agreement:
    """How far ``names`` agree, pair by pair.

    spearman [n, n]: of the scores; None where one is constant. overlap [n, n]: layers in both
    choices; two random choices share expected_overlap of them on average.
    """

    names: Annotated[tuple[Text, ...], AfterValidator(_check_names)]
    spearman: Annotated[tuple[tuple[Number | None, ...], ...], square("names")]
    overlap: Annotated[tuple[tuple[Whole, ...], ...], square("names")]
    expected_overlap: Number


@dataclass(frozen=True)
class Bootstrap:
    """A policy on rows drawn with replacement.

    Attributes:
        name: the policy.
        rank_low, rank_high: [L], 5 % and 95 % quantiles of a layer's place; 1 = first to choose.
        probability: [L], share of draws that choose the layer.
        same: share of draws whose choice is the whole choice on all rows.
        kept: share of that choice found again, mean over draws.
        spearman: with the scores on all rows, mean over draws; None where they are constant.
    """

    name: Text
    rank_low: LayerNumbers
    rank_high: LayerNumbers
    probability: LayerNumbers
    same: Number
    kept: Number
    spearman: Number | None


@dataclass(frozen=True)
class Spread:
    """Mean, 5 % and 95 % quantile over repetitions; None where no repetition defines a value."""

    mean: Number | None
    low: Number | None
    high: Number | None


@dataclass(frozen=True)
class Likeness:
    """Spearman correlation, and how many layers two choices share, over repetitions."""

    spearman: Spread
    overlap: Spread


@dataclass(frozen=True)
class Subsets:
    """A policy on fewer rows, over random orders of them.

    rows[i] of the rows (shares[i] of them, the first of each order, so that smaller parts lie in
    larger ones) against all rows; halves: the two halves of each order against each other.
    """

    name: Text
    shares: tuple[Number, ...]
    rows: Annotated[tuple[Whole, ...], as_long_as("shares")]
    against_all: Annotated[tuple[Likeness, ...], as_long_as("shares", "objects")]
    halves: Likeness


@dataclass(frozen=True)
class Budgets:
    """A preset at other budgets against the same preset at the run's budget."""

    name: Text
    budgets: tuple[Number, ...]
    spearman: tuple[Number | None, ...]
    overlap: Annotated[tuple[Whole, ...], as_long_as("budgets")]
    layers: tuple[Layers, ...]


@dataclass(frozen=True)
class MaskLoss:
    """What masking the units that preset "global" masks costs, in Fisher information (nats^2).

    With g_i [S] a unit's gradients over the rows: diagonal_loss is the sum of || g_i ||^2 (Eq. 9 of
    the FLoE paper), block_loss the sum over layers, heads and neurons apart, of
    || sum_i g_i ||^2 (Eq. 7 and 8 within these blocks).
    """

    masked: Whole
    diagonal_loss: Number
    block_loss: Number


def _known_comparison(value: Any) -> Any:
    """Audits of earlier versions compared other masks here; that is passed over."""
    return value if isinstance(value, dict) and "diagonal_loss" in value else None


@dataclass(frozen=True)
class Cliff:
    """Losses of arms with several numbers of layers against the largest number, paired by row.

    above_full and error are the mean difference and its standard error. worse: the numbers more
    than two standard errors above. begins: where a cliff begins, coming down; None if nowhere.
    """

    counts: tuple[Whole, ...]
    above_full: tuple[Number, ...]
    error: tuple[Number, ...]
    worse: tuple[Whole, ...]
    begins: Whole | None


class Verdicts(TypedDict):
    """Plain sentences from the numbers of an audit, none of which says that layers are good ones.

    "solid" is what would come out again on other rows of the same kind, "open" what would not or
    was not shown, "note" what holds in any case.
    """

    solid: list[Text]
    open: list[Text]
    note: list[Text]


def _check_policy(value: str, info: ValidationInfo) -> str:
    names = {policy.name for policy in info.data.get("policies", ())}
    agreement = info.data.get("agreement")
    if agreement is not None and (value not in names or set(agreement.names) != names):
        raise broken("one of the policies that agreement names")
    return value


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found. L layers, 0-based; K of them are chosen.

    Attributes:
        layers: L. count: K. seed, budget, score: the options. rows: S per-sample rows, 0 if none
            were kept. draws: of the bootstrap.
        policies: every policy whose inputs are there; lacking: name -> what the others need.
        agreement: of all of them.
        policy: the run's own, which the verdicts are about.
        bootstrap, subsets: of the policies that are sums over rows; not_resampled: name -> what is
            missing of those that could be, with per-sample arrays.
        null: what random orders share with the run's policy.
        budgets: every preset over budgets.
        masks: diagonal against block Fisher information; None without per-sample mask gradients.
        routers: of the adapter that was scored, trained_routers: of the run's final one; empty if
            not measured.
        cliff: None if fewer than two numbers of layers were trained.
        verdicts: "solid", "open" and "note": plain sentences from these numbers.
        selection: of a run, the hash of what its select stage read; tells an old audit from a new.
    """

    FORMAT: ClassVar[int] = 1

    layers: Whole
    count: Whole
    seed: Whole
    budget: Number
    score: Text
    rows: Whole
    draws: Whole
    policies: tuple[PolicyResult, ...]
    agreement: Agreement
    policy: Annotated[Text, AfterValidator(_check_policy)]
    lacking: dict[Text, Text]
    bootstrap: tuple[Bootstrap, ...]
    subsets: tuple[Subsets, ...]
    not_resampled: dict[Text, Text]
    null: Likeness
    budgets: tuple[Budgets, ...]
    masks: Annotated[MaskLoss | None, BeforeValidator(_known_comparison)]
    routers: tuple[Router, ...]
    trained_routers: tuple[Router, ...]
    cliff: Cliff | None
    verdicts: Verdicts
    selection: Text

    @property
    def sentences(self) -> list[tuple[str, str]]:
        """The verdicts, each with its kind."""
        said = self.verdicts
        kinds = (("solid", said["solid"]), ("open", said["open"]), ("note", said["note"]))
        return [(kind, sentence) for kind, sentences in kinds for sentence in sentences]

    def document(self) -> dict[str, Any]:
        """Plain JSON values, with the format's number and what the routers' values mean."""
        plain: dict[str, Any] = document(self) | {"format": self.FORMAT}
        for name in ("routers", "trained_routers"):
            for router, values in zip(getattr(self, name), plain[name], strict=True):
                values["cv2"] = router.cv2
                values["collapsed"] = router.collapsed
                values["unspecialised"] = router.unspecialised
        return plain

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` as JSON, whole or not at all; equal audits give equal bytes.

        Raises:
            FileError: it cannot be written.
        """
        try:
            write_json(Path(path), self.document())
        except OSError as error:
            raise FileError(path, f"cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], layers: int) -> Audit:
        """Read the audit of a run of so many layers.

        Raises:
            FileError: another format, or a missing or wrong value; names file and key.
        """
        values = read_json(Path(path))
        for name, wanted in (("format", cls.FORMAT), ("layers", layers)):
            if values[name] != wanted:
                rule = f"{name} must be {wanted}{' as in the scores' * (name == 'layers')}"
                raise FileError(path, f"{rule}; audit again, got {shown(values[name])}")
        return parse(cls, values, path, layers)
