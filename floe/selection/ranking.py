"""From masks to layers: scores, rankings, how many layers, and how far two rankings agree.

Layers are 0-based indices. Everywhere ties go to the lower index and NaN is an error. Needs no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from numbers import Integral, Real
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from floe.types import Floats, Integers

LayerCount = int | float | Mapping[str, int]
"""A count of layers, a fraction of all (float in (0, 1]), or a budget: {"params": n} adapter
parameters, or {"memory": n} bytes of training memory."""

BUDGETS = {"params": "adapter parameters", "memory": "bytes of training memory"}

How = Literal["soft", "sparsity"]


def layer_score(head_mask: ArrayLike, neuron_mask: ArrayLike, how: str = "soft") -> Floats:
    """How strongly each layer is masked, [L] float64; the more, the sooner it is adapted.

    The FLoE paper ranks layers by a score s_k that it does not define; these are readings of it.
    Each averages a layer's mean over heads and its mean over neurons, so that the few heads weigh
    as much as the many neurons.

    Args:
        head_mask: [L, H], neuron_mask: [L, I]; 1 = retained, 0 = masked, anything finite after
            tuning. One of H and I may be 0: the score is then that of the other.
        how: "soft" 1 - m with m clipped to [0, 1]; "sparsity" share of m == 0.

    Raises:
        ValueError: shapes that do not fit, a mask that is not finite, an unknown ``how``.
    """
    heads = _mask("head_mask", head_mask)
    neurons = _mask("neuron_mask", neuron_mask)
    if len(heads) != len(neurons):
        raise ValueError(
            "head_mask and neuron_mask must have one row per layer, "
            f"got {len(heads)} and {len(neurons)}"
        )
    if how == "sparsity":
        parts = [heads == 0, neurons == 0]
    elif how == "soft":
        parts = [1 - np.clip(heads, 0, 1), 1 - np.clip(neurons, 0, 1)]
    else:
        raise ValueError(f"score must be one of {get_args(How)}, got {how!r}")
    means = [part.mean(axis=1, dtype=np.float64) for part in parts if part.shape[1]]
    if not means:
        raise ValueError("masks must have at least one head or neuron, got none")
    return np.asarray(np.mean(means, axis=0), dtype=np.float64)


def rank_layers(scores: ArrayLike) -> Integers:
    """Layers by descending score, [L] int64; ties to the lower index.

    Raises:
        ValueError: a score is NaN, or scores are not one-dimensional.
    """
    return np.argsort(-_vector("scores", scores), kind="stable").astype(np.int64)


def count_layers(layers: int | float, total: int) -> int:
    """The number of layers that ``layers`` asks for out of ``total``.

    An int is a count in [1, total]; a float is a fraction in (0, 1] and is rounded up. So 1 is one
    layer and 1.0 is all of them. 0.1 of 30 layers is 3 in spite of binary floats.

    Raises:
        ValueError: out of range. TypeError: no number.
    """
    if isinstance(layers, bool) or not isinstance(layers, Real):
        raise TypeError(f"layers must be an int or a float, got {type(layers).__name__}")
    if isinstance(layers, Integral):
        if not 1 <= layers <= total:
            raise ValueError(f"layers must be in [1, {total}], got {layers}")
        return int(layers)
    fraction = float(layers)
    if not 0 < fraction <= 1:
        raise ValueError(f"layers as a fraction must be in (0, 1], got {fraction}")
    return max(1, math.ceil(fraction * total - 1e-9))


def choose_layers(
    ranking: ArrayLike, layers: LayerCount, costs: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The first layers of a ranking, in ascending order.

    Args:
        ranking: [L], every layer once, the one to choose first in front.
        layers: a count, a fraction (see :func:`count_layers`), or a budget: as many layers from the
            front of the ranking as fit it together.
        costs: [L], what each layer takes of the budget: adapter parameters for {"params": n}, bytes
            for {"memory": n} (see layer_count.layer_memory). Needed for a budget only.

    Raises:
        ValueError: not a ranking, a number out of range, or a budget that not even the first layer
            fits.
        TypeError: ``layers`` is none of these.
    """
    order = _ranking(ranking)
    if not isinstance(layers, Mapping):
        return tuple(sorted(order[: count_layers(layers, len(order))]))
    kind, budget = layer_budget(layers)
    known = _costs(kind, costs, len(order))
    count = sum(spent <= budget for spent in accumulate(known[layer] for layer in order))
    if count == 0:
        raise ValueError(
            f"layers[{kind!r}] must fit at least one layer, got {budget}; "
            f"layer {order[0]} takes {known[order[0]]}"
        )
    return tuple(sorted(order[:count]))


def layer_budget(layers: Mapping[str, int]) -> tuple[str, int]:
    """The kind and the number of {"params": n} or {"memory": n}.

    Raises:
        ValueError: other keys, or n < 1. TypeError: n is no integer.
    """
    if len(layers) != 1 or not set(layers) <= set(BUDGETS):
        raise ValueError(
            f"layers as a mapping must have one key of {sorted(BUDGETS)}, got {sorted(layers)}"
        )
    ((kind, budget),) = layers.items()
    if isinstance(budget, bool) or not isinstance(budget, Integral):
        raise TypeError(f"layers[{kind!r}] must be an integer, got {type(budget).__name__}")
    if budget < 1:
        raise ValueError(f"layers[{kind!r}] must be >= 1, got {budget}")
    return kind, int(budget)


def spearman(first: ArrayLike, second: ArrayLike) -> float | None:
    """Spearman's rank correlation of two score vectors; equal scores share their mean rank.

    None where it is undefined: one of the vectors is constant (or shorter than two).

    Raises:
        ValueError: lengths that differ, or NaN.
    """
    a, b = _vector("first", first), _vector("second", second)
    if a.shape != b.shape:
        raise ValueError(f"scores must have one length, got {len(a)} and {len(b)}")
    a, b = _mean_ranks(a), _mean_ranks(b)
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return None if scale == 0 else max(-1.0, min(1.0, float(a @ b) / scale))


def overlap(first: Iterable[int], second: Iterable[int]) -> int:
    """How many layers two choices share."""
    return len(set(first) & set(second))


def expected_overlap(first: int, second: int, total: int) -> float:
    """How many of ``total`` layers two random choices of those sizes share on average: K K' / L."""
    if not (0 <= first <= total and 0 <= second <= total and total > 0):
        raise ValueError(f"sizes must be in [0, {total}] and total > 0, got {first} and {second}")
    return first * second / total


def _mean_ranks(scores: Floats) -> Floats:
    """Ranks minus their mean; equal scores share their mean rank. Exact, in halves."""
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    doubled = 2 * last - sizes + 1
    return np.asarray(doubled[group] - (len(scores) + 1), dtype=np.float64) / 2


def _vector(name: str, scores: ArrayLike) -> Floats:
    vector = np.asarray(scores, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {vector.shape}")
    bad = np.flatnonzero(np.isnan(vector))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}] must be a number, got nan")
    return vector


def _mask(name: str, mask: ArrayLike) -> Floats:
    array = np.asarray(mask, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name} must be [L, units], got shape {array.shape}")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        layer, unit = bad[0]
        raise ValueError(f"{name}[{layer}, {unit}] must be finite, got {array[layer, unit]}")
    return array


def _ranking(ranking: ArrayLike) -> list[int]:
    array = np.asarray(ranking)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"ranking must be [L] integers, got {array.dtype} of shape {array.shape}")
    order = [int(layer) for layer in array]
    if not order or sorted(order) != list(range(len(order))):
        raise ValueError(f"ranking must hold every layer once, got {order}")
    return order


def _costs(kind: str, costs: Sequence[int] | None, total: int) -> list[int]:
    if costs is None:
        raise ValueError(
            f"layers as {{{kind!r}: n}} needs the {BUDGETS[kind]} of each layer, got None"
        )
    known = [int(cost) for cost in costs]
    if len(known) != total or min(known) < 0:
        raise ValueError(f"{BUDGETS[kind]} must be {total} numbers >= 0, got {known}")
    return known
