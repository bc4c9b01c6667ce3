"""Rules that order layers: functions of a :class:`Situation` to one score per layer, [L] float64.

Layers are ranked by descending score, ties to the lower index, so every policy gives a full
ranking. What the rules are worth is an empirical question: with a 135M model (8 of 30 layers, three
seeds, one epoch) adapter sensitivity did better than random layers on one mix of questions and was
level with them on another. No policy here is claimed to do better than that. docs/POLICIES.md lists
them with their sources, docs/METHOD.md has the figures.
"""

from __future__ import annotations

from floe.selection.policies import from_statistics as measured
from floe.selection.policies.baselines import (
    all_layers,
    even,
    even_layers,
    first,
    last,
    middle,
    random,
)
from floe.selection.policies.from_scores import (
    adapter_fisher,
    fisher_high,
    fisher_low,
    gate_fisher_diagonal,
    masks,
    probe,
    segment,
    segment_of,
    taylor_high,
    taylor_low,
)
from floe.selection.policies.from_statistics import NEEDS
from floe.selection.policies.inputs import Policy, Situation

__all__ = ["NEEDS", "POLICIES", "Policy", "Situation", "even_layers", "segment_of"]

POLICIES: dict[str, Policy] = {
    "masks": masks,
    "adapter_fisher": adapter_fisher,
    "probe": probe,
    "gate_fisher_diagonal": gate_fisher_diagonal,
    "fisher_high": fisher_high,
    "fisher_low": fisher_low,
    "taylor_high": taylor_high,
    "taylor_low": taylor_low,
    "segment": segment,
    "gradient_norm": measured.gradient_norm,
    "layer_card": measured.layer_card,
    "spectrum": measured.spectrum,
    "eva": measured.eva,
    "lamp": measured.lamp,
    "angular": measured.angular,
    "angular_all": measured.angular_all,
    "angular_block": measured.angular_block,
    "error_propagation": measured.error_propagation,
    "coarse_to_fine": measured.coarse_to_fine,
    "kl_guided": measured.kl_guided,
    "shapley": measured.shapley,
    "forward_selection": measured.forward_selection,
    "random": random,
    "even": even,
    "first": first,
    "last": last,
    "middle": middle,
    "all": all_layers,
}
