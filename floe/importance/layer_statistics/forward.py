"""Statistics from disturbed forwards of the base model: noise on states, noise on weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from floe.data.loss import base_only, evaluating, for_loss, losses, on_device, token_mask
from floe.decoder_blocks import find_blocks, linear_at
from floe.importance.block_replay import call_block, device_of_block
from floe.importance.layer_statistics.states import forward_states, starting_at
from floe.importance.taylor import is_quantised
from floe.types import Batch, Floats, Progress

DISTURBANCE = 0.1  # relative size of the noise on a block's output: well above bfloat16's rounding


def error_growth(
    model: nn.Module, batches: Sequence[Batch], seed: int = 41, progress: Progress | None = None
) -> Floats:
    """Relative error of the last block's output per relative error of block k's output, [L].

    Block k's output gets normal noise of DISTURBANCE times each token's own norm; later blocks are
    replayed. Mean over real tokens, which attend to one another, in float64. The noise follows from
    seed, batch and layer, so the value depends on the batching. The last layer's is 1 up to
    rounding. Costs as many block forwards as L / 2 forwards of the model.
    """
    blocks = find_blocks(model)
    total, tokens = np.zeros(len(blocks)), 0
    with evaluating(model), base_only(model):
        for place, batch in enumerate(batches):
            states = forward_states(model, batch)
            real = token_mask(batch).cpu()
            tokens += int(real.sum())
            for block in blocks:
                generator = _generator(seed, place, block.index)
                moved = _disturbed(states.before(block.index + 1), real, generator)
                for later in blocks[block.index + 1 :]:
                    moved = call_block(
                        later, states.calls[later.index], moved.to(device_of_block(later))
                    )
                total[block.index] += _relative_error(moved.cpu(), states.last, real)
            if progress is not None:
                progress(place + 1, len(batches), "error_propagation")
    return total / tokens / DISTURBANCE


def zeroth_order(
    model: nn.Module,
    batches: Sequence[Batch],
    seed: int = 41,
    probes: int = 1,
    progress: Progress | None = None,
) -> Floats:
    """||W_k|| times the root mean square of (L(W_k + e z) - L(W_k - e z)) / 2e over normal z, [L].

    W_k are the block's projections, L the rows' mean loss, e 1 % of the weights' root mean square
    (5 % in half precisions, whose rounding would swallow 1 %). The expectation of the squared
    quotient is the squared norm of the gradient. Deterministic in the seed; the weights come back
    bit by bit. Costs as many block forwards as L ``probes`` forwards of the model.

    Raises:
        ValueError: quantised weights, or probes < 1.
    """
    if is_quantised(model):
        raise ValueError("base weights must be plain floating-point matrices, got quantised ones")
    if probes < 1:
        raise ValueError(f"probes must be >= 1, got {probes}")
    blocks = find_blocks(model)
    slopes, rows = np.zeros((len(blocks), probes)), 0
    with evaluating(model), base_only(model):
        for done, batch in enumerate(batches, 1):
            states = forward_states(model, batch, rows)
            for block in blocks:
                weights = [linear_at(model, path).weight for path in block.linears.values()]
                for probe in range(probes):
                    generator = (seed, block.index, probe)
                    with starting_at(blocks, block.index, states):
                        slopes[block.index, probe] += _slope(model, batch, weights, generator)
            rows += len(states.loss)
            if progress is not None:
                progress(done, len(batches), "coarse_to_fine")
        norms = [_norm(linear_at(model, p).weight for p in b.linears.values()) for b in blocks]
    return np.asarray(np.array(norms) * np.sqrt(np.square(slopes / rows).mean(axis=1)))


def _slope(model: nn.Module, batch: Batch, weights: list[Tensor], key: tuple[int, ...]) -> float:
    """Sum over rows of (L(W + e z) - L(W - e z)) / 2e; the weights are put back."""
    own = [weight.detach().clone() for weight in weights]
    scale = _norm(weights) / sum(weight.numel() for weight in weights) ** 0.5
    size = scale * (0.01 if weights[0].dtype.itemsize > 2 else 0.05)
    found = []
    batch = on_device(for_loss(batch, "response"), model)
    try:
        for sign in (1, -1):
            generator = _generator(*key)
            for weight, value in zip(weights, own, strict=True):
                noise = torch.randn(value.shape, generator=generator).to(value.device)
                weight.copy_(value + sign * size * noise)
            loss, _ = losses(model, batch, 0)
            found.append(float(loss.sum(dtype=torch.float64)))
    finally:
        for weight, value in zip(weights, own, strict=True):
            weight.copy_(value)
    return (found[0] - found[1]) / (2 * size) if size else 0.0


def _norm(weights: Iterable[Tensor]) -> float:
    return float(sum(float(w.detach().double().square().sum()) for w in weights) ** 0.5)


def _generator(*key: int) -> torch.Generator:
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)


def _disturbed(hidden: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """``hidden`` with noise of DISTURBANCE times each real token's norm; padding as it is."""
    noise = torch.randn(hidden.shape, generator=generator)
    sizes = hidden.float().norm(dim=-1, keepdim=True) * DISTURBANCE
    moved = hidden.float() + noise * (sizes / noise.norm(dim=-1, keepdim=True))
    return torch.where(real[..., None], moved.to(hidden.dtype), hidden)


def _relative_error(moved: Tensor, reference: Tensor, real: Tensor) -> float:
    """Sum over real tokens of ||moved - reference|| / ||reference||."""
    own = reference[real].double()
    return float(((moved[real].double() - own).norm(dim=-1) / own.norm(dim=-1)).sum())
