"""What policies ask about a model's layers beyond the scores, measured on the model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

import floe
from floe.data.batches import fingerprint, rows_of
from floe.data.loss import token_mask
from floe.decoder_blocks import find_blocks
from floe.errors import require
from floe.importance.layer_statistics.weights import adapted_projections, projections
from floe.importance.scores import LayerStatistics
from floe.selection.policies import POLICIES
from floe.selection.policies.registry import Measure
from floe.types import Batch, Floats, Progress

__all__ = ["measure_statistics"]


def measure_statistics(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Iterable[str],
    *,
    seed: int = 41,
    rank: int = 8,
    keep: float = 0.5,
    sets: int | None = None,
    probes: int = 1,
    steps: int | None = None,
    progress: Progress | None = None,
) -> LayerStatistics:
    """What the policies ``names`` need to know about each layer, measured on the model.

    In eval mode, frozen; the model is left unchanged. All but gradient_norm, kl_guided, shapley and
    forward_selection, which need floe adapters, look at the base model alone.

    Args:
        model: a causal language model, plain or with floe adapters.
        batches: calibration rows: dicts passed to the model, with labels. A row's loss is its mean
            NLL over labelled tokens.
        names: of policies, see floe.selection.policies.POLICIES; those that need nothing are fine.
        seed: of all draws (adapters, noise, sets). rank: directions of eva. keep: share of weights
            of lamp. sets: of shapley; None = two for each adapted layer. probes: of coarse_to_fine;
            the relative deviation of its estimate is about 0.7 / sqrt(probes). steps: layers that
            forward_selection chooses one after the other; None = all, which costs L^2 / 4 forwards.
        progress: called as progress(done, in all, policy).

    Raises:
        ValueError: an unknown name, a number out of range, no rows, rows without labels, or a
            model that lacks what a policy looks at (adapters, unquantised weights).
    """
    wanted, rows = list(dict.fromkeys(names)), list(batches)
    unknown = [name for name in wanted if name not in POLICIES]
    require(not unknown, f"names must be policies of {sorted(POLICIES)}", unknown)
    if not rows:
        raise ValueError("batches must hold at least one row, got none")
    options: dict[str, Any] = {"seed": seed, "rank": rank, "keep": keep}
    options |= {"sets": sets, "probes": probes, "steps": steps}
    needed: dict[Measure, dict[str, None]] = {}  # measure -> the wanted statistics, each once
    for policy in (POLICIES[name] for name in wanted):
        if policy.measure is not None:
            needed.setdefault(policy.measure, {}).update(dict.fromkeys(policy.statistics))
    values: dict[str, Floats] = {}
    for measure, statistics in needed.items():
        given = {"model": model, "batches": rows, "statistics": list(statistics)}
        values |= _measured(measure, given | options | {"progress": progress})
    meta = {
        "policies": wanted,
        "rows": sum(len(batch["input_ids"]) for batch in rows),
        "tokens": sum(int(token_mask(batch).sum()) for batch in rows),
        "data": fingerprint(rows_of(rows)),
        **options,
        "projections": projections(model),
        "eva_projections": adapted_projections(model),
        "versions": {"floe": floe.__version__},
    }
    return LayerStatistics(len(find_blocks(model)), values, meta)


def _measured(measure: Measure, given: dict[str, Any]) -> dict[str, Floats]:
    """Call the measure with what it has parameters for; the wanted statistics by name."""
    function = measure.by
    if isinstance(function, str):
        module, _, name = function.partition(":")
        function = getattr(importlib.import_module(module), name)
    taken = inspect.signature(function).parameters
    result = function(**{name: value for name, value in given.items() if name in taken})
    if len(measure.gives) == 1:
        result = dict.fromkeys(measure.gives, result)
    return {name: result[name] for name in given["statistics"]}
