"""From the chosen layers to where adapters go: whole layers, or what their parameters also buy."""

from __future__ import annotations

from typing import Any

import numpy as np

from floe.adapters.targets import projection_shapes
from floe.config import SearchConfig
from floe.importance.scores import Scores
from floe.pipeline.inputs import Workspace
from floe.selection.allocate import Options, Saturating, fit_gain, option_costs
from floe.selection.placement import Placement, module_scores
from floe.selection.select import Selection


def place(
    work: Workspace,
    scores: Scores,
    choice: Selection,
    kind: str,
    size: tuple[int, int],
    options: Options = (),
    gain: Saturating | None = None,
) -> Placement:
    """Where adapters go, with at most the parameters of the chosen layers at ``size``.

    Args:
        kind: "layers" for the chosen ones; "modules" for the projections of most score; "sizes"
            for the rank and experts of every layer that gain most.
        size: rank and experts.
        options, gain: of "sizes": the pairs to choose from (besides no adapter), and what they
            are worth.

    Raises:
        ValueError: a policy without scores of projections, negative layer scores for "sizes".
    """
    if kind == "layers":
        return Placement(choice.layers)
    shapes = projection_shapes(work.base_model, work.adapter_config(*size))
    names = [str(name) for name in scores.meta["adapter_modules"]]
    parameters = np.array(
        [[option_costs([block[n]], [size])[0] if n in block else 0 for n in names]
         for block in shapes]
    )  # fmt: skip
    budget = int(parameters[list(choice.layers)].sum())
    if kind == "modules":
        return Placement.of_modules(module_scores(scores, choice.policy), parameters, budget, names)
    assert gain is not None
    pairs = [(0, 0), *options]
    costs = np.array([option_costs(list(block.values()), pairs) for block in shapes])
    return Placement.of_sizes(choice.layer_scores, pairs, costs, budget, gain)


def size_options(search: SearchConfig) -> list[tuple[int, int]]:
    """The pairs (rank, experts) of the search space, in its order."""
    (low, high, step), experts = search.rank, search.num_experts
    return [
        (rank, count)
        for rank in range(low, high + 1, step)
        for count in range(experts[0], experts[1] + 1, experts[2])
    ]


def capacity_gain(found: dict[str, Any], r0: float | None) -> Saturating:
    """What capacity is worth: as configured, else as the search's finished trials say.

    Raises:
        ValueError: the trials do not determine it (says why and what to set).
    """
    if r0 is not None:
        return Saturating(r0)
    trials = [trial for trial in found["trials"] if trial["state"] == "complete"]
    try:
        return fit_gain(trials)
    except ValueError as error:
        raise ValueError(f"select.r0 must be set, the search does not tell it: {error}") from error
