"""What an audit says, as plain values: names, numbers and tuples, and its file.

L layers, 0-based; K of them are chosen. No torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from floe.errors import FileError
from floe.storage import write_json

FORMAT = 1


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

    name: str
    scores: tuple[float, ...]
    ranking: tuple[int, ...]
    layers: tuple[int, ...]
    tied: int

    @property
    def constant(self) -> bool:
        """Whether the scores order nothing."""
        return len(set(self.scores)) == 1


@dataclass(frozen=True)
class Agreement:
    """How far ``names`` agree, pair by pair.

    spearman [n, n]: of the scores; None where one is constant. overlap [n, n]: layers in both
    choices; two random choices share expected_overlap of them on average.
    """

    names: tuple[str, ...]
    spearman: tuple[tuple[float | None, ...], ...]
    overlap: tuple[tuple[int, ...], ...]
    expected_overlap: float


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

    name: str
    rank_low: tuple[int, ...]
    rank_high: tuple[int, ...]
    probability: tuple[float, ...]
    same: float
    kept: float
    spearman: float | None


@dataclass(frozen=True)
class Spread:
    """Mean, 5 % and 95 % quantile over repetitions; None where no repetition defines a value."""

    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Likeness:
    """Spearman correlation, and how many layers two choices share, over repetitions."""

    spearman: Spread
    overlap: Spread


@dataclass(frozen=True)
class Subsets:
    """A policy on fewer rows, over SPLITS random orders of them.

    rows[i] of the rows (shares[i] of them, the first of each order, so that smaller parts lie in
    larger ones) against all rows; halves: the two halves of each order against each other.
    """

    name: str
    shares: tuple[float, ...]
    rows: tuple[int, ...]
    against_all: tuple[Likeness, ...]
    halves: Likeness


@dataclass(frozen=True)
class Budgets:
    """A preset at other budgets against the same preset at the run's budget."""

    name: str
    budgets: tuple[float, ...]
    spearman: tuple[float | None, ...]
    overlap: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RouterHealth:
    """One module's router over real tokens; see floe.evaluation.routers for the entropies.

    Attributes:
        usage: [M], mean gate of every expert.
        cv2: squared coefficient of variation of the usage: variance over squared mean, 0 if even.
        collapsed: load_entropy < COLLAPSED_LOAD, or one expert's usage > COLLAPSED_USAGE.
        unspecialised: mutual_information < UNSPECIALISED: the token hardly matters.
        A single expert has no flags.
    """

    layer: int
    module: str
    usage: tuple[float, ...]
    load_entropy: float
    token_entropy: float
    mutual_information: float
    cv2: float
    collapsed: bool
    unspecialised: bool


@dataclass(frozen=True)
class Cliff:
    """Losses of arms with several numbers of layers against the largest number, paired by row.

    above_full and error are the mean difference and its standard error. worse: the numbers more
    than two standard errors above. begins: where a cliff begins, coming down; None if nowhere.
    """

    counts: tuple[int, ...]
    above_full: tuple[float, ...]
    error: tuple[float, ...]
    worse: tuple[int, ...]
    begins: int | None


@dataclass(frozen=True)
class MaskLoss:
    """What masking the units that preset "global" masks costs, in Fisher information (nats^2).

    With g_i [S] a unit's gradients over the rows: diagonal_loss is the sum of || g_i ||^2 (Eq. 9 of
    the FLoE paper), block_loss the sum over layers, heads and neurons apart, of
    || sum_i g_i ||^2 (Eq. 7 and 8 within these blocks).
    """

    masked: int
    diagonal_loss: float
    block_loss: float


@dataclass(frozen=True)
class Audit:
    """What an audit found. L layers, 0-based; K of them are chosen.

    Attributes:
        layers: L. count: K. seed, budget, score: the options. rows: S per-sample rows, 0 if none
            were kept. draws: of the bootstrap.
        policy: the run's own, which the verdicts are about.
        policies: every policy whose inputs are there; lacking: name -> what the others need.
        agreement: of all of them.
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

    layers: int
    count: int
    seed: int
    budget: float
    score: str
    rows: int
    draws: int
    policy: str
    policies: tuple[PolicyResult, ...]
    lacking: dict[str, str]
    agreement: Agreement
    bootstrap: tuple[Bootstrap, ...]
    subsets: tuple[Subsets, ...]
    not_resampled: dict[str, str]
    null: Likeness
    budgets: tuple[Budgets, ...]
    masks: MaskLoss | None
    routers: tuple[RouterHealth, ...]
    trained_routers: tuple[RouterHealth, ...]
    cliff: Cliff | None
    verdicts: dict[str, list[str]]
    selection: str = ""

    def document(self) -> dict[str, Any]:
        """Plain JSON values, with the format's number."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return found | {"format": FORMAT}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` as JSON, whole or not at all; equal audits give equal bytes.

        Raises:
            FileError: it cannot be written.
        """
        try:
            write_json(Path(path), self.document())
        except OSError as error:
            raise FileError(path, f"cannot be written: {error.strerror}") from error
