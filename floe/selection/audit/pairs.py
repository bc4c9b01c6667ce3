"""What the FLoE paper's diagonal leaves out: masks and layers priced alone, and together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from floe.selection.audit.policies import Options, PolicyResult
from floe.selection.coupled import closing_loss, gate_matrix, keep_layers
from floe.selection.masks import determine
from floe.selection.ranking import overlap, spearman
from floe.selection.solvers import Flags

if TYPE_CHECKING:
    from floe.importance.scores import Scores


@dataclass(frozen=True)
class MaskPair:
    """Masked sets by diagonal (preset "global") and by block Fisher information ("block").

    Jaccard: shared over all masked units; None where neither masks any. masked: how many units
    each masks. block_loss: || sum of the masked units' gradients ||^2 after rearrangement over that
    before it; None where nothing was lost.
    """

    jaccard: float | None
    jaccard_heads: float | None
    jaccard_neurons: float | None
    masked: tuple[int, int]
    block_loss: float | None
    overlap: int
    spearman: float | None


@dataclass(frozen=True)
class GatePair:
    """Layers kept by each gate's own Fisher information, and by the coupled matrix.

    loss: what closing the others costs together, by the coupled matrix, in nats^2. optimal: no
    set of as many layers costs less than the coupled one.
    """

    overlap: int
    spearman: float | None
    diagonal: tuple[int, ...]
    coupled: tuple[int, ...]
    diagonal_loss: float
    coupled_loss: float
    optimal: bool


def compare_masks(
    results: Mapping[str, PolicyResult], scores: Scores, options: Options
) -> MaskPair | None:
    """Diagonal against block Fisher; None without per-sample mask gradients."""
    if "masks/block" not in results:
        return None
    one, other = (determine(scores, preset, options.budget) for preset in ("global", "block"))
    heads = (~one.head_mask, ~other.head_mask)
    neurons = (~one.neuron_mask, ~other.neuron_mask)
    both = tuple(
        np.concatenate([h.ravel(), n.ravel()]) for h, n in zip(heads, neurons, strict=True)
    )
    before = float(other.certificate["block_loss_before"])
    return MaskPair(
        jaccard=jaccard(*both),
        jaccard_heads=jaccard(*heads),
        jaccard_neurons=jaccard(*neurons),
        masked=(int(both[0].sum()), int(both[1].sum())),
        block_loss=float(other.certificate["block_loss"]) / before if before else None,
        overlap=overlap(results["masks/global"].layers, results["masks/block"].layers),
        spearman=spearman(results["masks/global"].scores, results["masks/block"].scores),
    )


def compare_gates(
    results: Mapping[str, PolicyResult], scores: Scores, options: Options
) -> GatePair | None:
    """Gates priced alone against gates priced together; None without gate gradients."""
    if "gate_fisher" not in results or scores.gate_gradient is None:
        return None
    matrix, _ = gate_matrix(scores.gate_gradient)
    choice = keep_layers(matrix, options.count)
    alone = results["gate_fisher_diagonal"]
    losses = []
    for kept in (alone.layers, choice.layers):  # one sum for both: equal sets, equal losses
        closed = np.ones(len(matrix), dtype=bool)
        closed[list(kept)] = False
        losses.append(closing_loss(matrix, closed))
    return GatePair(
        diagonal=alone.layers,
        coupled=choice.layers,
        diagonal_loss=losses[0],
        coupled_loss=losses[1],
        optimal=choice.optimal,
        overlap=overlap(alone.layers, choice.layers),
        spearman=spearman(alone.scores, results["gate_fisher"].scores),
    )


def jaccard(one: Flags, other: Flags) -> float | None:
    """Shared over all members of two sets given as flags; None if both are empty."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else None
