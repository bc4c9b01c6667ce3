"""Statistics of a model's weights alone: no data, no forward."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from floe.adapters.targets import adapted_layers
from floe.decoder_blocks import find_blocks, linear_at
from floe.importance.taylor import is_quantised
from floe.types import Floats, Integers, Progress

_POINTS = 100_000
_SHIFT = 44  # of a float64's bits: sign, exponent and the mantissa's first 8 are left
_BINS = 1 << 18  # scores are at most 1, whose bits are 0x3FF0...


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
    rows = [
        [_share_of(weight) for weight in block] for block in _weights(model, progress, "spectrum")
    ]
    return np.array(rows, dtype=np.float64)


def projections(model: nn.Module) -> list[str]:
    """Names of the P projections of every block, in order.

    Raises:
        ValueError: blocks with different projections.
    """
    names = {tuple(block.linears) for block in find_blocks(model)}
    if len(names) != 1:
        raise ValueError(f"all blocks must have the same projections, got {sorted(names)}")
    return list(names.pop())


def adapted_projections(model: nn.Module) -> list[str]:
    """Those of :func:`projections` that carry adapters; all of them in a plain model."""
    adapted = {
        path.rpartition(".")[2] for modules in adapted_layers(model).values() for path in modules
    }
    return [name for name in projections(model) if not adapted or name in adapted]


@functools.lru_cache(maxsize=64)
def marchenko_pastur_median(ratio: float) -> float:
    """Median of the Marchenko-Pastur law of unit variance and aspect ratio in (0, 1].

    Raises:
        ValueError: a ratio out of range.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
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
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    counts = np.zeros(_BINS, dtype=np.int64)
    for block in _weights(model, progress, "lamp"):
        for weight in block:
            counts += _histogram(lamp_scores(weight))
    wanted = max(1, round(keep * int(counts.sum())))
    above = np.cumsum(counts[::-1])[::-1]  # with the bin itself
    edge = int(np.flatnonzero(above >= wanted)[-1])
    rest = wanted - (int(above[edge + 1]) if edge + 1 < _BINS else 0)
    kept, total, inside = _second_pass(model, edge)
    threshold = np.sort(np.concatenate(inside))[-rest]
    kept += [int((scores >= threshold).sum()) for scores in inside]
    return np.asarray(kept / total, dtype=np.float64)


def lamp_scores(weight: Tensor) -> Tensor:
    """LAMP scores of a matrix in ascending order of |w|, float64 [n m]; a zero weight has 0."""
    squares = weight.detach().flatten().double().square().sort().values
    upwards = squares.flip(0).cumsum(0).flip(0)
    return torch.where(squares > 0, squares / upwards, 0.0)


def _second_pass(model: nn.Module, edge: int) -> tuple[Integers, Integers, list[Floats]]:
    """Per layer: how many scores lie above the bin, how many there are, and those in the bin."""
    kept, total, inside = [], [], []
    for block in _weights(model, None, "lamp"):
        in_bin, above, size = [], 0, 0
        for weight in block:
            scores = lamp_scores(weight)
            bins = _bins(scores)
            above += int((bins > edge).sum())
            size += scores.numel()
            in_bin.append(scores[bins == edge].cpu().numpy())
        kept.append(above)
        total.append(size)
        inside.append(np.concatenate(in_bin))
    return np.array(kept), np.array(total), inside


def _histogram(scores: Tensor) -> Integers:
    counts: Integers = torch.bincount(_bins(scores), minlength=_BINS).cpu().numpy()
    return counts


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


def _finite_weight(model: nn.Module, path: str) -> Tensor:
    weight = linear_at(model, path).weight.detach()
    if not bool(weight.isfinite().all()):
        raise ValueError(f"weights of {path} must be finite, got NaN or infinity")
    return weight


def _weights(model: nn.Module, progress: Progress | None, what: str) -> Iterator[Iterator[Tensor]]:
    """The projections' weights, block by block."""
    if is_quantised(model):
        raise ValueError("base weights must be plain floating-point matrices, got quantised ones")
    blocks = find_blocks(model)
    names = projections(model)
    for block in blocks:
        yield (_finite_weight(model, block.linears[name]) for name in names)
        if progress is not None:
            progress(block.index + 1, len(blocks), what)
