"""How many layers: what each takes of the training memory, and what validation losses say.

Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from floe.selection.masks.solvers import count, numbers
from floe.types import Floats

ADAM_BYTES = 16
"""Per float32 parameter: 4 of the weight, 4 of its gradient, 8 of Adam's two moments."""


def layer_memory(
    parameters: Sequence[int],
    saved_bytes: Sequence[int] | int,
    tokens: int,
) -> list[int]:
    """Bytes that training each layer's adapters takes beyond the frozen model, [L].

    ``parameters[k] * ADAM_BYTES + tokens * saved_bytes[k]``: weights, gradients and optimiser
    state, and what the adapters' forward pass keeps for the backward pass. Not in it: the frozen
    weights, which any choice has, and what the frozen layers above the lowest adapted one keep,
    which depends on where that one lies and not on how many there are.

    Args:
        parameters: adapter parameters of each layer.
        saved_bytes: kept by a layer's adapters per token; one number for all layers, or [L]. See
            :func:`saved_bytes_per_token`.
        tokens: of one forward pass, padding included.

    Raises:
        ValueError: a negative number, or lengths that differ. TypeError: no integers.
    """
    sizes = [count("parameters", size) for size in parameters]
    saved = list(saved_bytes) if isinstance(saved_bytes, Sequence) else [saved_bytes] * len(sizes)
    if len(saved) != len(sizes):
        raise ValueError(f"saved_bytes must have {len(sizes)} layers, got {len(saved)}")
    rows, kept = count("tokens", tokens), [count("saved_bytes", each) for each in saved]
    return [size * ADAM_BYTES + rows * each for size, each in zip(sizes, kept, strict=True)]


def saved_bytes_per_token(
    inputs: Sequence[int], rank: int, num_experts: int, *, element_bytes: int = 2
) -> int:
    """What the adapters of one layer keep of a token for the backward pass.

    The input x [K], once for adapted projections that share it, and for each projection the
    products of gates and x A^T [M r], all in the activation dtype, and x A^T [r] and the gates [M]
    in float32. An upper bound where the frozen layer would have kept x anyway.

    Args:
        inputs: in features K of the adapted projections, one entry for each; equal neighbours are
            taken to share their input, as gate and up projections do.
        rank, num_experts: r and M.
        element_bytes: of the activations; 2 for bfloat16.

    Raises:
        ValueError: a negative number. TypeError: no integers.
    """
    sizes = [count("inputs", size) for size in inputs]
    distinct = [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] != size]
    element = count("element_bytes", element_bytes)
    r, experts = count("rank", rank), count("num_experts", num_experts)
    return sum(distinct) * element + len(sizes) * (r * experts * element + (r + experts) * 4)


@dataclass(frozen=True, eq=False)
class CountChoice:
    """How many layers a sweep over validation losses supports.

    Attributes:
        count: the smallest number of layers whose loss is within a standard error of the best.
        best: the number of layers of least mean loss (ties: fewer layers).
        full: the largest number tried, the reference of the cliff.
        counts: all that were tried, ascending; of means [counts], the mean losses.
        above_best, above_best_error: mean difference to the best over rows, and its standard error.
        above_full, above_full_error: the same against ``full``.
        worse: the numbers whose loss exceeds that of ``full`` by more than two standard errors.
        cliff: where a cliff begins, coming down from ``full``: the largest of ``worse``; None if no
            number tried is that much worse.
    """

    count: int
    best: int
    full: int
    counts: tuple[int, ...]
    means: Floats
    above_best: Floats
    above_best_error: Floats
    above_full: Floats
    above_full_error: Floats
    worse: tuple[int, ...]
    cliff: int | None


def choose_count(losses: Mapping[int, ArrayLike]) -> CountChoice:
    """Choose the number of layers from a sweep, by paired validation losses.

    Every arm is compared on the same rows, so what rows have in common drops out: the standard
    error is that of the mean per-row difference. It holds the noise of the rows alone, not that of
    training, which takes several seeds. Give validation losses: a number chosen on test rows makes
    their result worthless.

    Args:
        losses: number of layers -> per-row losses [n]; the same rows in the same order.

    Raises:
        ValueError: nothing to compare, fewer than two rows, lengths that differ, a number that is
            not finite, or no number of layers.
    """
    counts, rows = _table(losses)
    means = rows.mean(axis=1)
    best, full = int(np.argmin(means)), len(counts) - 1
    above_best, best_error = _paired(rows, best)
    above_full, full_error = _paired(rows, full)
    close = above_best <= best_error
    worse = [k for k, far in zip(counts, above_full > 2 * full_error, strict=True) if far]
    return CountChoice(
        count=counts[int(np.argmax(close))],
        best=counts[best],
        full=counts[full],
        counts=counts,
        means=means,
        above_best=above_best,
        above_best_error=best_error,
        above_full=above_full,
        above_full_error=full_error,
        worse=tuple(worse),
        cliff=max(worse, default=None),
    )


def _table(losses: Mapping[int, ArrayLike]) -> tuple[tuple[int, ...], Floats]:
    """The counts, ascending, and their losses [counts, n]."""
    counts = tuple(sorted(count("losses' key", key) for key in losses))
    if not counts or counts[0] < 1:
        raise ValueError(f"losses must have numbers of layers >= 1 as keys, got {list(counts)}")
    rows = [numbers(f"losses[{key}]", losses[key]) for key in counts]
    if len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        raise ValueError(
            f"losses must have the same two or more rows for every number of layers, "
            f"got {dict(zip(counts, map(len, rows), strict=True))}"
        )
    for key, row in zip(counts, rows, strict=True):
        if not np.isfinite(row).all():
            raise ValueError(f"losses[{key}] must be finite, got {row[~np.isfinite(row)][0]}")
    return counts, np.stack(rows)


def _paired(rows: Floats, reference: int) -> tuple[Floats, Floats]:
    """Mean difference of every arm to the reference, and its standard error."""
    difference = rows - rows[reference]
    error = difference.std(axis=1, ddof=1) / math.sqrt(rows.shape[1])
    return np.asarray(difference.mean(axis=1)), np.asarray(error)
