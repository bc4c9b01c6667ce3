"""Statistics of what flows through the base model: inputs' variance, turning hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from floe.data.loss import base_only, evaluating, on_device, token_mask
from floe.decoder_blocks import Block, find_blocks, linear_at
from floe.importance.block_replay import Call, CallRecorder, call_block, device_of_block
from floe.importance.layer_statistics.states import forward_states
from floe.types import Batch, Floats, Progress

_TOKENS_AT_ONCE = 128


def explained_variance(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[str],
    rank: int = 8,
    progress: Progress | None = None,
) -> Floats:
    """Share of the variance of each projection's inputs in its ``rank`` leading directions, [L, P].

    Inputs are those of real tokens, their covariance is summed in float64 from float32 products.
    Blocks run one after the other over all batches, so one block's hidden states and covariances
    exist at a time. Inputs without variance give 0.

    Args:
        names: the P projections, by the last component of their path.

    Raises:
        ValueError: rank < 1, a projection that a block lacks, or an input that is not finite.
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    blocks = find_blocks(model)
    shares = np.zeros((len(blocks), len(names)))
    with evaluating(model), base_only(model):
        records = [_first_block(model, blocks, batch) for batch in batches]
        for block in blocks:
            found = _inputs_covariance(model, block, records, names)
            for path, one in found.items():
                if not bool(one.products.isfinite().all()):
                    raise ValueError(f"inputs of {path} must be finite, got NaN or infinity")
            ratios = {path: one.leading(rank) for path, one in found.items()}
            shares[block.index] = [ratios[_input_of(block, name)] for name in names]
            if progress is not None:
                progress(block.index + 1, len(blocks), "eva")
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
    names: Sequence[str],
    progress: Progress | None = None,
) -> dict[str, Floats]:
    """Mean angle over pi between the hidden states before layers i and j, each [L + 1, L + 1].

    Args:
        names: "angular_last" = at each row's last real token, "angular_all" = at every real token.

    Raises:
        ValueError: a hidden state of zero or that is not finite.
    """
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)
    with evaluating(model), base_only(model):
        for done, batch in enumerate(batches, 1):
            states = forward_states(model, batch)
            real = token_mask(batch).cpu()
            for name in names:
                chosen = last_tokens(real) if name == "angular_last" else real
                at = [states.before(layer)[chosen] for layer in range(len(states.calls) + 1)]
                sums[name] = sums[name] + _sum_of_angles(at)
                counts[name] += int(chosen.sum())
            if progress is not None:
                progress(done, len(batches), "angular")
    means = {name: np.asarray(sums[name] / counts[name] / np.pi) for name in names}
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


def _first_block(model: nn.Module, blocks: list[Block], batch: Batch) -> _Walk:
    inputs = {k: v for k, v in on_device(batch, model).items() if k != "labels"}
    with CallRecorder(blocks, keep={0}) as recorder:
        model(**inputs, use_cache=False)
        calls = recorder.take()
    assert calls[0].hidden is not None
    return _Walk(calls, token_mask(batch).cpu(), calls[0].hidden)


def _inputs_covariance(
    model: nn.Module, block: Block, records: list[_Walk], names: Sequence[str]
) -> dict[str, Covariance]:
    """Run a block over all batches; covariances of its distinct inputs, by their first reader."""
    found: dict[str, Covariance] = {_input_of(block, name): Covariance() for name in names}
    real = torch.empty(0, dtype=torch.bool)
    hooks = []
    for path, covariance in found.items():

        def hook(_module: nn.Module, args: tuple[Any, ...], into: Covariance = covariance) -> None:
            into.add(args[0][real.to(args[0].device)])

        hooks.append(linear_at(model, path).register_forward_pre_hook(hook))
    try:
        for record in records:
            real = record.real
            hidden = record.hidden.to(device_of_block(block))
            record.hidden = call_block(block, record.calls[block.index], hidden).cpu()
    finally:
        for handle in hooks:
            handle.remove()
    return found


def _input_of(block: Block, name: str) -> str:
    """Path of the first projection that reads what projection ``name`` reads."""
    if name not in block.linears:
        raise ValueError(f"projections must be among {sorted(block.linears)}, got {name!r}")
    path = block.linears[name]
    for group in (block.attention, block.mlp):
        if path in group.values():
            return next(iter(group.values()))
    return path
