"""Refinement by block Fisher information: masks that cost little together, not one by one.

The diagonal Fisher information prices every unit alone. Within one layer's heads, or its neurons,
per-sample mask gradients also say what units cost together: closing the set Z costs
|| sum_{i in Z} g_i ||^2, g_i [S] the unit's gradients over S samples. This is the rearrangement of
Kwon et al. 2022 (arXiv 2204.09656), which the FLoE paper's Algorithm 2 replaced; here a budget of
unit costs holds as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from floe import _native
from floe.selection.solvers import Flags, Floats, count, flags, number, numbers

Gradients = NDArray[np.float32] | Floats


@dataclass(frozen=True, eq=False)
class Rearrangement:
    """Masks [n] (True = retained) after swaps that keep the number of masked units.

    loss is || sum of the masked units' gradients ||^2, before and after; slack is what is left of
    the cost that swaps might add.
    """

    mask: Flags
    loss_before: float
    loss: float
    slack: float
    swaps: int


def rearrange(
    gradient: ArrayLike, cost: ArrayLike, mask: ArrayLike, *, slack: float = 0.0, rows: int = 0
) -> Rearrangement:
    """Swap masked and retained units of one pool while what is masked costs less together.

    Every unit retained at the start, in ascending order of its own Fisher information (ties: lower
    index), is offered for masking; it takes the place of the masked unit whose return leaves the
    least loss (ties: lower index), if the loss falls and the retained cost rises by no more than
    the slack that is left. Each is offered once, and without strict gain nothing moves, so where
    gradients are orthogonal masks of least Fisher information stay.

    Args:
        gradient: [S, n] mask gradients d L_n / d m of S samples; finite, and so is the loss.
        cost: [n], of retaining a unit; finite, their sizes sum to less than 2**1021. May be
            negative: masking costs are -cost.
        mask: [n]; nonzero = retained. Not changed.
        slack: >= 0, how much the retained cost may rise; infinity means no limit.
        rows: project the S samples to at most so many directions first; 0 keeps all.

    Raises:
        ValueError: shapes that differ, a number that is not finite, a negative slack or rows.
        TypeError: no real numbers.
    """
    found = numbers("gradient", gradient, dimensions=2)
    costs = numbers("cost", cost)
    start = flags("mask", mask, costs.shape)
    if found.shape[1] != len(costs):
        raise ValueError(f"gradient must be [S, n] and cost [n], got {found.shape}, {costs.shape}")
    if count("rows", rows) and np.isfinite(found).all():
        found = project(found, rows)
    done = _native.rearrange(np.ascontiguousarray(found.T), costs, number("slack", slack), start)
    return Rearrangement(**done)


def project(gradient: Floats, rows: int) -> Floats:
    """[S, n] gradients on their ``rows`` leading directions over samples, [min(rows, S, n), n].

    Inner products of units change by no more than the singular values left out; with as many rows
    as the gradient's rank they do not change. From the eigenvectors of the smaller Gram matrix,
    O(S n min(S, n)).
    """
    samples, units = gradient.shape
    keep = min(rows, samples, units)
    _, exponent = np.frexp(np.abs(gradient).max(initial=0))
    near = np.ldexp(gradient, -exponent)  # so that squares neither overflow nor vanish
    if samples <= units:
        _, vectors = np.linalg.eigh(near @ near.T)
        found = vectors[:, ::-1][:, :keep].T @ near
    else:
        squares, vectors = np.linalg.eigh(near.T @ near)
        scale = np.sqrt(np.maximum(squares[::-1][:keep], 0))
        found = scale[:, None] * vectors[:, ::-1][:, :keep].T
    return np.asarray(np.ldexp(found, exponent))


@dataclass(frozen=True, eq=False)
class BlockRefinement:
    """Masks [L, H] and [L, I] after the rearrangement of every layer's heads and neurons.

    Losses are summed over the 2 L pools; in the pools' own gradients, projected or not.
    """

    head_mask: Flags
    neuron_mask: Flags
    loss_before: float
    loss: float
    swaps: int


def rearrange_layers(
    gradients: tuple[Gradients, Gradients],
    costs: tuple[Floats, Floats],
    masks: tuple[Flags, Flags],
    *,
    slack: float,
    rows: int = 0,
) -> BlockRefinement:
    """Rearrange the heads of every layer, then its neurons; layers in order share one slack.

    Args:
        gradients: [S, L, H] and [S, L, I].
        costs: [L, H] and [L, I]. masks: the same shapes, nonzero = retained. Not changed.
        slack, rows: see :func:`rearrange`.

    Raises:
        ValueError: as rearrange.
    """
    heads, neurons = (np.array(mask, dtype=np.bool_) for mask in masks)
    before = after = 0.0
    swaps = 0
    for layer in range(len(heads)):
        for gradient, cost, mask in zip(gradients, costs, (heads, neurons), strict=True):
            done = rearrange(gradient[:, layer], cost[layer], mask[layer], slack=slack, rows=rows)
            mask[layer], slack = done.mask, max(0.0, done.slack)
            before, after, swaps = before + done.loss_before, after + done.loss, swaps + done.swaps
    return BlockRefinement(heads, neurons, before, after, swaps)
