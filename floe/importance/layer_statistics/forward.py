"""Statistics from forwards of the base model: what flows through it, and how it takes noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from floe.data.loss import base_only, evaluating, for_loss, losses, on_device, token_mask
from floe.decoder_blocks import Block, find_blocks, linear_at
from floe.errors import require
from floe.importance.block_replay import (
    Call,
    CallRecorder,
    call_block,
    device_of_block,
    hidden_of,
    record_calls,
)
from floe.importance.layer_statistics.weights import adapted_projections, counted
from floe.importance.taylor import is_quantised
from floe.types import Batch, Floats, Progress

DISTURBANCE = 0.1  # relative size of the noise on a block's output: well above bfloat16's rounding
_TOKENS_AT_ONCE = 128


@dataclass
class States:
    """One batch's forward, on the CPU.

    ``calls`` say how each block was called and with which hidden states [S, T, d]; ``last`` is the
    last block's output, ``loss`` each row's mean NLL, float64 [S], ``as_tuple`` whether blocks
    return tuples.
    """

    calls: list[Call]
    last: Tensor
    loss: Tensor
    as_tuple: bool

    def before(self, layer: int) -> Tensor:
        """Hidden states before block ``layer``; L gives those after the last block."""
        if layer == len(self.calls):
            return self.last
        hidden = self.calls[layer].hidden
        assert hidden is not None
        return hidden


def forward_states(model: nn.Module, batch: Batch, first_row: int = 0) -> States:
    """One forward with everything needed to start again from any block.

    Raises:
        ValueError: a row without labels or with a loss that is not finite.
    """
    blocks = find_blocks(model)
    batch = on_device(for_loss(batch, "response"), model)
    outputs: list[Any] = []
    hook = blocks[-1].module.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    try:
        with CallRecorder(blocks) as recorder:
            loss, _ = losses(model, batch, first_row)
            calls = recorder.take()
    finally:
        hook.remove()
    last = hidden_of(outputs[0]).detach().cpu()
    return States(calls, last, loss.detach().double().cpu(), isinstance(outputs[0], tuple))


@contextmanager
def starting_at(blocks: Sequence[Block], layer: int, states: States) -> Iterator[None]:
    """Within it the model's forward starts at ``layer``: blocks before it hand on its input."""
    modules = [block.module for block in blocks[:layer]]
    before = [vars(module).get("forward") for module in modules]
    hidden = states.before(layer)

    def hand_on(given: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        given = kwargs["hidden_states"] if given is None else given
        moved = hidden.to(given.device)
        return (moved,) if states.as_tuple else moved

    try:
        for module in modules:
            vars(module)["forward"] = hand_on
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del vars(module)["forward"]
            if forward is not None:  # one that was there already, such as accelerate's
                vars(module)["forward"] = forward


def explained_variance(
    model: nn.Module,
    batches: Sequence[Batch],
    projections: Sequence[str] | None = None,
    rank: int = 8,
    progress: Progress | None = None,
) -> Floats:
    """Share of the variance of each projection's inputs in its ``rank`` leading directions, [L, P].

    Inputs are those of real tokens, their covariance is summed in float64 from float32 products.
    Blocks run one after the other over all batches, so one block's hidden states and covariances
    exist at a time. Inputs without variance give 0.

    Args:
        projections: P of them, by the last component of their path; None = the adapted ones, all
            of a plain model.

    Raises:
        ValueError: rank < 1, a projection that a block lacks, or an input that is not finite.
    """
    require(rank >= 1, "rank must be >= 1", rank)
    blocks = find_blocks(model)
    names = adapted_projections(model) if projections is None else projections
    shares = np.zeros((len(blocks), len(names)))
    with evaluating(model), base_only(model):
        walks = []
        for batch in batches:
            calls, hidden = record_calls(model, blocks, batch)
            walks.append(_Walk(calls, token_mask(batch).cpu(), hidden))
        for block in counted(blocks, progress, "eva"):
            inputs = _inputs_covariance(model, block, walks, names)
            for path, covariance in inputs.items():
                if not bool(covariance.products.isfinite().all()):
                    raise ValueError(f"inputs of {path} must be finite, got NaN or infinity")
            ratios = {path: covariance.leading(rank) for path, covariance in inputs.items()}
            shares[block.index] = [ratios[_input_of(block, name)] for name in names]
    return shares


class Covariance:
    """Covariance of vectors that come in pieces; float64 sums of float32 products."""

    def __init__(self) -> None:
        self.count = 0
        self.shift = self.sum = self.products = torch.empty(0)

    def add(self, vectors: Tensor) -> None:
        """Take in vectors [n, K] of any float dtype."""
        values = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        if not self.count:
            self.shift = values.mean(0)  # near the mean, so that nothing cancels later
            self.sum = torch.zeros_like(self.shift, dtype=torch.float64)
            self.products = self.sum.new_zeros(len(self.sum), len(self.sum))
        values = values - self.shift
        self.count += len(values)
        self.sum += values.sum(0, dtype=torch.float64)
        self.products += values.T @ values

    def leading(self, rank: int) -> float:
        """Share of the ``rank`` largest eigenvalues in the trace; 0 without variance."""
        centred = self.products - torch.outer(self.sum, self.sum) / self.count
        values = torch.linalg.eigvalsh(centred).clamp(min=0).flip(0)
        total = float(values.sum())
        return min(1.0, float(values[:rank].sum()) / total) if total > 0 else 0.0


def angles(
    model: nn.Module,
    batches: Sequence[Batch],
    statistics: Sequence[str],
    progress: Progress | None = None,
) -> dict[str, Floats]:
    """Mean angle over pi between the hidden states before layers i and j, each [L + 1, L + 1].

    Args:
        statistics: "angular_last" = at each row's last real token, "angular_all" = at every one.

    Raises:
        ValueError: a hidden state of zero or that is not finite.
    """
    sums: dict[str, Any] = dict.fromkeys(statistics, 0.0)
    counts = dict.fromkeys(statistics, 0)
    with evaluating(model), base_only(model):
        for batch in counted(batches, progress, "angular"):
            states = forward_states(model, batch)
            real = token_mask(batch).cpu()
            for name in statistics:
                chosen = last_tokens(real) if name == "angular_last" else real
                at = [states.before(layer)[chosen] for layer in range(len(states.calls) + 1)]
                sums[name] = sums[name] + _sum_of_angles(at)
                counts[name] += int(chosen.sum())
    means = {name: np.asarray(sums[name] / counts[name] / np.pi) for name in statistics}
    for name, values in means.items():
        if not np.isfinite(values).all():
            layer = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise ValueError(f"{name} must be finite, got a zero or infinite state at {layer}")
    return {name: np.clip(values, 0.0, 1.0) for name, values in means.items()}


def last_tokens(real: Tensor) -> Tensor:
    """True at the last real token of each row, bool [S, T], whichever side is padded."""
    places = torch.arange(real.shape[1], device=real.device)
    return real & (places == torch.where(real, places, -1).amax(1, keepdim=True))


def _sum_of_angles(states: list[Tensor]) -> Floats:
    """Sum over tokens of the angles between L + 1 states, each [tokens, d]; float64."""
    total = np.zeros((len(states), len(states)))
    for start in range(0, len(states[0]), _TOKENS_AT_ONCE):
        part = torch.stack([s[start : start + _TOKENS_AT_ONCE].double() for s in states], dim=1)
        unit = part / part.norm(dim=-1, keepdim=True)
        cosines = (unit @ unit.mT).clamp(-1, 1)
        total += cosines.arccos().sum(0).numpy()
    np.fill_diagonal(total, np.diagonal(total) * 0)  # NaN stays, rounding goes
    return total


@dataclass
class _Walk:
    """One batch on its way through the blocks: their calls, its real tokens, its states now."""

    calls: list[Call]
    real: Tensor
    hidden: Tensor


def _inputs_covariance(
    model: nn.Module, block: Block, walks: list[_Walk], names: Sequence[str]
) -> dict[str, Covariance]:
    """Run a block over all batches; covariances of its distinct inputs, by their first reader."""
    covariances: dict[str, Covariance] = {_input_of(block, name): Covariance() for name in names}
    real = torch.empty(0, dtype=torch.bool)
    hooks = []
    for path, covariance in covariances.items():

        def hook(_module: nn.Module, args: tuple[Any, ...], into: Covariance = covariance) -> None:
            into.add(args[0][real.to(args[0].device)])

        hooks.append(linear_at(model, path).register_forward_pre_hook(hook))
    try:
        for walk in walks:
            real = walk.real
            hidden = walk.hidden.to(device_of_block(block))
            walk.hidden = call_block(block, walk.calls[block.index], hidden).cpu()
    finally:
        for handle in hooks:
            handle.remove()
    return covariances


def _input_of(block: Block, name: str) -> str:
    """Path of the first projection that reads what projection ``name`` reads."""
    require(name in block.linears, f"projections must be among {sorted(block.linears)}", name)
    path = block.linears[name]
    for group in (block.attention, block.mlp):
        if path in group.values():
            return next(iter(group.values()))
    return path


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
        for place, batch in enumerate(counted(batches, progress, "error_propagation")):
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
                plain = states.last[real].double()
                error = (moved.cpu()[real].double() - plain).norm(dim=-1) / plain.norm(dim=-1)
                total[block.index] += float(error.sum())
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
    require(probes >= 1, "probes must be >= 1", probes)
    blocks = find_blocks(model)
    slopes, rows = np.zeros((len(blocks), probes)), 0
    with evaluating(model), base_only(model):
        for batch in counted(batches, progress, "coarse_to_fine"):
            states = forward_states(model, batch, rows)
            for block in blocks:
                weights = [linear_at(model, path).weight for path in block.linears.values()]
                for probe in range(probes):
                    generator = (seed, block.index, probe)
                    with starting_at(blocks, block.index, states):
                        slopes[block.index, probe] += _slope(model, batch, weights, generator)
            rows += len(states.loss)
        norms = [_norm(linear_at(model, p).weight for p in b.linears.values()) for b in blocks]
    return np.asarray(np.array(norms) * np.sqrt(np.square(slopes / rows).mean(axis=1)))


def _slope(model: nn.Module, batch: Batch, weights: list[Tensor], key: tuple[int, ...]) -> float:
    """Sum over rows of (L(W + e z) - L(W - e z)) / 2e; the weights are put back."""
    weights_before = [weight.detach().clone() for weight in weights]
    scale = _norm(weights) / sum(weight.numel() for weight in weights) ** 0.5
    size = scale * (0.01 if weights[0].dtype.itemsize > 2 else 0.05)
    sums = []
    batch = on_device(for_loss(batch, "response"), model)
    try:
        for sign in (1, -1):
            generator = _generator(*key)
            for weight, value in zip(weights, weights_before, strict=True):
                noise = torch.randn(value.shape, generator=generator).to(value.device)
                weight.copy_(value + sign * size * noise)
            loss, _ = losses(model, batch, 0)
            sums.append(float(loss.sum(dtype=torch.float64)))
    finally:
        for weight, value in zip(weights, weights_before, strict=True):
            weight.copy_(value)
    return (sums[0] - sums[1]) / (2 * size) if size else 0.0


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
