"""Which layers get adapters: masks, layer scores, policies. Only ``tuning`` needs torch."""

from floe.selection.budget_path import path_score
from floe.selection.layer_count import choose_count, layer_memory
from floe.selection.masks.determine import (
    MaskSolution,
    determine,
    refine_masks,
    solve_mask,
    solve_two_class,
    solve_two_class_literal,
)
from floe.selection.masks.presets import PRESETS, Preset
from floe.selection.modules import choose_modules
from floe.selection.policies import POLICIES
from floe.selection.ranking import choose_layers, layer_score, rank_layers, spearman
from floe.selection.select import Selection, select

__all__ = [
    "POLICIES",
    "PRESETS",
    "MaskSolution",
    "Preset",
    "Selection",
    "choose_count",
    "choose_layers",
    "choose_modules",
    "determine",
    "layer_memory",
    "layer_score",
    "path_score",
    "rank_layers",
    "refine_masks",
    "select",
    "solve_mask",
    "solve_two_class",
    "solve_two_class_literal",
    "spearman",
]
