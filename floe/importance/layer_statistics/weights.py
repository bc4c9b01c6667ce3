"""Statistics of a model's weights alone: no data, no forward."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from floe.adapters.targets import adapted_layers
from floe.decoder_blocks import find_blocks, linear_at
from floe.errors import require
from floe.importance.taylor import is_quantised
from floe.types import Floats, Progress

T = TypeVar("T")

_POINTS = 100_000
_SHIFT = 44  # of a float64's bits: sign, exponent and the mantissa's first 8 are left
_BINS = 1 << 18  # scores are at most 1, whose bits are 0x3FF0...


def counted(items: Sequence[T], progress: Progress | None, what: str) -> Iterator[T]:
    """The items in turn; ``progress`` is told of each when the next is asked for."""
    for done, item in enumerate(items, 1):
        yield item
        if progress is not None:
            progress(done, len(items), what)


def signal_share(model: nn.Module, progress: Progress | None = None) -> Floats:
    """Share of the singular values' sum above the edge of pure noise, [L, P] in [0, 1].

    A matrix of noise of standard deviation s has singular values up to s (sqrt(n) + sqrt(m)), the
    Marchenko-Pastur edge; s is estimated by the median singular value over the law's median. All
    singular values are computed, in float32 on the weight's device: on two CPU threads a matrix of
    8192 x 8192 takes minutes.

    Raises:
        ValueError: quantised weights, a weight that is not finite, or blocks with different
            projections.
    """
    blocks = _weights(model, progress, "spectrum")
    return np.array([[_share_of(weight) for weight in block] for block in blocks])


def projections(model: nn.Module) -> list[str]:
    """Names of the P projections of every block, in order.

    Raises:
        ValueError: blocks with different projections.
    """
    names = {tuple(block.linears) for block in find_blocks(model)}
    require(len(names) == 1, "all blocks must have the same projections", sorted(names))
    return list(names.pop())


def adapted_projections(model: nn.Module) -> list[str]:
    """Those of :func:`projections` that carry adapters; all of them in a plain model."""
    adapted = {name for modules in adapted_layers(model).values() for name in modules}
    return [name for name in projections(model) if not adapted or name in adapted]


@functools.lru_cache(maxsize=64)
def marchenko_pastur_median(ratio: float) -> float:
    """Median of the Marchenko-Pastur law of unit variance and aspect ratio in (0, 1].

    Raises:
        ValueError: a ratio out of range.
    """
    require(0 < ratio <= 1, "ratio must be in (0, 1]", ratio)
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    # t = low + (high - low) sin^2 takes the root singularities at both ends out of the density
    angle = (np.arange(_POINTS) + 0.5) * (np.pi / 2 / _POINTS)
    value = low + (high - low) * np.sin(angle) ** 2
    mass = np.cumsum((np.sin(angle) * np.cos(angle)) ** 2 / value)
    return float(np.interp(0.5, mass / mass[-1], value))


def lamp_kept(model: nn.Module, keep: float = 0.5, progress: Progress | None = None) -> Floats:
    """Share of each layer's projection weights among the ``keep`` largest LAMP scores, [L].

    A weight's score is w^2 over the sum of w^2 of the weights of its matrix from it upwards; equal
    scores at the threshold are all kept. One matrix at a time is sorted, in float64; a histogram
    finds the threshold's bin and a second pass its exact place.

    Args:
        keep: share of all projection weights to keep, in (0, 1].

    Raises:
        ValueError: keep out of range, quantised weights, or a weight that is not finite.
    """
    require(0 < keep <= 1, "keep must be in (0, 1]", keep)
    counts = np.zeros(_BINS, dtype=np.int64)
    for block in _weights(model, progress, "lamp"):
        for weight in block:
            counts += torch.bincount(_bins(lamp_scores(weight)), minlength=_BINS).cpu().numpy()
    wanted = max(1, round(keep * int(counts.sum())))
    above = np.cumsum(counts[::-1])[::-1]  # with the bin itself
    edge = int(np.flatnonzero(above >= wanted)[-1])
    rest = wanted - (int(above[edge + 1]) if edge + 1 < _BINS else 0)
    above_bin, total = np.zeros((2, len(find_blocks(model))), dtype=np.int64)
    inside = []  # a layer's scores in the bin
    for layer, block in enumerate(_weights(model, None, "lamp")):
        in_bin = []
        for weight in block:
            scores = lamp_scores(weight)
            bins = _bins(scores)
            above_bin[layer] += int((bins > edge).sum())
            total[layer] += scores.numel()
            in_bin.append(scores[bins == edge].cpu().numpy())
        inside.append(np.concatenate(in_bin))
    threshold = np.sort(np.concatenate(inside))[-rest]
    kept = above_bin + [int((scores >= threshold).sum()) for scores in inside]
    return np.asarray(kept / total)


def lamp_scores(weight: Tensor) -> Tensor:
    """LAMP scores of a matrix in ascending order of |w|, float64 [n m]; a zero weight has 0."""
    squares = weight.detach().flatten().double().square().sort().values
    upwards = squares.flip(0).cumsum(0).flip(0)
    return torch.where(squares > 0, squares / upwards, 0.0)


def _bins(scores: Tensor) -> Tensor:
    """The leading bits of float64 scores >= 0: integers in the same order."""
    return scores.view(torch.int64) >> _SHIFT


def _share_of(weight: Tensor) -> float:
    wide = torch.promote_types(weight.dtype, torch.float32)
    values = torch.linalg.svdvals(weight.detach().to(wide)).double().cpu().numpy()
    total = values.sum()
    if total == 0:
        return 0.0
    ratio = min(weight.shape) / max(weight.shape)
    scale = np.median(values) / marchenko_pastur_median(ratio) ** 0.5
    signal = values[values > scale * (1 + ratio**0.5)].sum()
    return float(min(1.0, signal / total))


def _weights(model: nn.Module, progress: Progress | None, what: str) -> Iterator[Iterator[Tensor]]:
    """The projections' weights, block by block."""
    if is_quantised(model):
        raise ValueError("base weights must be plain floating-point matrices, got quantised ones")
    names = projections(model)

    def weight_at(path: str) -> Tensor:
        weight = linear_at(model, path).weight.detach()
        if not bool(weight.isfinite().all()):
            raise ValueError(f"weights of {path} must be finite, got NaN or infinity")
        return weight

    for block in counted(find_blocks(model), progress, what):
        yield (weight_at(block.linears[name]) for name in names)
