"""Which layers get adapters: one policy decides, the FLoE paper's masks are computed beside it."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

import floe
from floe.selection.artifact import PICKS, Masks, PaperSelection, Selection
from floe.selection.budget_path import BUDGET_PATH, PathScore, path_score
from floe.selection.masks.determine import Determination, determine
from floe.selection.masks.presets import Preset, preset_of
from floe.selection.masks.solvers import number
from floe.selection.policies import POLICIES, Policy, Situation
from floe.selection.ranking import (
    LayerCount,
    choose_layers,
    count_layers,
    expected_overlap,
    layer_budget,
    layer_score,
    overlap,
    rank_layers,
    spearman,
)
from floe.types import Batch, Floats, Progress

if TYPE_CHECKING:
    from torch import nn

    from floe.importance.scores import Scores
    from floe.importance.statistics import LayerStatistics
    from floe.selection.masks.tuning import TuningResult

__all__ = ["Masks", "PaperSelection", "Selection", "select"]


def select(
    scores: Scores,
    model: nn.Module | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    policy: str = "adapter_fisher",
    preset: str | Preset = "global",
    budget: float = 0.5,
    layers: LayerCount = 8,
    seed: int = 41,
    score: str = "soft",
    pick: str = "top",
    budget_path: Sequence[float] = BUDGET_PATH,
    layer_memory: Sequence[int] | None = None,
    tune: bool | None = None,
    tune_tokens: int = 2048,
    statistics: LayerStatistics | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Choose the layers to adapt.

    The paper's masks, layer scores and ranking are computed under ``preset`` whatever ``policy``
    decides, and stored with their agreement. With ``model`` and ``batches`` the masks also go
    through the paper's tuning stage where the model's can; else the binary masks are scored,
    ``tuned`` is False and ``untuned`` says why.

    Args:
        scores: of the model, from floe.score.
        model: the scored model. batches: calibration rows. Both or none; they load torch.
        policy: a name in POLICIES; "all" chooses every layer whatever ``layers`` says.
        preset: a reading of the paper: a name in PRESETS, or a Preset.
        budget: fraction of the Taylor mass, in (0, 1].
        layers: how many: an int is a count, a float in (0, 1] a fraction (rounded up; 1 is one
            layer, 1.0 all), and {"params": n} or {"memory": n} the most layers in order of the
            ranking that fit n adapter parameters (scores.meta["adapter_parameters"]) or n bytes.
        seed: of the policies that draw.
        score: how masks become layer scores; see layer_score. "path" averages over ``budget_path``
            what share of a layer is masked, so that no single budget decides; it looks at binary
            masks, whatever is tuned.
        pick: "top", or "bottom" for the layers of lowest score: the reversed ranking of any policy,
            an ablation. Ties go to the lower index either way.
        budget_path: budgets in (0, 1] for score "path".
        layer_memory: bytes each layer takes while it is trained, [L], for layers={"memory": n}; by
            default scores.meta["adapter_memory"]. See counts.layer_memory.
        tune: None runs the tuning stage if model and batches are there and the masks of this model
            can be tuned; True must run it, False does not.
        tune_tokens: real tokens the tuning stage may use.
        statistics: of the same model's layers, for the policies that need them (policies.NEEDS).
        progress: called as progress(done, in all, "tune").

    Raises:
        ValueError: an unknown name, a number out of range, invalid scores, model without batches,
            or masks that cannot be tuned although ``tune`` is True.
        TypeError: an argument of a wrong type.

    Warns:
        RuntimeWarning: a score is zero everywhere, so that what depends on it is decided by ties;
            or the masks of this model cannot be tuned.
    """
    share = number("budget", budget)
    options = _Options(
        policy, preset_of(preset), share, layers, seed, score, pick, layer_memory, statistics
    )
    if pick not in PICKS:
        raise ValueError(f"pick must be one of {PICKS}, got {pick!r}")
    if tune is not False and (model is None) != (batches is None):
        missing = "model" if model is None else "batches"
        raise ValueError(f"model and batches must be given together, got no {missing}")
    if tune and model is None:
        raise ValueError("model and batches must be given for tune=True, got none")
    _warn_degenerate(scores, policy)
    if score == "path":
        options = replace(options, path=path_score(scores, options.preset, budget_path))
    found = determine(scores, options.preset, share)
    why = "tune is False" if tune is False else "no model and batches were given"
    binary = _assemble(scores, options, found, None, why)  # also checks the rest before long work
    if tune is False or model is None or batches is None:
        return binary
    from floe.selection.masks.tuning import NotTunable  # the only part that needs torch

    try:
        tuning = _tune(model, batches, binary.masks, options.preset, tune_tokens, progress)
    except NotTunable as error:
        if tune:
            raise ValueError(
                f"tune=True (select.tune: true) asks for masks that cannot be tuned: {error}"
            ) from error
        warnings.warn(
            f"the masks are not tuned, binary ones are scored: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return replace(binary, untuned=str(error))
    return _assemble(scores, options, found, tuning)


def _tune(
    model: nn.Module,
    batches: Iterable[Batch],
    masks: Masks,
    preset: Preset,
    max_tokens: int,
    progress: Progress | None,
) -> TuningResult:
    from floe.selection.masks.tuning import tune_masks

    rows = (dict(batch) for batch in batches)
    return tune_masks(
        model,
        rows,
        *masks,
        ridge=preset.ridge,
        bound=preset.bound,
        max_tokens=max_tokens,
        progress=progress,
    )


@dataclass(frozen=True)
class _Options:
    """What select was asked for."""

    policy: str
    preset: Preset
    budget: float
    layers: LayerCount
    seed: int
    score: str
    pick: str
    layer_memory: Sequence[int] | None
    statistics: LayerStatistics | None
    path: PathScore | None = None  # where the score is "path"


def _assemble(
    scores: Scores,
    options: _Options,
    found: Determination,
    tuning: TuningResult | None,
    untuned: str = "",
) -> Selection:
    """The selection from tuned masks, or from binary ones and why they were not tuned."""
    rule = _policy(options.policy)
    masks = _masks(found if tuning is None else tuning)
    paper = _paper(options, masks, scores)
    layer_scores, chosen = _apply(rule, options, scores, paper.layer_scores)
    return Selection(
        policy=options.policy,
        preset=options.preset.name,
        budget=options.budget,
        score=options.score,
        seed=options.seed,
        pick=options.pick,
        budget_path=() if options.path is None else options.path.budgets,
        layers=chosen,
        layer_scores=layer_scores,
        ranking=_order(layer_scores, options.pick),
        masks=masks,
        certificate=found.certificate,
        moves=found.moves,
        tuned=tuning is not None,
        untuned=untuned,
        tuning=[] if tuning is None else _records(tuning),
        paper=paper,
        agreement=_agreement(layer_scores, chosen, paper),
        versions=_versions(),
    )


def _policy(name: str) -> Policy:
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {sorted(POLICIES)}, got {name!r}")
    return POLICIES[name]


def _masks(found: Determination | TuningResult) -> Masks:
    return Masks(found.head_mask.astype(np.float64), found.neuron_mask.astype(np.float64))


def _records(tuning: TuningResult) -> list[dict[str, Any]]:
    keys = ("layer", "component", "accepted", "residual_before", "residual_after")
    return [{key: record[key] for key in keys} for record in tuning.records]


def _costs(options: _Options, scores: Scores) -> Any:
    """What each layer takes of the budget, where the number of layers depends on it."""
    if not isinstance(options.layers, Mapping):
        return None
    kind, _ = layer_budget(options.layers)
    if kind == "memory" and options.layer_memory is not None:
        return options.layer_memory
    return scores.meta.get({"params": "adapter_parameters", "memory": "adapter_memory"}[kind])


def _order(layer_scores: Floats, pick: str = "top") -> tuple[int, ...]:
    found = rank_layers(layer_scores if pick == "top" else -layer_scores)
    return tuple(found.tolist())


def _paper(options: _Options, masks: Masks, scores: Scores) -> PaperSelection:
    if options.path is None:
        layer_scores = layer_score(*masks, how=options.score)
    else:
        layer_scores = options.path.scores
    ranking = _order(layer_scores)
    return PaperSelection(
        preset=options.preset.name,
        layers=choose_layers(ranking, options.layers, _costs(options, scores)),
        layer_scores=layer_scores,
        ranking=ranking,
        masked_head_fraction=_masked_fraction(masks.head_mask),
        masked_neuron_fraction=_masked_fraction(masks.neuron_mask),
    )


def _masked_fraction(mask: Floats) -> Floats:
    if not mask.shape[1]:
        return np.zeros(len(mask))
    return np.asarray((mask == 0).mean(axis=1), dtype=np.float64)


def _apply(
    rule: Policy, options: _Options, scores: Scores, mask_scores: Floats
) -> tuple[Floats, tuple[int, ...]]:
    """The policy's layer scores and its chosen layers.

    A policy may depend on how many layers are wanted. Under a budget that is the largest count
    whose own choice fits.
    """
    total = len(mask_scores)

    def chosen(count: int) -> tuple[Floats, tuple[int, ...]]:
        found = rule(Situation(scores, count, total, options.seed, mask_scores, options.statistics))
        return found, choose_layers(_order(found, options.pick), count)

    if not isinstance(options.layers, Mapping):
        count = total if options.policy == "all" else count_layers(options.layers, total)
        return chosen(count)
    if options.policy == "all":
        return chosen(total)
    (_, budget), costs = layer_budget(options.layers), _costs(options, scores)
    for count in range(total, 0, -1):
        found, layers = chosen(count)
        if sum(int(costs[layer]) for layer in layers) <= budget:
            return found, layers
    # Not even one layer fits; this says so.
    return found, choose_layers(_order(found, options.pick), options.layers, costs)


def _agreement(
    layer_scores: Floats, chosen: tuple[int, ...], paper: PaperSelection
) -> dict[str, float | int | None]:
    return {
        "spearman": spearman(layer_scores, paper.layer_scores),
        "overlap": overlap(chosen, paper.layers),
        "expected_overlap": expected_overlap(len(chosen), len(paper.layers), len(layer_scores)),
    }


def _warn_degenerate(scores: Scores, policy: str) -> None:
    names = ["head_fisher", "neuron_fisher", "head_taylor", "neuron_taylor"]
    names += {"adapter_fisher": ["adapter_fisher"], "probe": ["probe_fisher"]}.get(policy, [])
    for name in names:
        values = getattr(scores, name)
        if values is not None and np.size(values) and not np.any(values):
            warnings.warn(
                f"scores.{name} is zero everywhere: ties by index decide what depends on it",
                RuntimeWarning,
                stacklevel=3,
            )


def _versions() -> dict[str, str]:
    return {
        "floe": floe.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
