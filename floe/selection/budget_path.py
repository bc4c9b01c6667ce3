"""Layer scores over a path of budgets: the FLoE paper gives no value for its budget C. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from floe.selection.masks.determine import determine
from floe.selection.masks.presets import Preset
from floe.selection.masks.solvers import number
from floe.selection.ranking import layer_score
from floe.types import Floats

if TYPE_CHECKING:
    from floe.importance.scores import Scores

BUDGET_PATH = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, eq=False)
class PathScore:
    """scores [L]: the mean over budgets of a layer's masked share; shares [budgets, L]: each."""

    budgets: tuple[float, ...]
    scores: Floats
    shares: Floats


def path_score(
    scores: Scores, preset: str | Preset = "global", budgets: Sequence[float] = BUDGET_PATH
) -> PathScore:
    """Score layers by how much of them is masked on average over budgets; one solve for each.

    The share is half the masked share of the heads and half that of the neurons ("sparsity" of
    ranking.layer_score), of binary masks. It takes the place of choosing a budget.

    Args:
        scores, preset: see masks.determine.
        budgets: fractions of the Taylor mass in (0, 1]; used in ascending order, each once.

    Raises:
        ValueError: no budget, one that is given twice or out of range; see also determine.
    """
    path = tuple(sorted(number("budget_path", budget) for budget in budgets))
    if not path or len(set(path)) != len(path):
        raise ValueError(f"budget_path must hold budgets, each once, got {list(budgets)}")
    shares = []
    for budget in path:
        found = determine(scores, preset, budget)
        shares.append(layer_score(found.head_mask, found.neuron_mask, how="sparsity"))
    return PathScore(path, np.mean(shares, axis=0), np.array(shares))
