"""How far an op may be from float64, and the record of one comparison."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Result:
    """One output of one operator in one case, its error and the error allowed."""

    op: str
    output: str
    device: str
    dtype: str
    shape: str
    error: float
    budget: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is a number and within the budget."""
        return self.error <= self.budget

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: an infinite error, of an operator that raised or gave NaN, is None."""
        error = self.error if math.isfinite(self.error) else None
        return {**asdict(self), "error": error, "passed": self.passed}

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "WRONG"
        text = (
            f"{verdict}: {self.op} {self.output} on {self.device}, {self.dtype}, {self.shape}: "
            f"error {self.error:.3g}, budget {self.budget:.3g}"
        )
        return f"{text} ({self.note})" if self.note else text


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """RMS of the error over RMS of ``exact``, in float64; infinite for a NaN or another shape."""
    if actual.shape != exact.shape:
        return float("inf")
    exact = exact.detach().double()
    error = float((actual.detach().double() - exact).norm() / exact.norm().clamp_min(1e-300))
    return float("inf") if math.isnan(error) else error


def error_budget(
    torchs: Tensor, exact: Tensor, rounded_to: torch.dtype | None = None, factor: float = 2.0
) -> float:
    """The relative error allowed: ``factor`` times that of plain torch, or one rounding if larger.

    Args:
        torchs: What plain torch makes of the same inputs in the dtype under test.
        exact: The result in float64.
        rounded_to: The coarsest dtype of the computation, where that is not ``torchs``'s.
        factor: 2 holds a kernel to its accuracy; more only asks whether it is this function.
    Returns:
        ``max(factor * relative_error(torchs, exact), eps / 2)``; 0 for empty results.
    """
    if not exact.numel():
        return 0.0
    rounding = torch.finfo(rounded_to or torchs.dtype).eps / 2
    return max(factor * relative_error(torchs, exact), rounding)
