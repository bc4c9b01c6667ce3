"""``floe select``: the layers that get adapters, by the run's policy, and the places of every arm.

The paper's masks are computed and stored whatever decides. A sweep trains one arm for every number
of layers that is to be tried, and takes the smallest that the validation rows support.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from floe.adapters.targets import input_widths, parameter_counts, projection_shapes
from floe.artifacts.results import Search, ValidationLosses
from floe.artifacts.schema import read, write
from floe.config import Baseline, Schedule, SearchConfig
from floe.data.batches import fingerprint
from floe.decoder_blocks import find_blocks
from floe.evaluation import evaluate_rows
from floe.importance.scores import LayerStatistics, Scores
from floe.pipeline import identity, train
from floe.pipeline.inputs import RunInputs
from floe.pipeline.run_folder import Stage
from floe.pipeline.score import load_statistics, statistics_files
from floe.selection.masks.determine import PRESETS
from floe.selection.placement import (
    Options,
    Placement,
    Saturating,
    fit_gain,
    module_scores,
    option_costs,
)
from floe.selection.ranking import choose_count, layer_memory, saved_bytes_per_token
from floe.selection.select import Selection, select

LOSSES = "losses.json"


def stages(run: RunInputs) -> Iterator[Stage]:
    """The arms of a sweep, the selection, and the places of every arm's adapters."""
    settings, counts = run.config.select, swept_counts(run)
    for count in counts:
        evidence = Evidence.load(run, {settings.policy})
        placement = placed(run, evidence, choose(run, evidence, count), settings.choose)
        yield Stage(
            f"sweep/{count}",
            train.inputs(run, "sweep", placement),
            partial(_build_swept, run, count, placement),
            results=("adapter", "metrics.json", LOSSES),
            tidy=train.tidy,
        )
    swept = {count: run.path / f"sweep/{count}" / LOSSES for count in counts}
    yield Stage(
        "select",
        inputs(run) | {"sweep": {n: run.folder.digest(file) for n, file in swept.items()}},
        partial(build, run, swept),
        results=("selection.json", "masks.npz", "sweep.json"),
    )
    yield Stage(
        "arms",
        _place_inputs(run),
        partial(_build_places, run),
        results=(Path(train.PLACEMENTS).name,),
        disposable=True,
    )


def inputs(run: RunInputs) -> dict[str, Any]:
    """What decides the layers, but for a sweep."""
    settings, (rank, experts) = run.config.select, run.size
    decides = identity.of_stage(run, "select") | {
        "scores": run.folder.digest(run.path / "score/scores.npz"),
        "rank": rank,
        "num_experts": experts,
        "statistics": _statistics_digests(run, {settings.policy}),
    }
    if settings.tune is False:
        del decides["select.tune_tokens"]
    else:
        decides["adapter"] = identity.of_adapter(run, "search")
        decides["rows"] = fingerprint(run.calibration_rows)
    if settings.score != "path":
        del decides["select.budget_path"]
    if isinstance(settings.layers, dict) and "memory" in settings.layers:
        decides["tokens"] = run.config.train.batch_size * run.config.data.max_length
    return decides


def build(run: RunInputs, swept: dict[int, Path], folder: Path) -> None:
    """Write ``selection.json`` and ``masks.npz``; of a sweep ``sweep.json``, too."""
    count = None
    if swept:
        result = choose_count({n: read(ValidationLosses, f).rows for n, f in swept.items()})
        write(folder / "sweep.json", result)
        count = result.count
    choose(run, Evidence.load(run, {run.config.select.policy}), count).save(folder)


def _place_inputs(run: RunInputs) -> dict[str, Any]:
    search = run.config.search
    decides = inputs(run) | identity.values(run.config, "arms")
    return decides | {
        "selection": run.folder.digest(run.path / "select/selection.json"),
        "search.rank": search.rank,
        "search.num_experts": search.num_experts,
        "trials": run.folder.digest(run.path / "search/result.json"),
        "measured": _statistics_digests(run, run.policies),
    }


def _build_places(run: RunInputs, folder: Path) -> None:
    """Write ``placements.json``: where the adapters of every arm go."""
    evidence, chosen = Evidence.load(run, run.policies), Selection.load(run.path / "select")
    arms = {"main": placed(run, evidence, chosen, run.config.select.choose)}
    arms |= {arm.name: place_baseline(run, evidence, chosen, arm) for arm in run.config.baselines}
    write(folder / Path(train.PLACEMENTS).name, arms)


def _statistics_digests(run: RunInputs, policies: Set[str]) -> dict[str, str]:
    files = statistics_files(run, policies)
    return {name: run.folder.digest(file) for name, file in files.items()}


def swept_counts(run: RunInputs) -> list[int]:
    """The numbers of layers to try, ascending; none unless ``select.layers`` is a sweep."""
    layers: Any = run.config.select.layers
    if not (isinstance(layers, dict) and "sweep" in layers):
        return []
    counts = sorted(set(layers["sweep"]))
    total = len(find_blocks(run.base_model))
    if counts[-1] > total:
        raise ValueError(f"select.layers.sweep must be at most {total} layers, got {counts[-1]}")
    return counts


def _build_swept(run: RunInputs, count: int, placement: Placement, folder: Path) -> None:
    """Train one arm of a sweep, and write its losses on the validation rows, nats per token."""
    train.build(run, f"sweep/{count}", run.config.select.policy, placement, folder)
    size, pad = run.config.eval.batch_size, run.tokenizer.pad_token_id or 0
    with run.adapted(folder / "adapter") as model:
        losses = evaluate_rows(model, run.validation_rows, size, pad)
    write(folder / LOSSES, ValidationLosses((losses.nll / losses.tokens).tolist()))


@dataclass(frozen=True)
class Evidence:
    """What layers are chosen by: scores, layer statistics, and the search's ``result.json``."""

    scores: Scores
    statistics: LayerStatistics | None
    search: Search

    @classmethod
    def load(cls, run: RunInputs, policies: Set[str]) -> Evidence:
        """What the run's stages have left, as far as these policies look at it."""
        scores = Scores.load(run.path / "score/scores.npz")
        statistics = load_statistics(run, policies)
        return cls(scores, statistics, read(Search, run.path / "search/result.json"))

    @property
    def size(self) -> tuple[int, int]:
        """Rank and number of experts that the search decided on."""
        return self.search.rank, self.search.num_experts


def choose(run: RunInputs, evidence: Evidence, count: int | None = None) -> Selection:
    """Apply ``config.select``; tuning uses the warm-up model. ``count`` replaces its layers."""
    settings = run.config.select
    layers: Any = count or settings.layers
    memory = isinstance(layers, dict) and "memory" in layers
    options = _options(run, evidence, settings.policy, settings.preset) | {
        "layers": layers,
        "seed": settings.seed,
        "pick": settings.pick,
        "layer_memory": _layer_memory(run, evidence.size) if memory else None,
        "tune": settings.tune,
        "tune_tokens": settings.tune_tokens,
    }
    if settings.tune is False:
        return select(evidence.scores, **options)
    with run.adapted(run.path / "search/adapter") as model:
        batches = run.batches(run.calibration_rows, run.config.score.batch_size)
        tell = partial(run.progress.step, "select")
        return select(evidence.scores, model, batches, progress=tell, **options)


def _options(run: RunInputs, evidence: Evidence, policy: str, preset: str) -> dict[str, Any]:
    """The options of ``select`` that the run's own choice and its baselines' share."""
    settings = run.config.select
    return {
        "policy": policy,
        "preset": replace(PRESETS[preset], first_order=settings.first_order),
        "budget": settings.budget,
        "score": settings.score,
        "budget_path": settings.budget_path,
        "statistics": evidence.statistics,
    }


def _layer_memory(run: RunInputs, size: tuple[int, int]) -> list[int]:
    """What training each layer's adapters takes, in bytes."""
    config, element = run.adapter_config(*size), run.dtype.itemsize
    saved = [
        saved_bytes_per_token(widths, *size, element_bytes=element)
        for widths in input_widths(run.base_model, config)
    ]
    tokens = run.config.train.batch_size * run.config.data.max_length
    return layer_memory(parameter_counts(run.base_model, config), saved, tokens)


def place_baseline(
    run: RunInputs, evidence: Evidence, chosen: Selection, arm: Baseline
) -> Placement:
    """Where one baseline's adapters go: as many layers as the main arm chose, by its own policy.

    The policy ``all`` takes every one. The paper's masks at the run's own preset are those already
    computed, and tuned, for the main selection.
    """
    if arm.policy in ("all", *get_args(Schedule)):
        return Placement(tuple(range(len(chosen.layer_scores))))
    count, paper = len(chosen.layers), chosen.paper
    if arm.policy == "masks" and arm.preset == run.config.select.preset and arm.pick == "top":
        layers = tuple(sorted(paper.ranking[:count]))
        choice = replace(chosen, policy="masks", layers=layers, layer_scores=paper.layer_scores)
    else:
        options = _options(run, evidence, arm.policy, arm.preset)
        options |= {"layers": count, "seed": arm.seed, "pick": arm.pick}
        choice = select(evidence.scores, **options)
    return placed(run, evidence, choice, arm.choose)


def placed(run: RunInputs, evidence: Evidence, choice: Selection, kind: str) -> Placement:
    """Where adapters go by this choice; ``kind`` is ``config.select.choose`` or an arm's.

    Raises:
        ValueError: see :func:`place`; or the search's trials do not say what capacity is worth.
    """
    r0, gain = run.config.select.r0, None
    if kind == "sizes" and r0 is not None:
        gain = Saturating(r0)
    elif kind == "sizes":
        try:
            gain = fit_gain([vars(t) for t in evidence.search.trials if t.state == "complete"])
        except ValueError as error:
            problem = f"select.r0 must be set, the search does not tell it: {error}"
            raise ValueError(problem) from error
    options = size_options(run.config.search)
    return place(run, evidence.scores, choice, kind, evidence.size, options, gain)


def place(
    run: RunInputs,
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
    shapes = projection_shapes(run.base_model, run.adapter_config(*size))
    names = [str(name) for name in scores.meta["adapter_modules"]]
    parameters = np.array(
        [
            [option_costs([block[name]], [size])[0] if name in block else 0 for name in names]
            for block in shapes
        ]
    )
    budget = int(parameters[list(choice.layers)].sum())
    if kind == "modules":
        return Placement.of_modules(module_scores(scores, choice.policy), parameters, budget, names)
    assert gain is not None
    pairs = [(0, 0), *options]
    costs = np.array([option_costs(list(block.values()), pairs) for block in shapes])
    return Placement.of_sizes(choice.layer_scores, pairs, costs, budget, gain)


def size_options(search: SearchConfig) -> list[tuple[int, int]]:
    """The pairs (rank, experts) of the search space, in its order."""
    (low, high, step), (fewest, most, each) = search.rank, search.num_experts
    ranks, experts = range(low, high + 1, step), range(fewest, most + 1, each)
    return [(rank, count) for rank in ranks for count in experts]
