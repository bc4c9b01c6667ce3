"""Statistics of a warmed-up adapter: what single layers, and sets of them, do for the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from floe.adapters.targets import adapted_layers
from floe.data.loss import IGNORE_INDEX, base_only, evaluating, for_loss, losses, on_device
from floe.decoder_blocks import find_blocks
from floe.errors import require
from floe.importance.layer_statistics.forward import forward_states, starting_at
from floe.importance.layer_statistics.weights import counted
from floe.types import Batch, Flags, Floats, Progress

_RIDGE = 1e-9  # of the mean weight: decides only what the sets leave open
_POSITIONS_AT_ONCE = 256


@contextmanager
def closed_adapters(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Within it the adapters of these layers add nothing; then all are as before.

    Raises:
        ValueError: a layer without adapters.
    """
    adapted = adapted_layers(model)
    wanted = set(layers)
    missing = sorted(wanted - adapted.keys())
    if missing:
        raise ValueError(f"layers must carry adapters to be closed, got {missing} without")
    modules = [module for layer in sorted(wanted) for module in adapted[layer].values()]
    before = [module._disable_adapters for module in modules]
    try:
        for module in modules:
            module._disable_adapters = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module._disable_adapters = value


def kl_to_full(
    model: nn.Module, batches: Sequence[Batch], progress: Progress | None = None
) -> Floats:
    """KL from the model with all adapters to the one with layer k's alone, [L] nats.

    sum_v p_all (log p_all - log p_k) at the positions that predict a label, mean over a row's
    positions, then over rows; logits in float32, sums in float64. A layer without adapters gives
    the base model's. Costs a forward with all adapters, one with none, and as many block forwards
    as L / 2 forwards.

    Raises:
        ValueError: a model without floe adapters, or a row without labels.
    """
    layers, blocks = _adapted(model), find_blocks(model)
    total, rows = np.zeros(len(blocks)), 0
    with evaluating(model):
        for given in counted(batches, progress, "kl_guided"):
            batch = on_device(for_loss(given, "response"), model)
            with base_only(model):
                states = forward_states(model, batch, rows)
            full = _logits(model, batch)
            for block in blocks:
                others = [layer for layer in layers if layer != block.index]
                with starting_at(blocks, block.index, states), closed_adapters(model, others):
                    alone = _logits(model, batch)
                total[block.index] += float(_row_kl(full, alone, batch["labels"]).sum())
            rows += len(states.loss)
    return np.maximum(total / rows, 0.0)


def shapley(
    model: nn.Module,
    batches: Sequence[Batch],
    sets: int | None = None,
    seed: int = 41,
    progress: Progress | None = None,
) -> Floats:
    """Shapley value of each layer's adapters for v(S) = -loss with only the layers S open, [L].

    From a linear surrogate of v over random sets of every size; see :func:`shapley_values` and
    :func:`draw_sets`. Loss: mean over rows of their mean NLL, in nats. Layers without adapters have
    0. Costs ``sets`` + 2 forwards.

    Args:
        sets: how many to draw; None = two for each adapted layer. seed: of their draw.

    Raises:
        ValueError: a model without floe adapters, or too few sets.
    """
    layers = _adapted(model)
    players = len(layers)
    drawn = draw_sets(players, 2 * players if sets is None else sets, seed)
    games = np.concatenate([np.zeros((1, players), bool), np.ones((1, players), bool), drawn])
    total, rows = np.zeros(len(games)), 0
    with evaluating(model):
        for given in counted(batches, progress, "shapley"):
            batch = on_device(for_loss(given, "response"), model)
            for place, game in enumerate(games):
                closed = [layer for layer, open_ in zip(layers, game, strict=True) if not open_]
                with closed_adapters(model, closed):
                    loss, _ = losses(model, batch, rows)
                total[place] += float(loss.sum(dtype=torch.float64))
            rows += len(loss)
    value = -total / rows
    values = np.zeros(len(find_blocks(model)))
    values[layers] = shapley_values(drawn, value[2:], float(value[0]), float(value[1]))
    return values


def forward_selection(
    model: nn.Module,
    batches: Sequence[Batch],
    steps: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Floats]:
    """Open the layers' adapters one by one, each time the one that lowers the loss most.

    Loss: mean over rows of their mean NLL, in nats. Ties: the lower layer. Layers without adapters
    come last. A candidate's forward starts at its own block, so that n steps cost about
    n (1 + L / 2 - n / 4) forwards, all of them L + L^2 / 4.

    Args:
        steps: layers to open so; None = all. The others follow in the order of the loss that each
            would have given in the last step.

    Returns:
        forward_place: each layer's place in that order, 1 = first, [L]; forward_loss: the loss when
        it had joined, or would have in the last step, [L].

    Raises:
        ValueError: a model without floe adapters, a row without labels, or steps < 1.
    """
    closed, total = _adapted(model), len(find_blocks(model))
    most = len(closed) if steps is None else min(steps, len(closed))
    require(most >= 1, "steps must be >= 1", steps)
    order, joined = [], np.zeros(total)
    with evaluating(model):
        for _ in counted(range(most), progress, "forward_selection"):
            loss = _losses_if_opened(model, batches, closed)
            joined[closed] = loss
            order.append(closed.pop(int(np.argmin(loss))))
    order += sorted(closed, key=lambda layer: (joined[layer], layer))
    without = sorted(set(range(total)) - set(order))
    joined[without] = joined.max()
    places = np.empty(total)
    places[order + without] = np.arange(1, total + 1)
    return {"forward_place": places, "forward_loss": joined}


def _losses_if_opened(model: nn.Module, batches: Sequence[Batch], closed: Sequence[int]) -> Floats:
    """Mean loss over rows with each of the ``closed`` layers open and the others closed."""
    blocks = find_blocks(model)
    total, rows = np.zeros(len(closed)), 0
    for given in batches:
        batch = on_device(for_loss(given, "response"), model)
        with closed_adapters(model, closed):
            states = forward_states(model, batch, rows)
        for place, layer in enumerate(closed):
            others = [other for other in closed if other != layer]
            with starting_at(blocks, layer, states), closed_adapters(model, others):
                loss, _ = losses(model, batch, rows)
            total[place] += float(loss.sum(dtype=torch.float64))
        rows += len(states.loss)
    return total / rows


def draw_sets(players: int, count: int, seed: int) -> Flags:
    """Distinct random sets of players and their complements, bool [<= count, players], sorted.

    Sizes go round: 1 (with n - 1), 2 (with n - 2), ... n // 2, and again; within a size sets are
    uniform. What is drawn twice counts once, so few players give fewer than ``count``.

    Raises:
        ValueError: count is odd or negative, or too small to have every size once.
    """
    sizes = players // 2
    if count % 2 or count < 2 * sizes:
        raise ValueError(
            f"sets must be an even number >= {2 * sizes} for {players} layers, got {count}"
        )
    drawn = np.zeros((count if sizes else 0, players), dtype=bool)
    rng = np.random.default_rng(seed)
    for pair in range(len(drawn) // 2):
        drawn[2 * pair, rng.permutation(players)[: 1 + pair % sizes]] = True
        drawn[2 * pair + 1] = ~drawn[2 * pair]
    return np.unique(drawn, axis=0)


def shapley_values(sets: Flags, payoffs: Floats, empty: float, full: float) -> Floats:
    """Values of the best linear surrogate of a game that is exact for no and for all players, [n].

    Least squares under the Shapley kernel: a size s weighs (n - 1) / (s (n - s)), shared by the
    sets of that size. With all sets these are the game's Shapley values (Charnes et al. 1988);
    they always sum to full - empty. What the sets leave open is shared evenly.

    Args:
        sets: distinct, bool [m, n], none of them empty or full. payoffs: [m].
    """
    players = sets.shape[1]
    if players == 1:
        return np.array([full - empty])
    sizes = sets.sum(axis=1)
    counts = np.bincount(sizes, minlength=players)
    weights = (players - 1) / (sizes * (players - sizes)) / counts[sizes]
    even = (full - empty) / players
    # Relative to an even share, with the constraint that the differences sum to zero
    design = sets.astype(np.float64)
    target = payoffs - empty - even * sizes
    root = np.sqrt(weights)[:, None]
    basis = np.linalg.qr(np.eye(players)[:, 1:] - 1 / players)[0]  # of the sum-zero subspace
    left = root * (design @ basis)
    gram = left.T @ left + _RIDGE * weights.mean() * np.eye(players - 1)
    differences = basis @ np.linalg.solve(gram, left.T @ (root[:, 0] * target))
    return np.asarray(even + differences)


def _adapted(model: nn.Module) -> list[int]:
    layers = sorted(adapted_layers(model))
    if not layers:
        raise ValueError("model must carry a warmed-up floe adapter, got none")
    return layers


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _row_kl(full: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """Mean over a row's predicting positions of KL(full || other), float64 [S]."""
    wanted = labels[:, 1:] != IGNORE_INDEX
    each = [logits[:, :-1][wanted].split(_POSITIONS_AT_ONCE) for logits in (full, other)]
    wide = torch.promote_types(full.dtype, torch.float32)
    parts = []
    for pair in zip(*each, strict=True):
        p, q = (torch.log_softmax(logits.to(wide), -1).double() for logits in pair)
        parts.append((p.exp() * (p - q)).sum(-1))
    each_row = torch.zeros(wanted.shape, dtype=torch.float64, device=full.device)
    return each_row.masked_scatter(wanted, torch.cat(parts)).sum(1) / wanted.sum(1)
