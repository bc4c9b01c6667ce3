"""Timing one case of a latency table: every arm in turn, checked first, in one process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import harness
from benchmarks.arms import FROZEN, Arm, Setting, Way, build, frozen
from benchmarks.harness import Candidate
from benchmarks.models import Subject

WARMUP = {"cpu": 2, "cuda": 25}
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where and how to time."""

    device: torch.device
    clock: Callable[[], float]
    environment: dict[str, Any]
    rounds: int

    @property
    def warmup(self) -> int:
        """Calls of each candidate that are not timed."""
        return WARMUP[self.device.type]

    def time(
        self, case: Row, candidates: Sequence[Candidate], *, calls: int = 1, cold: bool = False
    ) -> tuple[list[Row], dict[str, list[float]]]:
        """A row for each candidate, and its seconds in every round; each run makes ``calls`` calls.

        Raises:
            WrongResult: a candidate is wrong; then nothing was timed.
        """
        errors: dict[str, float] = {}
        seconds = harness.measure(
            candidates, rounds=self.rounds, device=self.device, warmup=self.warmup,
            clock=self.clock, cold=cold, errors=errors,
        )  # fmt: skip
        gc.collect()  # or the peaks measured next would hold what is left of this
        seconds = {name: [one / calls for one in values] for name, values in seconds.items()}
        return harness.record(self.environment, case, seconds, errors, FROZEN), seconds


def adapt(
    subject: Subject,
    ways: dict[str, Way],
    layer_sets: Mapping[str, Sequence[int]],
    setting: Setting,
) -> list[Arm]:
    """The frozen model, then every way on every set of layers, named ``way, set``."""
    arms = [build(FROZEN, FROZEN, frozen, subject.model, (), setting)]
    for label, layers in layer_sets.items():
        arms += [
            build(f"{name}, {label}", name, way, subject.model, layers, setting)
            for name, way in ways.items()
        ]
    return arms


def describe_arms(
    rows: Sequence[Row], arms: Sequence[Arm], seconds: dict[str, list[float]]
) -> None:
    """Add to each row its way, its layers, and its ratios to the other ways on the same layers."""
    for row, arm in zip(rows, arms, strict=True):
        row["case"] |= {"way": arm.way, "layers": list(arm.layers), "adapted": len(arm.layers)}
        row["trained_parameters"] = sum(value.numel() for value in arm.parameters)
        row["ratio_to_way"] = {
            other.way: harness.ratios(seconds[arm.name], seconds[other.name])
            for other in arms
            if other.layers == arm.layers and other.way != arm.way
        }


def slope(counts: Sequence[int], seconds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Milliseconds for each adapted layer: a straight line through every round's own times.

    Args:
        counts: adapted layers, at least two different numbers.
        seconds: for each count, one time per round.

    Raises:
        ValueError: all counts are equal.
    """
    mean = sum(counts) / len(counts)
    spread = sum((count - mean) ** 2 for count in counts)
    if spread == 0:
        raise ValueError(f"counts must hold two different numbers of layers, got {list(counts)}")
    slopes = [
        sum((count - mean) * time for count, time in zip(counts, times, strict=True)) / spread
        for times in zip(*seconds, strict=True)
    ]
    found = harness.summary([1e3 * value for value in slopes])
    return {key: found[key] for key in ("median", "p20", "p80", "n")}
