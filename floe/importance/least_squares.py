"""Least squares over units' outputs without ever forming the outputs (FLoE Eq. 18-21)."""

from __future__ import annotations

import torch
from torch import Tensor

SOLVERS = ("ridge", "lsmr_normal")


class UnitSystem:
    """Normal equations of ``min_m || A m - b ||`` where column u of A is the output of unit u.

    Unit u puts out ``x[:, u] W[:, u]^T`` from its ``width`` channels, flattened over tokens and
    output channels. Then ``A^T A = blocksum((x^T x) * (W^T W))`` and ``A^T b = blocksum(sum_t x *
    (b W))``: [tokens x channels, units] is never formed.

    Args:
        weight: [d, U * width], float32 or float64. width: channels per unit.
        intercept: add a column of ones to A, whose coefficient is fitted and dropped.
    """

    def __init__(self, weight: Tensor, width: int, intercept: bool = False) -> None:
        self.weight, self.width, self.intercept = weight, width, intercept
        channels = weight.shape[1]
        self._inputs = weight.new_zeros(channels, channels)
        self._products = weight.new_zeros(channels, dtype=torch.float64)
        self._sums = weight.new_zeros(channels, dtype=torch.float64)
        self._target_sum = self._target_squares = 0.0
        self._equations = 0
        self.gram = self.rhs = self.column_sums = weight.new_zeros(0, dtype=torch.float64)

    def add(self, inputs: Tensor, target: Tensor) -> None:
        """More equations: ``inputs`` [n, U * width] and outputs ``target`` [n, d]."""
        self._inputs.addmm_(inputs.T, inputs)
        self._products += (inputs * (target @ self.weight)).sum(0, dtype=torch.float64)
        self._sums += inputs.sum(0, dtype=torch.float64)
        self._target_sum += float(target.sum(dtype=torch.float64))
        self._target_squares += float(target.double().square().sum())
        self._equations += target.numel()

    def finish(self) -> UnitSystem:
        """Once all equations are in: float64 ``gram`` [U, U], ``rhs`` and ``column_sums`` [U]."""
        products = self._inputs.mul_(self.weight.T @ self.weight)
        del self._inputs  # as large as half the Gram matrix
        blocks = products.unflatten(1, (-1, self.width)).unflatten(0, (-1, self.width))
        self.gram = blocks.sum((1, 3), dtype=torch.float64)
        self.rhs = self._products.unflatten(0, (-1, self.width)).sum(1)
        sums = self._sums * self.weight.sum(0, dtype=torch.float64)
        self.column_sums = sums.unflatten(0, (-1, self.width)).sum(1)
        return self

    def residual(self, scale: Tensor) -> float:
        """``|| A scale - b ||`` without the intercept, which is not part of the model."""
        square = scale @ self.gram @ scale - 2 * (scale @ self.rhs) + self._target_squares
        return float(square.clamp_min(0).sqrt())

    def solve(self, ridge: float, solver: str) -> Tensor:
        """Scales m around 1, float64 [U]; NaN when the system cannot be solved.

        "ridge": ``m = 1 + (G + ridge mean(diag G) I)^-1 (r - G 1)``; the intercept is eliminated
        first and not damped. "lsmr_normal": ``(G G + I)(m - 1) = G (r - G 1)``, the intercept a
        unit like any other; a single unit is a plain division.
        """
        if solver == "lsmr_normal":
            return solve_normal(*self._bordered())[: len(self.rhs)]
        gram, rhs = self.gram, self.rhs
        if self.intercept:
            gram = gram - torch.outer(self.column_sums, self.column_sums) / self._equations
            rhs = rhs - self.column_sums * (self._target_sum / self._equations)
        return solve_ridge(gram, rhs, ridge * float(self.gram.diagonal().mean()))

    def _bordered(self) -> tuple[Tensor, Tensor]:
        if not self.intercept:
            return self.gram, self.rhs
        units = len(self.rhs)
        gram = self.gram.new_empty(units + 1, units + 1)
        gram[:units, :units] = self.gram
        gram[units, :units] = gram[:units, units] = self.column_sums
        gram[units, units] = self._equations
        return gram, torch.cat([self.rhs, self.rhs.new_tensor([self._target_sum])])


def solve_ridge(gram: Tensor, rhs: Tensor, damping: float) -> Tensor:
    """``1 + (G + damping I)^-1 (r - G 1)`` by Cholesky, float64 [U]; NaN where that is singular.

    The damping is added to ``gram`` and taken out again: a copy of 14,336 units is 1.5 GiB.
    """
    right, diagonal = rhs - gram.sum(1), gram.diagonal().clone()
    gram.diagonal().add_(damping)
    try:
        return 1 + _solve(gram, right)
    finally:
        gram.diagonal().copy_(diagonal)


def solve_normal(gram: Tensor, rhs: Tensor) -> Tensor:
    """``1 + (G G + I)^-1 G (r - G 1)``, float64 [U]; for one unit ``1 + (r - G) / G``."""
    right = rhs - gram.sum(1)
    if len(rhs) == 1:
        return 1 + right / gram[0]
    squared = gram @ gram
    squared.diagonal().add_(1.0)
    return 1 + _solve(squared, gram @ right)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return torch.full_like(right, float("nan"))
    return torch.cholesky_solve(right[:, None], factor)[:, 0]
