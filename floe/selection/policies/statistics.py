"""Policies that read statistics of the layers, measured on the model; most on the base model alone.

Each is our reading of a published criterion, mostly of its abstract, turned into a ranking of
layers to adapt. Most were made to find what to prune: we adapt what they would keep, which is an
assumption of ours. Of these, forward_selection alone has been compared in training.
"""

from __future__ import annotations

from math import inf

import numpy as np

from floe.selection.policies.registry import (
    Measure,
    PolicyInputs,
    Statistic,
    best_window,
    by_position,
    policy,
    share,
)
from floe.types import Floats

_HOME = "floe.importance.layer_statistics"


@policy(
    measure=Measure(
        f"{_HOME}.gradients:gradient_norm",
        {"gradient_norm": Statistic("L", r"nats per adapter unit: \|\|sum_n dL_n/dB\|\|")},
    ),
    cheap=True,
    score=r"\|\|sum_n dL_n/dB\|\| of fresh adapters; B = 0, so that is the whole gradient, "
    r"s \|\|dY^T (gate * h)\|\|",
    source="Aletheia, arXiv 2604.15351, abstract",
    assumed="rows cancel before the norm, where `probe` squares each row's own gradient",
    cost="adapters; one forward and backward",
)
def gradient_norm(inputs: PolicyInputs) -> Floats:
    """Norm of the first full-batch gradient of fresh adapters."""
    return inputs.statistic("gradient_norm")


@policy(
    measure=Measure(
        f"{_HOME}.gradients:layer_card",
        {
            "residual_norm": Statistic(
                "L", "nats: covariance-normalised gradient of a linear adapter beside a block"
            ),
            "activation_energy": Statistic("L", "mean squared norm of a block's input per token"),
            "coupling": share("L, L", "absolute cosine of two layers' normalised gradients"),
        },
    ),
    cheap=True,
    score=r"greedy: largest res_k^2 (1 - max c_kj) over chosen j; res_k = \|\|G Sigma^-1/2\|\| of "
    "a linear adapter from the block's input to its output, c the absolute cosine of two layers' "
    "G Sigma^-1/2",
    source='"Understanding and Guiding Layer Placement in PEFT", arXiv 2602.04019, abstract, which '
    "names residual norm, activation energy and coupling",
    assumed="the adapter beside the whole block, the greedy combination, a ridge of 1e-3 of the "
    "mean eigenvalue; activation energy (tr Sigma) is stored and enters through Sigma alone",
    cost="two forwards, one backward",
)
def layer_card(inputs: PolicyInputs) -> Floats:
    """Projected residual norm of a block, discounted by its coupling to layers already chosen."""
    norm, coupling = inputs.statistic("residual_norm"), inputs.statistic("coupling")
    left, order = list(range(inputs.total)), list[int]()
    discount = np.ones(inputs.total)
    while left:
        gains = norm[left] ** 2 * discount[left]
        order.append(left.pop(int(np.argmax(gains))))
        discount = np.minimum(discount, 1 - coupling[order[-1]])
    return by_position(order)


@policy(
    measure=Measure(
        f"{_HOME}.weights:signal_share",
        {"signal_share": share("L, P", "singular values above the Marchenko-Pastur edge, by sum")},
    ),
    cheap=True,
    plain_weights=True,
    score="sum of the singular values above the Marchenko-Pastur edge over the sum of all, mean "
    "over projections",
    source="Spectrum, arXiv 2406.06623, which trains the layers of the highest signal over noise",
    assumed="a share instead of signal over noise (the same order for one matrix, and finite); the "
    "noise's scale from the median singular value; a mean over projections instead of a choice for "
    "each kind",
    cost="weights",
)
def spectrum(inputs: PolicyInputs) -> Floats:
    """Signal in the weights."""
    return np.asarray(inputs.statistic("signal_share").mean(axis=1))


@policy(
    measure=Measure(
        f"{_HOME}.forward:explained_variance",
        {"explained_variance": share("L, P", "of the inputs' variance, in the leading directions")},
    ),
    cheap=True,
    score="share of the variance of a projection's inputs in `rank` directions, mean over the "
    "adapted projections",
    source="EVA, arXiv 2410.07170, which gives rank to the weights whose inputs' leading singular "
    "vectors explain most variance",
    assumed="whole layers instead of ranks; covariance about the mean",
    cost="one forward",
)
def eva(inputs: PolicyInputs) -> Floats:
    """Share of the inputs' variance that r directions explain."""
    return np.asarray(inputs.statistic("explained_variance").mean(axis=1))


@policy(
    measure=Measure(
        f"{_HOME}.weights:lamp_kept",
        {"lamp_kept": share("L", "of the layer's weights, that global LAMP pruning keeps")},
    ),
    cheap=True,
    plain_weights=True,
    score=r"share of the layer's weights among the `keep` (0.5) highest scores w^2 / sum of w'^2 "
    r"over \|w'\| >= \|w\| of the matrix",
    source='"Layer-adaptive sparsity for the magnitude-based pruning" (LAMP), arXiv 2010.07611',
    assumed="what pruning would keep densest is adapted",
    cost="weights",
)
def lamp(inputs: PolicyInputs) -> Floats:
    """Share of a layer's weights that global pruning by LAMP scores would keep."""
    return inputs.statistic("lamp_kept")


_ANGLES = Measure(
    f"{_HOME}.forward:angles",
    {
        name: share(
            "L + 1, L + 1",
            "angle between the hidden states before layers i and j (L = after the last) over pi, "
            f"at {where}",
        )
        for name, where in (
            ("angular_last", "each row's last token"),
            ("angular_all", "all tokens"),
        )
    },
)


@policy(
    measure=_ANGLES,
    statistics=("angular_last",),
    cheap=True,
    score="angle between a block's input and output at the last token",
    source='"The unreasonable ineffectiveness of the deeper layers", arXiv 2403.17887',
    assumed="adapt where the source would not prune; block size 1",
    cost="one forward",
)
def angular(inputs: PolicyInputs) -> Floats:
    """How far a block turns the last token."""
    return np.diagonal(inputs.statistic("angular_last"), offset=1)


@policy(
    measure=_ANGLES,
    statistics=("angular_all",),
    cheap=True,
    score="the same over all real tokens",
    source="as `angular`",
    assumed="the same",
    cost="one forward",
)
def angular_all(inputs: PolicyInputs) -> Floats:
    """How far a block turns every token."""
    return np.diagonal(inputs.statistic("angular_all"), offset=1)


@policy(
    measure=_ANGLES,
    statistics=("angular_last",),
    score="the K contiguous layers between whose ends the last token turns most",
    source="as `angular`, with its block size n = K",
    assumed="the same",
    cost="one forward",
)
def angular_block(inputs: PolicyInputs) -> Floats:
    """How far K layers turn the last token together."""
    angles = inputs.statistic("angular_last")
    return best_window(np.diagonal(angles, offset=inputs.count), inputs.count)


@policy(
    measure=Measure(
        f"{_HOME}.forward:error_growth",
        {"error_growth": Statistic("L", "relative error of the last block's output per block k's")},
    ),
    score="relative error of the last block's output per relative error (noise of 10 %) of block "
    "k's output, mean over tokens",
    source="layer-wise sparsity by the accumulation of errors over layers, abstract",
    assumed="the disturbance, and that growing errors mark layers to adapt",
    cost="1 + L/2 forwards",
)
def error_propagation(inputs: PolicyInputs) -> Floats:
    """How much of a disturbance of a block's output is left at the last block."""
    return inputs.statistic("error_growth")


@policy(
    measure=Measure(
        f"{_HOME}.forward:zeroth_order",
        {
            "zeroth_order": Statistic(
                "L", "nats: norm of a block's weights times its forward-only gradient norm"
            )
        },
    ),
    plain_weights=True,
    score=r"\|\|W_k\|\| times the root mean square of (L(W + ez) - L(W - ez)) / 2e, z normal",
    source="ECoFLaP, arXiv 2310.02998, its coarse step",
    assumed="the product of the norms as the score, which bounds the first-order loss of removing "
    "the weights; one z (`probes`; the estimate's relative deviation is about 0.7 / sqrt(probes)); "
    "e = 1 % of the weights' size, 5 % in half precision",
    cost="1 + L forwards",
)
def coarse_to_fine(inputs: PolicyInputs) -> Floats:
    """Zeroth-order importance of a block."""
    return inputs.statistic("zeroth_order")


# what opening and closing the layers' warmed-up adapters does for the model


@policy(
    measure=Measure(
        f"{_HOME}.adapters:kl_to_full",
        {
            "kl_to_full": Statistic(
                "L", "nats: KL of all adapters' model to that of layer k's adapters alone"
            )
        },
    ),
    score=r"minus KL(all adapters \|\| layer k's alone) at the labels, mean over rows",
    source='"Distilling to hybrid attention models via KL-guided layer selection", '
    "arXiv 2512.20569, which restores a layer, trains briefly and ranks by the KL to the teacher",
    assumed="adapters are what is restored, all of them are the teacher, no training for each "
    "layer",
    cost="warm-up; 2 + L/2 forwards",
)
def kl_guided(inputs: PolicyInputs) -> Floats:
    """Layers whose adapters alone come nearest to the whole warmed-up model."""
    return -inputs.statistic("kl_to_full")


@policy(
    measure=Measure(
        f"{_HOME}.adapters:shapley",
        {
            "shapley": Statistic(
                "L", "nats: share of the loss that layer k's adapters take away", low=-inf
            )
        },
    ),
    score="Shapley value of layer k's adapters for v(S) = -loss with only S open, from a linear "
    "surrogate over sets of every size",
    source='"Pruning as a cooperative game", arXiv 2602.07804, abstract',
    assumed="adapters instead of layers; Shapley-kernel weights, under which all sets together "
    "give the exact value; two sets a layer",
    cost="warm-up; 2 + sets forwards",
)
def shapley(inputs: PolicyInputs) -> Floats:
    """What a layer's adapters add to sets of others."""
    return inputs.statistic("shapley")


@policy(
    measure=Measure(
        f"{_HOME}.adapters:forward_selection",
        {
            "forward_place": Statistic("L", "when layer k's adapters join, 1 = first"),
            "forward_loss": Statistic("L", "nats: the loss when they have joined"),
        },
    ),
    score="the order in which opening layers' adapters, one after the other, lowers the loss most",
    source="forward selection of regression, with adapters for variables",
    assumed="what the warm-up's adapters do together says what fresh ones on these layers would "
    "learn",
    measured="yes: no better than `adapter_fisher` after 60 and 200 steps (three seeds, two mixes)",
    cost="warm-up; L + L^2/4 forwards, or n (1 + L/2 - n/4) for the first n layers (`steps`)",
)
def forward_selection(inputs: PolicyInputs) -> Floats:
    """Each layer joins those already open."""
    return -inputs.statistic("forward_place")
