"""Which layers get adapters: one policy decides, the FLoE paper's masks are computed beside it."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import floe
from floe.selection import artifact
from floe.selection.masks import Determination, determine
from floe.selection.policies import POLICIES, Policy, Situation
from floe.selection.presets import Preset, preset_of
from floe.selection.ranking import (
    LayerCount,
    choose_layers,
    count_layers,
    expected_overlap,
    layer_score,
    overlap,
    parameter_budget,
    rank_layers,
    spearman,
)
from floe.selection.solvers import Floats, number

if TYPE_CHECKING:
    from torch import Tensor, nn

    from floe.importance.scores import Scores
    from floe.importance.statistics import LayerStatistics
    from floe.selection.tuning import TuningResult

Progress = Callable[[int, int, str], None]


class Masks(NamedTuple):
    """[L, H] and [L, I] float64: 0 = masked, 1 = retained, real-valued after tuning."""

    head_mask: Floats
    neuron_mask: Floats


@dataclass(frozen=True, eq=False)
class PaperSelection:
    """What the "masks" policy chooses, whatever policy decided.

    layers, layer_scores [L] and ranking as in :class:`Selection`; the masked fractions are shares
    of m == 0 per layer, [L].
    """

    preset: str
    layers: tuple[int, ...]
    layer_scores: Floats
    ranking: tuple[int, ...]
    masked_head_fraction: Floats
    masked_neuron_fraction: Floats


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen layers and how they were chosen. Layers are 0-based indices.

    Attributes:
        policy, preset, budget, score, seed: the options; budget is a fraction of the Taylor mass.
        layers: chosen, ascending.
        layer_scores: [L] float64, higher = chosen first; their scale is the policy's.
        ranking: all layers, most important first.
        masks: the paper's masks under ``preset``.
        certificate: of the masks before tuning: value, cost, budget, upper_bound, gap, optimal.
        moves: repairs, adds and swaps of the refinement.
        tuned: whether the masks went through the tuning stage.
        tuning: one record per tuned component: layer, component, accepted, residual_before,
            residual_after.
        paper: the "masks" policy's own choice from the same masks.
        agreement: spearman of the two score vectors (None if one is constant), overlap of the two
            choices and expected_overlap of two random choices of these sizes.
        versions: of what computed this.
    """

    policy: str
    preset: str
    budget: float
    score: str
    seed: int
    layers: tuple[int, ...]
    layer_scores: Floats
    ranking: tuple[int, ...]
    masks: Masks
    certificate: dict[str, Any]
    moves: dict[str, int]
    tuned: bool
    tuning: list[dict[str, Any]]
    paper: PaperSelection
    agreement: dict[str, float | int | None]
    versions: dict[str, str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write selection.json and masks.npz beside it; equal selections give equal bytes.

        Args:
            path: a folder that exists, or a file in one whose name ends in .json.

        Raises:
            FileError: it cannot be written.
        """
        artifact.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read what :meth:`save` wrote to the same path.

        Raises:
            FileError: a file is missing, damaged, or of another format.
        """
        return artifact.load(path)


def select(
    scores: Scores,
    model: nn.Module | None = None,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    *,
    policy: str = "adapter_fisher",
    preset: str | Preset = "global",
    budget: float = 0.5,
    layers: LayerCount = 8,
    seed: int = 41,
    score: str = "soft",
    tune: bool = True,
    tune_tokens: int = 2048,
    statistics: LayerStatistics | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Choose the layers to adapt.

    The paper's masks, layer scores and ranking are computed under ``preset`` whatever ``policy``
    decides, and stored with their agreement. With ``model`` and ``batches`` (and ``tune``) the
    masks also go through the paper's tuning stage; without them the binary masks are scored and
    ``tuned`` is False.

    Args:
        scores: of the model, from floe.score.
        model: the scored model. batches: calibration rows. Both or none; they load torch.
        policy: a name in POLICIES; "all" chooses every layer whatever ``layers`` says.
        preset: a reading of the paper: a name in PRESETS, or a Preset.
        budget: fraction of the Taylor mass, in (0, 1].
        layers: how many: an int is a count, a float in (0, 1] a fraction (rounded up; 1 is one
            layer, 1.0 all), and {"params": n} the most layers in order of the ranking that fit n
            adapter parameters (scores.meta["adapter_parameters"]).
        seed: of the policies that draw.
        score: how masks become layer scores; see layer_score.
        tune: run the tuning stage if model and batches are there.
        tune_tokens: real tokens the tuning stage may use.
        statistics: of the same model's layers, for the policies that need them (policies.NEEDS).
        progress: called as progress(done, in all, "tune").

    Raises:
        ValueError: an unknown name, a number out of range, invalid scores, model without batches.
        TypeError: an argument of a wrong type.

    Warns:
        RuntimeWarning: a score is zero everywhere, so that what depends on it is decided by ties.
    """
    share = number("budget", budget)
    options = _Options(policy, preset_of(preset), share, layers, seed, score, statistics)
    if tune and (model is None) != (batches is None):
        missing = "model" if model is None else "batches"
        raise ValueError(f"model and batches must be given together, got no {missing}")
    _warn_degenerate(scores, policy)
    found = determine(scores, options.preset, share)
    binary = _assemble(scores, options, found, None)  # also checks the rest before long work
    if not tune or model is None or batches is None:
        return binary
    tuning = _tune(model, batches, binary.masks, options.preset, tune_tokens, progress)
    return _assemble(scores, options, found, tuning)


def _tune(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    masks: Masks,
    preset: Preset,
    max_tokens: int,
    progress: Progress | None,
) -> TuningResult:
    from floe.selection.tuning import tune_masks  # the only part that needs torch

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
    statistics: LayerStatistics | None


def _assemble(
    scores: Scores, options: _Options, found: Determination, tuning: TuningResult | None
) -> Selection:
    """The selection from binary masks, or from tuned ones."""
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
        layers=chosen,
        layer_scores=layer_scores,
        ranking=_order(layer_scores),
        masks=masks,
        certificate=found.certificate,
        moves=found.moves,
        tuned=tuning is not None,
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


def _parameters(options: _Options, scores: Scores) -> Any:
    """Adapter parameters of each layer, where the number of layers depends on them."""
    return scores.meta.get("adapter_parameters") if isinstance(options.layers, Mapping) else None


def _order(layer_scores: Floats) -> tuple[int, ...]:
    return tuple(rank_layers(layer_scores).tolist())


def _paper(options: _Options, masks: Masks, scores: Scores) -> PaperSelection:
    layer_scores = layer_score(*masks, how=options.score)
    ranking = _order(layer_scores)
    return PaperSelection(
        preset=options.preset.name,
        layers=choose_layers(ranking, options.layers, _parameters(options, scores)),
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

    A policy may depend on how many layers are wanted. Under a parameter budget that is the largest
    count whose own choice fits.
    """
    total = len(mask_scores)

    def chosen(count: int) -> tuple[Floats, tuple[int, ...]]:
        found = rule(Situation(scores, count, total, options.seed, mask_scores, options.statistics))
        return found, choose_layers(rank_layers(found), count)

    if not isinstance(options.layers, Mapping):
        count = total if options.policy == "all" else count_layers(options.layers, total)
        return chosen(count)
    if options.policy == "all":
        return chosen(total)
    budget, parameters = parameter_budget(options.layers), _parameters(options, scores)
    for count in range(total, 0, -1):
        found, layers = chosen(count)
        if sum(int(parameters[layer]) for layer in layers) <= budget:
            return found, layers
    # Not even one layer fits; this says so.
    return found, choose_layers(rank_layers(found), options.layers, parameters)


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
