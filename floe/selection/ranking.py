"""From scores to layers: rankings, how far two agree, and how many layers to choose.

Layers are 0-based indices. Everywhere ties go to the lower index and NaN is an error. Needs no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral, Real
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from floe.errors import require, require_all
from floe.selection.masks.solvers import count, numbers
from floe.types import Floats, Integers

LayerCount = int | float | Mapping[str, int]
"""A count of layers, a fraction of all (float in (0, 1]), or a budget: {"params": n} adapter
parameters, or {"memory": n} bytes of training memory."""

ADAM_BYTES = 16
"""Per float32 parameter: 4 of the weight, 4 of its gradient, 8 of Adam's two moments."""

_BUDGETS = {"params": "adapter parameters", "memory": "bytes of training memory"}

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
    require(0 < fraction <= 1, "layers as a fraction must be in (0, 1]", fraction)
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
            for {"memory": n} (see :func:`layer_memory`). Needed for a budget only.

    Raises:
        ValueError: not a ranking, a number out of range, or a budget that not even the first layer
            fits.
        TypeError: ``layers`` is none of these.
    """
    array = np.asarray(ranking)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"ranking must be [L] integers, got {array.dtype} of shape {array.shape}")
    order = array.tolist()
    if not order or sorted(order) != list(range(len(order))):
        raise ValueError(f"ranking must hold every layer once, got {order}")
    if not isinstance(layers, Mapping):
        return tuple(sorted(order[: count_layers(layers, len(order))]))
    kind, budget = layer_budget(layers)
    what = _BUDGETS[kind]
    if costs is None:
        raise ValueError(f"layers as {{{kind!r}: n}} needs the {what} of each layer, got None")
    known = [int(cost) for cost in costs]
    if len(known) != len(order) or min(known) < 0:
        raise ValueError(f"{what} must be {len(order)} numbers >= 0, got {known}")
    fitting = sum(spent <= budget for spent in accumulate(known[layer] for layer in order))
    if fitting == 0:
        raise ValueError(
            f"layers[{kind!r}] must fit at least one layer, got {budget}; "
            f"layer {order[0]} takes {known[order[0]]}"
        )
    return tuple(sorted(order[:fitting]))


def layer_budget(layers: Mapping[str, int]) -> tuple[str, int]:
    """The kind and the number of {"params": n} or {"memory": n}.

    Raises:
        ValueError: other keys, or n < 1. TypeError: n is no integer.
    """
    if len(layers) != 1 or not set(layers) <= set(_BUDGETS):
        raise ValueError(
            f"layers as a mapping must have one key of {sorted(_BUDGETS)}, got {sorted(layers)}"
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
    require_all(~np.isnan(vector), name, "a number", vector)
    return vector


def _mask(name: str, mask: ArrayLike) -> Floats:
    array = np.asarray(mask, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name} must be [L, units], got shape {array.shape}")
    require_all(np.isfinite(array), name, "finite", array)
    return array


def layer_memory(
    parameters: Sequence[int], saved_bytes: Sequence[int] | int, tokens: int
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
    require(len(saved) == len(sizes), f"saved_bytes must have {len(sizes)} layers", len(saved))
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
    counts = tuple(sorted(count("losses' key", key) for key in losses))
    if not counts or counts[0] < 1:
        raise ValueError(f"losses must have numbers of layers >= 1 as keys, got {list(counts)}")
    arms = [numbers(f"losses[{key}]", losses[key]) for key in counts]
    if len({len(arm) for arm in arms}) != 1 or len(arms[0]) < 2:
        raise ValueError(
            f"losses must have the same two or more rows for every number of layers, "
            f"got {dict(zip(counts, map(len, arms), strict=True))}"
        )
    for key, arm in zip(counts, arms, strict=True):
        if not np.isfinite(arm).all():
            raise ValueError(f"losses[{key}] must be finite, got {arm[~np.isfinite(arm)][0]}")
    rows = np.stack(arms)
    means = rows.mean(axis=1)
    best, full = int(np.argmin(means)), len(counts) - 1
    above_best, best_error = _paired(rows, best)
    above_full, full_error = _paired(rows, full)
    close = above_best <= best_error
    worse = tuple(k for k, far in zip(counts, above_full > 2 * full_error, strict=True) if far)
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
        worse=worse,
        cliff=max(worse, default=None),
    )


def _paired(rows: Floats, reference: int) -> tuple[Floats, Floats]:
    """Mean difference of every arm to the reference, and its standard error."""
    difference = rows - rows[reference]
    error = difference.std(axis=1, ddof=1) / math.sqrt(rows.shape[1])
    return np.asarray(difference.mean(axis=1)), np.asarray(error)
