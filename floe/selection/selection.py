"""Choosing the layers that get adapters: one policy decides, the FLoE paper's masks are always
computed beside it.
"""

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
from floe.selection.solvers import Floats

if TYPE_CHECKING:
    from torch import Tensor, nn

    from floe.importance.scores import Scores

Progress = Callable[[int, int, str], None]


class Masks(NamedTuple):
    """head_mask [L, H] and neuron_mask [L, I], float64: 0 = masked, 1 = retained, real-valued
    after tuning.
    """

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
        policy: a name in floe.selection.policies.POLICIES. "all" chooses every layer whatever
            ``layers`` says.
        preset: the reading of the paper: "global", "exact", "paper_layer", "alg1_literal", or a
            Preset.
        budget: fraction of the Taylor mass, in (0, 1].
        layers: how many: an int is a count, a float in (0, 1] a fraction (rounded up; 1 is one
            layer, 1.0 all), and {"params": n} the most layers in order of the ranking that fit n
            adapter parameters (scores.meta["adapter_parameters"]).
        seed: of the policies that draw.
        score: how masks become layer scores; see layer_score.
        tune: run the tuning stage if model and batches are there.
        tune_tokens: real tokens the tuning stage may use.
        progress: called as progress(done, in all, "tune").

    Raises:
        ValueError: an unknown name, a number out of range, invalid scores, or one of model and
            batches alone.
        TypeError: an argument of a wrong type.

    Warns:
        RuntimeWarning: a score is zero everywhere, so that what depends on it is decided by ties.
    """
    rule = _policy(policy)
    reading = preset_of(preset)
    if tune and (model is None) != (batches is None):
        missing = "model" if model is None else "batches"
        raise ValueError(f"model and batches must be given together, got no {missing}")
    _warn_degenerate(scores, policy)
    found = determine(scores, reading, budget)
    masks = _float_masks(found)
    records: list[dict[str, Any]] = []
    tuned = tune and model is not None and batches is not None
    if tuned:
        masks, records = _tune(model, batches, masks, reading, tune_tokens, progress)
    parameters = scores.meta.get("adapter_parameters") if isinstance(layers, Mapping) else None
    paper = _paper(reading, masks, layer_score(*masks, how=score), layers, parameters)
    layer_scores, chosen = _apply(rule, scores, paper.layer_scores, layers, parameters, seed)
    if policy == "all":
        chosen = tuple(range(len(layer_scores)))
    return Selection(
        policy=policy,
        preset=reading.name,
        budget=float(budget),
        score=score,
        seed=seed,
        layers=chosen,
        layer_scores=layer_scores,
        ranking=_order(layer_scores),
        masks=masks,
        certificate=found.certificate,
        moves=found.moves,
        tuned=tuned,
        tuning=records,
        paper=paper,
        agreement=_agreement(layer_scores, chosen, paper),
        versions=_versions(),
    )


def _policy(name: str) -> Policy:
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {sorted(POLICIES)}, got {name!r}")
    return POLICIES[name]


def _float_masks(found: Determination) -> Masks:
    return Masks(found.head_mask.astype(np.float64), found.neuron_mask.astype(np.float64))


def _tune(
    model: Any,
    batches: Any,
    masks: Masks,
    preset: Preset,
    max_tokens: int,
    progress: Progress | None,
) -> tuple[Masks, list[dict[str, Any]]]:
    from floe.selection.tuning import tune_masks  # the only part of the selection that needs torch

    result = tune_masks(
        model,
        batches,
        masks.head_mask,
        masks.neuron_mask,
        ridge=preset.ridge,
        bound=preset.bound,
        max_tokens=max_tokens,
        progress=progress,
    )
    keys = ("layer", "component", "accepted", "residual_before", "residual_after")
    records = [{key: record[key] for key in keys} for record in result.records]
    return Masks(result.head_mask, result.neuron_mask), records


def _order(layer_scores: Floats) -> tuple[int, ...]:
    return tuple(rank_layers(layer_scores).tolist())


def _paper(
    preset: Preset, masks: Masks, layer_scores: Floats, layers: LayerCount, parameters: Any
) -> PaperSelection:
    ranking = _order(layer_scores)
    return PaperSelection(
        preset=preset.name,
        layers=choose_layers(ranking, layers, parameters),
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
    rule: Policy,
    scores: Scores,
    mask_scores: Floats,
    layers: LayerCount,
    parameters: Any,
    seed: int,
) -> tuple[Floats, tuple[int, ...]]:
    """The policy's layer scores and its chosen layers.

    A policy may depend on how many layers are wanted. Under a parameter budget that is the largest
    count whose own choice fits.
    """
    total = len(mask_scores)
    if not isinstance(layers, Mapping):
        count = count_layers(layers, total)
        found = rule(Situation(scores, count, total, seed, mask_scores))
        return found, choose_layers(rank_layers(found), count)
    budget = parameter_budget(layers)
    for count in range(total, 0, -1):
        found = rule(Situation(scores, count, total, seed, mask_scores))
        chosen = choose_layers(rank_layers(found), count)
        if sum(int(parameters[layer]) for layer in chosen) <= budget:
            return found, chosen
    return found, choose_layers(rank_layers(found), layers, parameters)  # says what does not fit


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
