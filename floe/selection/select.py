"""Which layers get adapters: one policy decides, the FLoE paper's masks are computed beside it."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

import floe
from floe.artifacts.selection import PICKS, Masks, PaperSelection, Selection
from floe.selection.masks.determine import (
    BUDGET_PATH,
    Determination,
    budget_path_of,
    determine,
    path_score,
)
from floe.selection.masks.presets import GLOBAL, Preset, preset_of
from floe.selection.masks.solvers import number
from floe.selection.policies import POLICIES, PolicyInputs
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

__all__ = ["SelectOptions", "Selection", "select", "select_by"]


@dataclass(frozen=True, eq=False)
class SelectOptions:
    """What :func:`select` is asked for.

    Attributes:
        policy: a name in POLICIES; "all" chooses every layer whatever ``layers`` says.
        preset: a reading of the paper.
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
        layer_memory: bytes each layer takes while it is trained, [L], for layers={"memory": n}. See
            layer_count.layer_memory.
        tune: None runs the tuning stage if model and batches are there and the masks of this model
            can be tuned; True must run it, False does not.
        tune_tokens: real tokens the tuning stage may use.
        statistics: of the same model's layers, for the policies that need them.

    Raises:
        ValueError: an unknown name, or a number out of range. TypeError: a budget that is none.
    """

    policy: str = "adapter_fisher"
    preset: Preset = GLOBAL
    budget: float = 0.5
    layers: LayerCount = 8
    seed: int = 41
    score: str = "soft"
    pick: str = "top"
    budget_path: Sequence[float] = BUDGET_PATH
    layer_memory: Sequence[int] | None = None
    tune: bool | None = None
    tune_tokens: int = 2048
    statistics: LayerStatistics | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", number("budget", self.budget))
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {sorted(POLICIES)}, got {self.policy!r}")
        if self.pick not in PICKS:
            raise ValueError(f"pick must be one of {PICKS}, got {self.pick!r}")
        path = budget_path_of(self.budget_path) if self.score == "path" else ()
        object.__setattr__(self, "budget_path", path)


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
        preset: a name in PRESETS, or a Preset. The other options: see :class:`SelectOptions`.
        progress: called as progress(done, in all, "tune").

    Raises:
        ValueError: an unknown name, a number out of range, invalid scores, model without batches,
            or masks that cannot be tuned although ``tune`` is True.
        TypeError: an argument of a wrong type.

    Warns:
        RuntimeWarning: a score is zero everywhere, so that what depends on it is decided by ties;
            or the masks of this model cannot be tuned.
    """
    options = SelectOptions(
        policy,
        preset_of(preset),
        budget,
        layers,
        seed,
        score,
        pick,
        budget_path,
        layer_memory,
        tune,
        tune_tokens,
        statistics,
    )
    return select_by(options, scores, model, batches, progress)


def select_by(
    options: SelectOptions,
    scores: Scores,
    model: nn.Module | None = None,
    batches: Iterable[Batch] | None = None,
    progress: Progress | None = None,
) -> Selection:
    """:func:`select` with its options as one object."""
    if options.tune is not False and (model is None) != (batches is None):
        missing = "model" if model is None else "batches"
        raise ValueError(f"model and batches must be given together, got no {missing}")
    if options.tune and model is None:
        raise ValueError("model and batches must be given for tune=True, got none")
    _warn_degenerate(scores, options.policy)
    parts = _Parts(
        scores,
        options,
        determine(scores, options.preset, options.budget),
        path_score(scores, options.preset, options.budget_path) if options.budget_path else None,
    )
    why = "tune is False" if options.tune is False else "no model and batches were given"
    binary = parts.selection(untuned=why)  # also checks the rest before long work
    if options.tune is False or model is None or batches is None:
        return binary
    from floe.selection.masks.tuning import NotTunable, tune_masks  # the only part with torch

    try:
        tuning = tune_masks(
            model,
            (dict(batch) for batch in batches),
            *binary.masks,
            ridge=options.preset.ridge,
            bound=options.preset.bound,
            max_tokens=options.tune_tokens,
            progress=progress,
        )
    except NotTunable as error:
        if options.tune:
            raise ValueError(
                f"tune=True (select.tune: true) asks for masks that cannot be tuned: {error}"
            ) from error
        warnings.warn(
            f"the masks are not tuned, binary ones are scored: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return replace(binary, untuned=str(error))
    return parts.selection(tuning)


@dataclass(frozen=True, eq=False)
class _Parts:
    """What a selection is put together from; ``path`` where the masks' score is "path"."""

    scores: Scores
    options: SelectOptions
    binary: Determination
    path: Floats | None

    def selection(self, tuning: TuningResult | None = None, untuned: str = "") -> Selection:
        """The selection from tuned masks, or from binary ones and why they were not tuned."""
        options, kept = self.options, self.binary if tuning is None else tuning
        masks = Masks(kept.head_mask.astype(np.float64), kept.neuron_mask.astype(np.float64))
        paper = self._paper(masks)
        layer_scores, chosen = self._apply(paper.layer_scores)
        return Selection(
            policy=options.policy,
            preset=options.preset.name,
            budget=options.budget,
            score=options.score,
            seed=options.seed,
            pick=options.pick,
            budget_path=tuple(options.budget_path),
            layers=chosen,
            layer_scores=layer_scores,
            ranking=_order(layer_scores, options.pick),
            masks=masks,
            certificate=self.binary.certificate,
            moves=self.binary.moves,
            tuned=tuning is not None,
            untuned=untuned,
            tuning=[] if tuning is None else tuning.records,
            paper=paper,
            agreement={
                "spearman": spearman(layer_scores, paper.layer_scores),
                "overlap": overlap(chosen, paper.layers),
                "expected_overlap": expected_overlap(
                    len(chosen), len(paper.layers), len(layer_scores)
                ),
            },
            versions={
                "floe": floe.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        )

    def _paper(self, masks: Masks) -> PaperSelection:
        layer_scores = self.path
        if layer_scores is None:
            layer_scores = layer_score(*masks, how=self.options.score)
        ranking = _order(layer_scores)
        return PaperSelection(
            preset=self.options.preset.name,
            layers=choose_layers(ranking, self.options.layers, self._costs()),
            layer_scores=layer_scores,
            ranking=ranking,
            masked_head_fraction=_masked_fraction(masks.head_mask),
            masked_neuron_fraction=_masked_fraction(masks.neuron_mask),
        )

    def _costs(self) -> Any:
        """What each layer takes of the budget, where the number of layers depends on it."""
        if not isinstance(self.options.layers, Mapping):
            return None
        kind, _ = layer_budget(self.options.layers)
        if kind == "memory":
            return self.options.layer_memory
        return self.scores.meta.get("adapter_parameters")

    def _apply(self, mask_scores: Floats) -> tuple[Floats, tuple[int, ...]]:
        """The policy's layer scores and its chosen layers.

        A policy may depend on how many layers are wanted. Under a budget that is the largest count
        whose own choice fits.
        """
        options, total = self.options, len(mask_scores)

        def chosen(count: int) -> tuple[Floats, tuple[int, ...]]:
            inputs = PolicyInputs(
                self.scores, count, total, options.seed, mask_scores, options.statistics
            )
            layer_scores = POLICIES[options.policy](inputs)
            return layer_scores, choose_layers(_order(layer_scores, options.pick), count)

        if options.policy == "all":
            return chosen(total)
        if not isinstance(options.layers, Mapping):
            return chosen(count_layers(options.layers, total))
        (_, budget), costs = layer_budget(options.layers), self._costs()
        for count in range(total, 0, -1):
            layer_scores, layers = chosen(count)
            if sum(int(costs[layer]) for layer in layers) <= budget:
                return layer_scores, layers
        # Not even one layer fits; this says so.
        order = _order(layer_scores, options.pick)
        return layer_scores, choose_layers(order, options.layers, costs)


def _order(layer_scores: Floats, pick: str = "top") -> tuple[int, ...]:
    order = rank_layers(layer_scores if pick == "top" else -layer_scores)
    return tuple(order.tolist())


def _masked_fraction(mask: Floats) -> Floats:
    if not mask.shape[1]:
        return np.zeros(len(mask))
    return np.asarray((mask == 0).mean(axis=1), dtype=np.float64)


def _warn_degenerate(scores: Scores, policy: str) -> None:
    names = ("head_fisher", "neuron_fisher", "head_taylor", "neuron_taylor")
    for name in dict.fromkeys((*names, *POLICIES[policy].reads)):
        values = getattr(scores, name)
        if values is not None and np.size(values) and not np.any(values):
            warnings.warn(
                f"scores.{name} is zero everywhere: ties by index decide what depends on it",
                RuntimeWarning,
                stacklevel=4,
            )
