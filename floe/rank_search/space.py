"""The points a search may try."""

from __future__ import annotations

from dataclasses import dataclass

from optuna.distributions import IntDistribution

Point = tuple[int, int]


@dataclass(frozen=True)
class SearchSpace:
    """Ranks and numbers of experts as (low, high, step), both ends included (FLoE section 4.1)."""

    rank: tuple[int, int, int] = (2, 32, 2)
    num_experts: tuple[int, int, int] = (2, 4, 1)

    def __post_init__(self) -> None:
        for name in ("rank", "num_experts"):
            values = getattr(self, name)
            if len(values) != 3 or any(
                isinstance(v, bool) or not isinstance(v, int) for v in values
            ):
                raise TypeError(f"{name} must be three ints (low, high, step), got {values!r}")
            low, high, step = values
            if not (1 <= low <= high and step >= 1 and (high - low) % step == 0):
                raise ValueError(
                    f"{name} must be (low, high, step) with 1 <= low and high reached, got {values}"
                )
            object.__setattr__(self, name, tuple(values))

    def points(self) -> list[Point]:
        """All (rank, num_experts), sorted."""
        return [(r, m) for r in _values(self.rank) for m in _values(self.num_experts)]

    def distributions(self) -> dict[str, IntDistribution]:
        """The space as optuna names it."""
        return {
            name: IntDistribution(low, high, step=step)
            for name, (low, high, step) in (("rank", self.rank), ("num_experts", self.num_experts))
        }


def _values(bounds: tuple[int, int, int]) -> range:
    low, high, step = bounds
    return range(low, high + 1, step)
