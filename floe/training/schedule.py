"""How to train and in what order: both are known before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from floe.errors import require, require_whole

_SCHEDULES = ("cosine", "linear", "constant_with_warmup", "constant")


@dataclass(frozen=True)
class TrainSettings:
    """How to train. The defaults are the FLoE paper's Table 6 and its ancestors' launch scripts.

    ``batch_size`` rows at a time, ``grad_accum`` of them per step: the step's loss is the mean over
    all its target tokens, however it is cut. ``max_steps`` replaces ``epochs``. ``warmup_ratio`` is
    the share of steps in which the learning rate rises from 0. ``max_grad_norm`` 0 turns clipping
    off. ``save_steps`` None writes no checkpoint. ``validation_points`` are fractions of the
    training at which the validation loss is taken, 0 = before the first step.
    """

    learning_rate: float = 2e-4
    batch_size: int = 1
    grad_accum: int = 8
    epochs: float = 1.0
    max_steps: int | None = None
    warmup_ratio: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    group_by_length: bool = False
    gradient_checkpointing: bool = False
    seed: int = 41
    save_steps: int | None = 50
    save_total_limit: int = 2
    validation_points: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    eval_batch_size: int = 16

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is not None or name not in ("max_steps", "save_steps"):
                require_whole(name, value, least)
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} must be a number > 0", value)
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be a number >= 0", value)
        require(0 <= self.warmup_ratio < 1, "warmup_ratio must be in [0, 1)", self.warmup_ratio)
        rule = f"schedule must be one of {', '.join(_SCHEDULES)}"
        require(self.schedule in _SCHEDULES, rule, self.schedule)
        points = self.validation_points
        require(all(0 <= p <= 1 for p in points), "validation_points must be in [0, 1]", points)

    def identity(self) -> dict[str, Any]:
        """What decides the trained adapter, as JSON values.

        Not how a step's rows are cut into batches, whether activations are kept, nor when to save
        or validate: they change a step's sums in the last digits, and which dropout masks are
        drawn, but not what is estimated. Whoever runs out of memory may change them and go on.
        """
        kept = {name: getattr(self, name) for name in _DECISIVE}
        length = {"epochs": self.epochs} if self.max_steps is None else {"steps": self.max_steps}
        return kept | {"rows_per_step": self.batch_size * self.grad_accum, **length}


_MOST_ROWS = 200_000_000  # their order is a list
_DECISIVE = (
    *("learning_rate", "warmup_ratio", "schedule", "weight_decay", "max_grad_norm"),
    *("group_by_length", "seed"),
)
# One checkpoint is left to go on from if the newest is damaged.
_COUNTS = {"batch_size": 1, "grad_accum": 1, "max_steps": 1, "save_steps": 1}
_COUNTS |= {"save_total_limit": 2, "eval_batch_size": 1, "seed": 0}


def training_order(
    lengths: Sequence[int], settings: TrainSettings, world_size: int = 1
) -> list[int]:
    """Indices of the rows in the order they are trained on, all epochs in one list.

    Each epoch is a permutation drawn from (seed, epoch), so the order is known before the first
    step and a resumed run cannot leave it. With ``group_by_length`` rows of like length share a
    step: an epoch is cut into stretches of 50 steps, each sorted by length and its steps shuffled.
    """
    block = settings.batch_size * settings.grad_accum * world_size
    count = len(lengths)
    if settings.max_steps is not None:
        total = settings.max_steps * block
    else:
        total = math.ceil(round(settings.epochs * count, 6))
    if total > _MOST_ROWS:
        raise ValueError(
            f"a training must take at most {_MOST_ROWS:,} rows, got {total:,}: "
            "lower epochs or max_steps"
        )
    order: list[int] = []
    for epoch in range(math.ceil(total / count) if count else 0):
        rng = np.random.default_rng([settings.seed, epoch])
        drawn = rng.permutation(count).tolist()
        order += _grouped(drawn, lengths, block, rng) if settings.group_by_length else drawn
    return order[:total]


def _grouped(
    order: list[int], lengths: Sequence[int], block: int, rng: np.random.Generator
) -> list[int]:
    grouped: list[int] = []
    for start in range(0, len(order), 50 * block):
        stretch = sorted(order[start : start + 50 * block], key=lambda i: (-lengths[i], i))
        steps = [stretch[i : i + block] for i in range(0, len(stretch), block)]
        # The last step may be short; it stays last, so that the others keep to their blocks.
        places = [*rng.permutation(len(steps) - 1).tolist(), len(steps) - 1]
        grouped += [i for place in places for i in steps[place]]
    return grouped
