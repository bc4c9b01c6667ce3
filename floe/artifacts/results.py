"""What the stages of a run measure: search, training, evaluation, routers, cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from floe.artifacts.schema import IF_SET, Curve, Flag, Layer, Number, Text, Whole
from floe.selection.placement import Placement

Placements = dict[str, Placement]  # arms/placements.json: where adapters are, by arm


@dataclass(frozen=True)
class Trial:
    """One trained point: complete, pruned (stopped early) or failed (not finite, out of memory).

    ``value`` is the validation loss in nats per token (None unless complete), ``seconds`` the time
    of training and validation, ``redraws`` how many suggestions before it were already trained.
    Searches of earlier versions also have repeats, which were answered from memory.
    """

    number: Whole
    rank: Whole
    num_experts: Whole
    state: Literal["complete", "pruned", "failed", "repeat"]
    value: Number | None
    seconds: Number
    redraws: Whole = 0
    reason: Text = ""


@dataclass(frozen=True)
class Search:
    """search/result.json: the best point and every trial.

    ``exhausted``: the space has fewer points than were asked for, and all are trained; None without
    trials. ``distinct`` is the number of different points trained, ``seconds`` the sum over the
    trials. ``sampler`` says in full how points were drawn.
    """

    rank: Whole
    num_experts: Whole
    best_trial: Whole | None = None
    objective: Number | None = None
    trials: list[Trial] = field(default_factory=list)
    sampler: dict[str, Any] = field(default_factory=dict)
    seconds: Number | None = None
    distinct: Whole | None = None
    exhausted: Flag | None = field(default=None, metadata=IF_SET)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training did. Losses are ``(step, nats per token)``; ``seconds`` is the steps' sum.

    ``seconds_per_step`` is their median; ``memory_kind`` says what ``peak_memory_bytes`` is (see
    floe.training.memory.PeakMemory) and covers this process alone; ``resumed_from`` is the step the
    run continued from, or None.
    """

    steps: Whole
    trainable_parameters: Whole
    seconds: Number
    seconds_per_step: Number
    peak_memory_bytes: Whole | None = None
    memory_kind: Text = ""
    train_loss: Curve = ()
    validation_loss: Curve = ()
    resumed_from: Whole | None = None


@dataclass(frozen=True, kw_only=True)
class Training(TrainResult, Placement):
    """train/ARM/metrics.json: a training, where its adapters are and what chose that."""

    arm: Text
    policy: Text = ""
    rank: Whole
    num_experts: Whole
    seed: Whole | None = None


@dataclass(frozen=True)
class Interval:
    """A measured value and its 95 % interval, None where none is known, over so many rows.

    Of a loss also the number of target tokens, of an accuracy that of the correct rows.
    """

    value: Number
    low: Number | None
    high: Number | None
    rows: Whole | None = None
    tokens: Whole | None = field(default=None, metadata=IF_SET)
    correct: Whole | None = field(default=None, metadata=IF_SET)

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends, where both are finite."""
        if self.low is None or self.high is None:
            return None
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        return (self.low, self.high) if finite else None


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """What an arm reached on the rows of a task: loss in nats per token, accuracy in [0, 1]."""

    loss: Interval | None = None
    accuracy: Interval | None = field(default=None, metadata=IF_SET)


@dataclass(frozen=True, kw_only=True)
class Outcome(TaskOutcome):
    """What an arm reached on all rows, and by task.

    ``loss_minus_main`` is the difference to the main arm's loss, paired row by row.
    """

    loss_minus_main: Interval | None = field(default=None, metadata=IF_SET)
    by_task: dict[Text, TaskOutcome] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """eval/results.json: every arm's outcome; ``intervals`` says in words how they were made."""

    arms: dict[Text, Outcome]
    intervals: Text = ""
    seed: Whole | None = None


@dataclass(frozen=True)
class RowLosses:
    """eval/losses.json: by arm each row's summed loss in nats; each row's tokens and number."""

    nll: dict[Text, list[Number]]
    tokens: list[Whole]
    rows: list[Whole] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ArmRows:
    """eval/arms/ARM.json: an arm by row, of the adapter with this digest (None: the base model).

    ``nll`` and ``tokens`` as in :class:`RowLosses`; the answers given and whether they are correct,
    None where no answers were asked for.
    """

    nll: list[Number]
    tokens: list[Whole]
    given: list[Any] | None = field(default=None, metadata=IF_SET)
    correct: list[Flag] | None = field(default=None, metadata=IF_SET)
    adapter: Text | None


@dataclass(frozen=True)
class ValidationLosses:
    """sweep/COUNT/losses.json: each validation row's loss, nats per token."""

    rows: list[Number]


COLLAPSED_LOAD = 0.5
COLLAPSED_USAGE = 0.9
UNSPECIALISED = 0.01


@dataclass(frozen=True)
class Router:
    """One module's router over real tokens; see floe.evaluation for the entropies.

    ``usage`` [M] is the mean gate of every expert. A single expert has no flags.
    """

    layer: Layer
    module: Text
    usage: tuple[Number, ...]
    load_entropy: Number
    token_entropy: Number
    mutual_information: Number

    @property
    def cv2(self) -> float:
        """Squared coefficient of variation of the usage: variance over squared mean, 0 if even."""
        return float(np.var(self.usage) / np.mean(self.usage) ** 2)

    @property
    def collapsed(self) -> bool:
        """Almost all tokens go to few experts."""
        several = len(self.usage) > 1  # a single expert has nothing to share
        few = self.load_entropy < COLLAPSED_LOAD or max(self.usage, default=0) > COLLAPSED_USAGE
        return several and few

    @property
    def unspecialised(self) -> bool:
        """The choice of experts hardly depends on the token."""
        return len(self.usage) > 1 and self.mutual_information < UNSPECIALISED


@dataclass(frozen=True)
class Routers:
    """eval/router.json, audit/routers/routers.json: by layer, then module."""

    modules: list[Router]


@dataclass(frozen=True)
class Point:
    """Cost of one training step at ``layers`` adapted layers: median, smallest, largest seconds."""

    layers: Whole
    seconds_per_step: Number
    low: Number | None = None
    high: Number | None = None
    peak_memory_bytes: Whole | None = None
    memory_kind: Text = ""


@dataclass(frozen=True)
class Profile:
    """profile/profile.json."""

    points: list[Point]
    steps: Whole | None = None
    batch_size: Whole | None = None
    tokens_per_step: Number | None = None
