"""Which adapters to keep when closing several costs what it costs together. Needs no torch.

A gate g_k = 1 multiplies the adapters of layer k. With per-sample gradients d L_n / d g_k the
empirical Fisher information of the gates is F = sum_n g_n g_n^T [L, L], and closing the set Z costs
1/2 1_Z^T F 1_Z to second order: the diagonal prices each layer alone, the rest says which layers
stand in for each other. The FLoE paper drops such cross-layer terms (text before Eq. 9).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from floe import _native
from floe.selection.solvers import Floats, count, numbers

if TYPE_CHECKING:
    from floe.selection.policies import Situation

DEFAULT_NODES = 200_000  # ten seconds or so for 60 layers; 30 layers take hundredths of one
_SYMMETRY = 1e-9  # relative; less is rounding


@dataclass(frozen=True, eq=False)
class CoupledChoice:
    """The layers kept, ascending, and what closing the others costs.

    Attributes:
        layers: as many as asked for.
        loss: 1/2 z^T F z - b^T z of the closed layers z.
        lower_bound: no choice of as many layers loses less.
        optimal: proven, to 1e-10 of the summed terms.
        nodes: of the search.
    """

    layers: tuple[int, ...]
    loss: float
    lower_bound: float
    optimal: bool
    nodes: int

    @property
    def gap(self) -> float:
        """loss - lower_bound, >= 0; 0 to rounding if ``optimal``."""
        return self.loss - self.lower_bound


def keep_layers(
    matrix: ArrayLike,
    count_kept: int,
    linear: ArrayLike | None = None,
    *,
    max_nodes: int = DEFAULT_NODES,
) -> CoupledChoice:
    """Keep the layers whose complement costs least to close together; exact by branch and bound.

    Minimises 1/2 z^T F z - b^T z over sets z of L - K closed layers. Bounds come from a convex
    relaxation (the diagonal is moved into the linear term as far as the matrix stays positive
    definite), so any symmetric matrix will do. Ties: the lower layer is kept.

    Args:
        matrix: F [L, L], symmetric and finite.
        count_kept: K, in [0, L].
        linear: b [L], what closing each layer gains to first order; None = 0.
        max_nodes: nodes the search may examine: a count, so that every machine stops at the same
            layers. 0 gives the best of two greedy starts with its bound.

    Raises:
        ValueError: shapes that do not fit, a number that is not finite, a matrix that is not
            symmetric, or K out of range.
        TypeError: no real numbers.
    """
    found = numbers("matrix", matrix, dimensions=2)
    total = len(found)
    gains = np.zeros(total) if linear is None else numbers("linear", linear)
    if found.shape != (total, total) or gains.shape != (total,):
        raise ValueError(
            f"matrix must be [L, L] and linear [L], got {found.shape} and {gains.shape}"
        )
    _check_symmetric(found)
    done = _native.keep_layers(
        (found + found.T) / 2, gains, count("count", count_kept), count("max_nodes", max_nodes)
    )
    return CoupledChoice(
        layers=tuple(np.flatnonzero(done["kept"]).tolist()),
        loss=done["loss"],
        lower_bound=done["lower_bound"],
        optimal=done["optimal"],
        nodes=done["nodes"],
    )


def closing_loss(matrix: Floats, closed: ArrayLike, linear: Floats | None = None) -> float:
    """1/2 z^T F z - b^T z of closed layers, given as indices or as [L] booleans."""
    z = np.zeros(len(matrix))
    chosen = np.asarray(closed)
    z[chosen if chosen.size else slice(0)] = 1
    return float(z @ matrix @ z / 2 - (0 if linear is None else linear @ z))


def gate_matrix(gate_gradient: ArrayLike) -> tuple[Floats, Floats]:
    """Coupled Fisher information of layers' gates [L, L], and their summed gradient [L].

    Args:
        gate_gradient: [S, L, P], d L_n / d gate of every adapted projection; the gate of a layer
            multiplies all of them, so its gradient is their sum. Or [S, L].

    Raises:
        ValueError: another shape, or a number that is not finite.
    """
    found = np.asarray(gate_gradient, dtype=np.float64)
    if found.ndim not in (2, 3) or not np.isfinite(found).all():
        raise ValueError(
            f"gate_gradient must be [S, L, P] or [S, L] and finite, got shape {found.shape}"
        )
    layers = found if found.ndim == 2 else found.sum(axis=2)
    return layers.T @ layers, layers.sum(axis=0)


def gate_fisher(situation: Situation) -> Floats:
    """The K layers whose complement costs least to close together, then the others.

    Source: Eq. 6-8 of the FLoE paper with gates on the adapters in place of masks on the weights,
    and the full matrix in place of Eq. 9's diagonal. Chosen by exact search (proven for 30 layers;
    for many more the best found within a count of nodes). The chosen ones are ordered by what
    closing each of them would cost next, the others by what opening each would save, descending.
    Assumes that an adapter is worth keeping if closing it hurts the warm-up model, and drops the
    first-order term, as Eq. 6 does. In our runs it trained worse than adapter_fisher: in six of six
    pairs, by 0.03 and 0.10 nats on average after 60 steps.
    """
    matrix, _ = gate_matrix(_gate_gradient(situation, "gate_fisher"))
    kept = np.zeros(len(matrix), dtype=bool)
    kept[list(keep_layers(matrix, situation.count).layers)] = True
    pull, own = matrix @ ~kept, np.diag(matrix) / 2
    worth = np.where(kept, pull + own, pull - own)
    order = np.lexsort((-worth, ~kept))  # stable: ties to the lower index
    places = np.empty(len(order))
    places[order] = np.arange(len(order), 0, -1) / len(order)
    return places


def gate_fisher_diagonal(situation: Situation) -> Floats:
    """Fisher information of each layer's gate alone, sum_n g^2, descending.

    What gate_fisher becomes without coupling between layers, as in the FLoE paper's Eq. 9; beside
    it to show what the coupling changes. Same assumptions.
    """
    matrix, _ = gate_matrix(_gate_gradient(situation, "gate_fisher_diagonal"))
    return np.diag(matrix).copy()


def _gate_gradient(situation: Situation, policy: str) -> Floats:
    found = getattr(situation.scores, "gate_gradient", None)
    if found is None:
        raise ValueError(
            f"policy {policy!r} needs scores.gate_gradient, got None; "
            "floe.score measures it with the adapters' Fisher information: score the model again"
        )
    if len(found) == 0 or np.shape(found)[1] != situation.total:
        raise ValueError(
            f"gate_gradient must be [S, {situation.total}, P] with S > 0, "
            f"got shape {np.shape(found)}"
        )
    return np.asarray(found)


def _check_symmetric(matrix: Floats) -> None:
    """Raises ValueError for the first entry that is not finite or differs from its mirror image."""
    bad = np.argwhere(~np.isfinite(matrix))
    if not len(bad) and matrix.size:
        bad = np.argwhere(np.abs(matrix - matrix.T) > _SYMMETRY * np.abs(matrix).max())
    if len(bad):
        i, j = bad[0]
        raise ValueError(
            f"matrix must be finite and symmetric, got {matrix[i, j]} at [{i}, {j}] "
            f"and {matrix[j, i]} at [{j}, {i}]"
        )
