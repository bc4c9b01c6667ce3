"""Policies that read :class:`~floe.importance.statistics.LayerStatistics`.

Each is our reading of a published criterion, mostly of its abstract, turned into a ranking of
layers to adapt. Most were made to find what to prune: we adapt what they would keep, which is an
assumption of ours. None has been compared in training; no claim is made for any.
"""

from __future__ import annotations

import numpy as np

from floe.selection.policies.inputs import Situation, best_window, by_position, finite
from floe.types import Floats


def gradient_norm(situation: Situation) -> Floats:
    """|| sum_n dL_n / dB_k ||, the norm of the first full-batch gradient of fresh adapters.

    Descending. Source: gradient probes of a fresh adapter, as in Aletheia (arXiv 2604.15351,
    abstract only). At B = 0 the gradients of A and of the router vanish, so this is the whole
    gradient: s ||dY^T (gate * h)|| over all rows. ``probe`` squares every row's own gradient; here
    opposite rows cancel first.
    """
    return _plain(situation, "gradient_norm", "gradient_norm")


def layer_card(situation: Situation) -> Floats:
    """Projected residual norm of a block, discounted by its coupling to layers already chosen.

    Greedy: the next layer is the one of the largest res_k^2 (1 - max_j c_kj) over the chosen j,
    with res_k = ||G Sigma^-1/2||_F, the covariance-normalised gradient of a linear adapter from the
    block's input to its output, and c the absolute cosine of two layers' G Sigma^-1/2. Source:
    "Understanding and Guiding Layer Placement in PEFT" (arXiv 2602.04019, abstract only), which
    names residual norm, activation energy and coupling. Assumed: their combination by this greedy
    rule; the energy enters through Sigma alone.
    """
    norm = situation.statistic("layer_card", "residual_norm")
    coupling = situation.statistic("layer_card", "coupling")
    left, order = list(range(situation.total)), list[int]()
    discount = np.ones(situation.total)
    while left:
        gains = norm[left] ** 2 * discount[left]
        order.append(left.pop(int(np.argmax(gains))))
        discount = np.minimum(discount, 1 - coupling[order[-1]])
    return by_position(order)


def spectrum(situation: Situation) -> Floats:
    """Signal in the weights: share of the singular values' sum above the Marchenko-Pastur edge.

    Mean over a layer's projections, descending. Source: Spectrum (arXiv 2406.06623) trains the
    layers of the highest ratio of the sum above the threshold to the sum below it; the share is
    the same order for one projection and stays finite. Assumed: the mean over projections instead
    of a choice per kind of projection, and the noise scale from the median singular value.
    """
    shares = situation.statistic("spectrum", "signal_share")
    return finite("signal_share", shares.mean(axis=1))


def eva(situation: Situation) -> Floats:
    """Share of the input's variance that r directions explain, mean over projections' inputs.

    Descending. Source: EVA (arXiv 2410.07170) gives rank to the weights whose inputs' leading
    singular vectors explain most variance. Assumed: a layer is chosen as a whole, by the mean share
    at the adapter's rank, instead of ranks handed out one by one.
    """
    shares = situation.statistic("eva", "explained_variance")
    return finite("explained_variance", shares.mean(axis=1))


def lamp(situation: Situation) -> Floats:
    """Share of a layer's weights that global pruning by LAMP scores would keep, descending.

    LAMP of a weight: w^2 over the sum of w^2 of the weights of its matrix that are no smaller.
    Source: "Layer-adaptive sparsity for the magnitude-based pruning" (arXiv 2010.07611). Assumed:
    layers kept dense are the ones to adapt; needs no data.
    """
    return _plain(situation, "lamp", "lamp_kept")


def angular(situation: Situation) -> Floats:
    """Angle between a block's input and its output at the last token, over pi; descending.

    Source: "The unreasonable ineffectiveness of the deeper layers" (arXiv 2403.17887) prunes where
    the angle is small; adapting where it is large is our assumption. Block size 1.
    """
    return _next_angle(situation, "angular", "angular_last")


def angular_all(situation: Situation) -> Floats:
    """``angular`` averaged over every real token instead of the last one."""
    return _next_angle(situation, "angular_all", "angular_all")


def angular_block(situation: Situation) -> Floats:
    """The K contiguous layers between whose ends the last token turns most.

    Source: as ``angular``, with the source's block size n = K: it prunes the n layers of least
    angle; taking those of the largest is our assumption.
    """
    angles = situation.statistic("angular_block", "angular_last")
    return best_window(np.diagonal(angles, offset=situation.count), situation.count)


def error_propagation(situation: Situation) -> Floats:
    """How much of a disturbance of a block's output is left at the last block; descending.

    Relative error of the last block's output per relative error at block k. Source: layer-wise
    sparsity from the accumulation of errors over layers (abstract only). Assumed: the disturbance
    is noise of a fixed relative size, and layers whose errors grow most are worth adapting.
    """
    return _plain(situation, "error_propagation", "error_growth")


def coarse_to_fine(situation: Situation) -> Floats:
    """Zeroth-order importance of a block: ||W_k|| times a forward-only gradient norm; descending.

    The norm is the root mean square of (L(W + e z) - L(W - e z)) / 2e over normal z. Source: the
    coarse step of ECoFLaP (arXiv 2310.02998). Assumed: the product of the norms as the score, which
    bounds the first-order loss of removing the block's weights.
    """
    return _plain(situation, "coarse_to_fine", "zeroth_order")


def kl_guided(situation: Situation) -> Floats:
    """Layers whose adapters alone come nearest to the whole warmed-up model, by KL; ascending KL.

    Source: "Distilling to hybrid attention models via KL-guided layer selection" (arXiv 2512.20569)
    restores one layer at a time, trains briefly and ranks by the KL to the teacher. Assumed: the
    layer's adapter as what is restored, the model with all adapters as teacher, no training.
    """
    return -_plain(situation, "kl_guided", "kl_to_full")


def shapley(situation: Situation) -> Floats:
    """Shapley value of a layer's warmed-up adapters in the game "minus the loss"; descending.

    From a linear surrogate of the loss over random sets of layers. Source: "Pruning as a
    cooperative game" (arXiv 2602.07804, abstract only), which estimates layers' contributions by a
    surrogate over stratified masks. Assumed: adapters in place of layers, and the weights under
    which the linear surrogate of all sets is the Shapley value.
    """
    return _plain(situation, "shapley", "shapley")


def forward_selection(situation: Situation) -> Floats:
    """Layers in the order in which opening their warmed-up adapters lowers the loss most.

    Greedy: each layer joins those already open. Source: forward selection of regression, with
    adapters for variables. Assumed: what the adapters of a full warm-up do together says what fresh
    adapters on these layers alone would learn. In our runs no better than adapter_fisher.
    """
    return -_plain(situation, "forward_selection", "forward_place")


NEEDS: dict[str, tuple[str, ...]] = {
    "gradient_norm": ("gradient_norm",),
    "layer_card": ("residual_norm", "activation_energy", "coupling"),
    "spectrum": ("signal_share",),
    "eva": ("explained_variance",),
    "lamp": ("lamp_kept",),
    "angular": ("angular_last",),
    "angular_all": ("angular_all",),
    "angular_block": ("angular_last",),
    "error_propagation": ("error_growth",),
    "coarse_to_fine": ("zeroth_order",),
    "kl_guided": ("kl_to_full",),
    "shapley": ("shapley",),
    "forward_selection": ("forward_place", "forward_loss"),
}
"""The statistics each policy needs; a policy that is not listed needs none."""


def _plain(situation: Situation, policy: str, name: str) -> Floats:
    return finite(name, situation.statistic(policy, name))


def _next_angle(situation: Situation, policy: str, name: str) -> Floats:
    return finite(name, np.diagonal(situation.statistic(policy, name), offset=1))
