"""What a run folder holds, as values. A stage that was not run is None or empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from floe.importance.scores import Scores
from floe.report.audit_read import Audited
from floe.report.records import Record
from floe.types import Floats


@dataclass(frozen=True)
class Interval:
    """A measured value, its 95 % interval (None where none was computed), its sample size."""

    value: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True)
class Outcome:
    """What one arm reached: loss in nats per token, accuracy in [0, 1]; overall and by task.

    ``loss_minus_main`` is the difference to the main arm's loss, paired row by row.
    """

    loss: Interval | None
    loss_minus_main: Interval | None
    accuracy: Interval | None
    by_task: dict[str, Outcome]


@dataclass(frozen=True)
class Training:
    """One arm's training run; the curves are ``[n, 2]`` float64 of step and loss.

    ``modules`` and ``sizes`` (rank, experts) by layer, where the arm chose by them; else empty.
    """

    arm: str
    policy: str
    layers: tuple[int, ...]
    modules: Mapping[int, tuple[str, ...]]
    sizes: Mapping[int, tuple[int, int]]
    rank: int
    num_experts: int
    trainable_parameters: int
    steps: int
    seconds: float
    seconds_per_step: float
    peak_memory_bytes: float | None
    memory_kind: str
    train_loss: Floats
    validation_loss: Floats
    seed: int | None


@dataclass(frozen=True)
class Evaluation:
    """Every arm's outcome; ``intervals`` says in words how the intervals were made."""

    arms: dict[str, Outcome]
    intervals: str
    seed: int | None


@dataclass(frozen=True)
class MaskChoice:
    """The paper's masks policy beside the chosen one; the masked fractions are ``[L]`` or None."""

    preset: str
    layers: tuple[int, ...]
    layer_scores: Floats
    ranking: tuple[int, ...]
    masked_heads: Floats | None
    masked_neurons: Floats | None


@dataclass(frozen=True)
class Tuned:
    """One attempt of mask tuning: what is left of the component's output error, before, after."""

    layer: int
    component: str
    accepted: bool
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Choice:
    """select/selection.json."""

    policy: str
    preset: str
    budget: float | None
    layers: tuple[int, ...]
    layer_scores: Floats
    ranking: tuple[int, ...]
    tuned: bool
    untuned: str
    tuning: tuple[Tuned, ...]
    paper: MaskChoice
    spearman: float | None
    overlap: float | None
    expected_overlap: float | None
    certificate: Record | None
    seed: int | None

    @property
    def is_paper(self) -> bool:
        """Whether the chosen policy is the paper's masks, so that there is nothing to compare."""
        return self.policy == "masks"


@dataclass(frozen=True)
class Trial:
    """One point of the rank and experts search; ``state`` is complete, pruned, failed or repeat."""

    number: int
    rank: int
    num_experts: int
    state: str
    value: float | None
    seconds: float | None


@dataclass(frozen=True)
class Search:
    """search/result.json."""

    rank: int
    num_experts: int
    best_trial: int | None
    seconds: float | None
    trials: tuple[Trial, ...]
    distinct: int | None
    sampler: Record | None


@dataclass(frozen=True)
class Router:
    """One router's health over the evaluated tokens; entropies are divided by ln M."""

    layer: int
    module: str
    usage: Floats
    load_entropy: float
    token_entropy: float
    mutual_information: float

    @property
    def collapsed(self) -> bool:
        """Almost all tokens go to few experts."""
        several = len(self.usage) > 1  # a single expert has nothing to share
        return several and bool(self.load_entropy < 0.5 or self.usage.max() > 0.9)

    @property
    def unspecialised(self) -> bool:
        """The choice of experts hardly depends on the token."""
        return len(self.usage) > 1 and self.mutual_information < 0.01


@dataclass(frozen=True)
class Point:
    """Cost of one training step at ``layers`` adapted layers."""

    layers: int
    seconds: float
    low: float | None
    high: float | None
    memory: float | None
    memory_kind: str


@dataclass(frozen=True)
class Profile:
    """profile/profile.json."""

    points: tuple[Point, ...]
    steps: int | None
    batch_size: int | None
    tokens_per_step: float | None


@dataclass(frozen=True)
class Stage:
    """A finished stage, from its DONE.json."""

    name: str
    seconds: float | None
    finished: str


@dataclass(frozen=True)
class Part:
    """A part of the data: in words, how many of its rows are used; whether any was lost or cut."""

    name: str
    summary: str
    lost: bool


@dataclass(frozen=True)
class Run:
    """Everything a report shows; ``scores`` and ``choice`` always, the rest if it was run.

    ``selection`` is the hash of what the select stage read, empty without its record.
    """

    name: str
    config: str
    env: dict[str, object]
    scores: Scores
    choice: Choice
    search: Search | None
    training: dict[str, Training]
    evaluation: Evaluation | None
    routers: tuple[Router, ...]
    profile: Profile | None
    stages: tuple[Stage, ...]
    audit: Audited | None = None
    selection: str = ""
    data: tuple[Part, ...] = ()

    @property
    def layer_count(self) -> int:
        """L."""
        return self.scores.layer_count

    @property
    def model(self) -> str:
        """The model's name as the scoring stage recorded it; of a local path only the last part."""
        name = str(self.scores.meta.get("model") or "unnamed model")
        return PurePath(name).name if PurePath(name).is_absolute() else name
