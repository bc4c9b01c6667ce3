"""Statistics from backward passes: gradients of fresh adapters and of linear ones beside blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from floe.adapters.targets import adapted_layers
from floe.data.loss import base_only, evaluating, for_loss, losses
from floe.decoder_blocks import Block, find_blocks
from floe.importance.adapter_gradients import active_adapters
from floe.importance.block_replay import (
    BackwardRecord,
    device_of_block,
    record_backward,
    replay_backward,
)
from floe.importance.layer_statistics.weights import counted
from floe.importance.score import fresh_adapters
from floe.types import Batch, Floats, Progress

RIDGE = 1e-3  # of the covariance's mean eigenvalue; there may be fewer tokens than channels


def gradient_norm(
    model: nn.Module, batches: Sequence[Batch], seed: int = 41, progress: Progress | None = None
) -> Floats:
    """|| sum_n dL_n / dB || over a layer's experts at fresh adapters (B = 0), [L].

    L_n is row n's mean NLL. The gradients of A and the router are zero there. A layer without
    adapters has 0. Sums over batches in float64 on the CPU: 8 bytes an expert parameter.

    Args:
        model: with floe adapters, which come back bit by bit. seed: of the draw of A and the
            routers, as in floe.score(..., probe=True).

    Raises:
        ValueError: a model without floe adapters, a row without labels, or a loss that is not
            finite.
    """
    experts = _experts(model)
    parameters = [parameter for _, parameter in experts]
    sums = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in parameters]
    rows = 0
    with fresh_adapters(model, seed), evaluating(model), torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        for batch in counted(batches, progress, "gradient_norm"):
            loss, _ = losses(model, for_loss(batch, "response"), rows)
            rows += len(loss)
            gradients = torch.autograd.grad(loss.sum(), parameters)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient.cpu()
    squares = np.zeros(len(find_blocks(model)))
    for (layer, _), total in zip(experts, sums, strict=True):
        squares[layer] += float(total.square().sum())
    return np.asarray(np.sqrt(squares))


def _experts(model: nn.Module) -> list[tuple[int, nn.Parameter]]:
    """The active adapters' experts with their layers."""
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model must carry floe adapters to measure their gradients, got none")
    return [
        (layer, module.weights(name)[1])
        for layer, modules in layers.items()
        for module in modules.values()
        for name in active_adapters(module)
    ]


def layer_card(
    model: nn.Module, batches: Sequence[Batch], progress: Progress | None = None
) -> dict[str, Floats]:
    """Residual norm [L], activation energy [L] and coupling [L, L] of linear adapters of blocks.

    Block k maps x [T, d] to y; an adapter y + x D^T at D = 0 has the gradient G = sum_t g_t x_t^T
    of the rows' mean loss. With Sigma = mean_t x_t x_t^T (plus RIDGE times its mean eigenvalue):
    residual_norm ||G Sigma^-1/2||_F, activation_energy tr Sigma, coupling the absolute cosine of
    two layers' G Sigma^-1/2. Blocks are replayed from last to first; G and Sigma exist for one
    block at a time, summed in float64, the normalised gradients (4 d^2 bytes a layer) for all.

    Raises:
        ValueError: a row without labels, or a loss or gradient that is not finite.
    """
    blocks = find_blocks(model)
    energy, normalised = np.zeros(len(blocks)), dict[int, Tensor]()
    with evaluating(model), base_only(model):
        records, rows = list[BackwardRecord](), 0
        for batch in batches:
            records.append(record_backward(model, blocks, for_loss(batch, "response"), rows))
            rows += len(records[-1].real)
        for block in counted(blocks[::-1], progress, "layer_card"):
            gradient, moment = _moments(block, records)
            if not bool(gradient.isfinite().all() and moment.isfinite().all()):
                raise ValueError(f"gradients and states of layer {block.index} must be finite")
            energy[block.index] = float(moment.trace())
            normalised[block.index] = (gradient / rows @ _inverse_root(moment)).float().cpu()
    flat = [normalised[layer].flatten() for layer in range(len(blocks))]
    norms = np.array([float(g.double().norm()) for g in flat])
    coupling = np.eye(len(flat))  # 0 with a gradient of zero
    for i, j in itertools.combinations(range(len(flat)), 2):
        size, inner = norms[i] * norms[j], float(flat[i].double() @ flat[j].double())
        coupling[i, j] = coupling[j, i] = min(1.0, abs(inner) / size) if size else 0.0
    return {"residual_norm": norms, "activation_energy": energy, "coupling": coupling}


def _moments(block: Block, records: list[BackwardRecord]) -> tuple[Tensor, Tensor]:
    """Sum of g x^T and mean of x x^T over real tokens, [d, d] float64; a step of the replay."""
    device = device_of_block(block)
    gradient = moment = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for record in records:
        hidden, above = replay_backward(block, record)
        real = record.real.to(device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        x, g = hidden[real].to(wide), above[real].to(wide)
        gradient = gradient + g.T @ x
        moment = moment + x.T @ x
        tokens += len(x)
    return gradient, moment / tokens


def _inverse_root(moment: Tensor) -> Tensor:
    """(moment + ridge)^-1/2 of a symmetric matrix; zero for a zero matrix."""
    values, vectors = torch.linalg.eigh(moment)
    raised = values.clamp(min=0) + RIDGE * values.clamp(min=0).mean()
    roots = torch.where(raised > 0, raised.rsqrt(), 0.0)
    root: Tensor = (vectors * roots) @ vectors.T
    return root
