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
from floe.errors import require
from floe.selection.masks.determine import (
    BUDGET_PATH,
    GLOBAL,
    Determination,
    Preset,
    budget_path_of,
    determine,
    path_score,
    preset_of,
)
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

    from floe.importance.scores import LayerStatistics, Scores
    from floe.selection.masks.tuning import TuningResult

__all__ = ["SelectOptions", "Selection", "select"]


@dataclass(frozen=True, eq=False)
class SelectOptions:
    """What :func:`select` is asked for.

    Attributes:
        policy: a name in POLICIES; "all" chooses every layer whatever ``layers`` says.
        preset: a reading of the paper, a name in PRESETS or a Preset.
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
            ranking.layer_memory.
        tune: None runs the tuning stage if model and batches are there and the masks of this model
            can be tuned; True must run it, False does not.
        tune_tokens: real tokens the tuning stage may use.
        statistics: of the same model's layers, for the policies that need them.

    Raises:
        ValueError: an unknown name, or a number out of range. TypeError: a budget that is none.
    """

    policy: str = "adapter_fisher"
    preset: str | Preset = GLOBAL
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
        object.__setattr__(self, "preset", preset_of(self.preset))
        object.__setattr__(self, "budget", number("budget", self.budget))
        require(self.policy in POLICIES, f"policy must be one of {sorted(POLICIES)}", self.policy)
        require(self.pick in PICKS, f"pick must be one of {PICKS}", self.pick)
        path = budget_path_of(self.budget_path) if self.score == "path" else ()
        object.__setattr__(self, "budget_path", path)


def select(
    scores: Scores,
    model: nn.Module | None = None,
    batches: Iterable[Batch] | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Selection:
    """Choose the layers to adapt; ``policy`` decides.

    The paper's masks, layer scores and ranking are computed and stored beside it. With ``model``
    and ``batches`` the masks also go through the paper's tuning stage where the model's can; else
    the binary masks are scored, ``tuned`` is False and ``untuned`` says why.

    Args:
        scores: of the model, from floe.score.
        model, batches: the scored model and calibration rows, both or none; they load torch.
        progress: called as progress(done, in all, "tune").
        options: policy, preset, budget, layers and so on, see :class:`SelectOptions`.

    Raises:
        ValueError: an unknown name, a number out of range, invalid scores, model without batches,
            or masks that cannot be tuned although ``tune`` is True.
        TypeError: an argument of a wrong type, or one that is not known.
    Warns RuntimeWarning of scores that are zero everywhere, and of masks that cannot be tuned.
    """
    asked = SelectOptions(**options)
    if asked.tune is not False and (model is None) != (batches is None):
        missing = "model" if model is None else "batches"
        raise ValueError(f"model and batches must be given together, got no {missing}")
    if asked.tune and model is None:
        raise ValueError("model and batches must be given for tune=True, got none")
    _warn_degenerate(scores, asked.policy)
    preset = preset_of(asked.preset)
    masks = determine(scores, preset, asked.budget)
    path = path_score(scores, preset, asked.budget_path) if asked.budget_path else None
    why = "tune is False" if asked.tune is False else "no model and batches were given"
    binary = _selection(scores, asked, masks, path, untuned=why)  # checks the rest before long work
    if asked.tune is False or model is None or batches is None:
        return binary
    from floe.selection.masks.tuning import NotTunable, tune_masks  # the only part with torch

    try:
        tuning = tune_masks(
            model,
            batches,
            *binary.masks,
            ridge=preset.ridge,
            bound=preset.bound,
            max_tokens=asked.tune_tokens,
            progress=progress,
        )
    except NotTunable as error:
        if asked.tune:
            rule = "tune=True (select.tune: true) asks for masks that cannot be tuned"
            raise ValueError(f"{rule}: {error}") from error
        text = f"the masks are not tuned, binary ones are scored: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return replace(binary, untuned=str(error))
    return _selection(scores, asked, masks, path, tuning)


def _selection(
    scores: Scores,
    options: SelectOptions,
    binary: Determination,
    path: Floats | None,
    tuning: TuningResult | None = None,
    untuned: str = "",
) -> Selection:
    """The selection from tuned masks, or from binary ones and why they were not tuned.

    ``path`` has the masks' layer scores where their score is "path".
    """
    final, preset = binary if tuning is None else tuning, preset_of(options.preset)
    masks = Masks(final.head_mask.astype(np.float64), final.neuron_mask.astype(np.float64))
    mask_scores = layer_score(*masks, how=options.score) if path is None else path
    order, costs = _order(mask_scores), _costs(scores, options)
    paper = PaperSelection(
        preset=preset.name,
        layers=choose_layers(order, options.layers, costs),
        layer_scores=mask_scores,
        ranking=order,
        masked_head_fraction=_masked_fraction(masks.head_mask),
        masked_neuron_fraction=_masked_fraction(masks.neuron_mask),
    )
    layer_scores, layers = _apply_policy(scores, options, mask_scores, costs)
    chance = expected_overlap(len(layers), len(paper.layers), len(layer_scores))
    return Selection(
        policy=options.policy,
        preset=preset.name,
        budget=options.budget,
        score=options.score,
        seed=options.seed,
        pick=options.pick,
        budget_path=tuple(options.budget_path),
        layers=layers,
        layer_scores=layer_scores,
        ranking=_order(layer_scores, options.pick),
        masks=masks,
        certificate=binary.certificate,
        moves=binary.moves,
        tuned=tuning is not None,
        untuned=untuned,
        tuning=[] if tuning is None else tuning.records,
        paper=paper,
        agreement={
            "spearman": spearman(layer_scores, mask_scores),
            "overlap": overlap(layers, paper.layers),
            "expected_overlap": chance,
        },
        versions={
            "floe": floe.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    )


def _costs(scores: Scores, options: SelectOptions) -> Any:
    """What each layer takes of the budget, where the number of layers depends on it."""
    if not isinstance(options.layers, Mapping):
        return None
    kind, _ = layer_budget(options.layers)
    return options.layer_memory if kind == "memory" else scores.meta.get("adapter_parameters")


def _apply_policy(
    scores: Scores, options: SelectOptions, mask_scores: Floats, costs: Any
) -> tuple[Floats, tuple[int, ...]]:
    """The policy's layer scores and its chosen layers.

    A policy may depend on how many layers are wanted. Under a budget that is the largest count
    whose own choice fits.
    """
    total, layers = len(mask_scores), options.layers

    def choice(count: int) -> tuple[Floats, tuple[int, ...]]:
        inputs = PolicyInputs(scores, count, total, options.seed, mask_scores, options.statistics)
        layer_scores = POLICIES[options.policy](inputs)
        return layer_scores, choose_layers(_order(layer_scores, options.pick), count)

    if options.policy == "all":
        return choice(total)
    if not isinstance(layers, Mapping):
        return choice(count_layers(layers, total))
    _, budget = layer_budget(layers)
    for count in range(total, 0, -1):
        layer_scores, chosen = choice(count)
        if sum(int(costs[layer]) for layer in chosen) <= budget:
            return layer_scores, chosen
    # Not even one layer fits; this says so.
    return layer_scores, choose_layers(_order(layer_scores, options.pick), layers, costs)


def _order(layer_scores: Floats, pick: str = "top") -> tuple[int, ...]:
    return tuple(rank_layers(layer_scores if pick == "top" else -layer_scores).tolist())


def _masked_fraction(mask: Floats) -> Floats:
    return np.asarray((mask == 0).mean(axis=1)) if mask.shape[1] else np.zeros(len(mask))


def _warn_degenerate(scores: Scores, policy: str) -> None:
    names = ("head_fisher", "neuron_fisher", "head_taylor", "neuron_taylor")
    for name in dict.fromkeys((*names, *POLICIES[policy].reads)):
        values = getattr(scores, name)
        if values is not None and np.size(values) and not np.any(values):
            text = f"scores.{name} is zero everywhere: ties by index decide what depends on it"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
