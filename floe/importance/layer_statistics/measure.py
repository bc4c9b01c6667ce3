"""Measure the layer statistics that named policies need, and only those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import floe
from floe.adapters.targets import adapted_layers
from floe.data.batches import fingerprint, rows_of
from floe.data.loss import token_mask
from floe.decoder_blocks import find_blocks
from floe.importance.layer_statistics import activations as activations
from floe.importance.layer_statistics import adapters as adapters
from floe.importance.layer_statistics import forward as forward
from floe.importance.layer_statistics import gradients as gradients
from floe.importance.layer_statistics import weights as weights
from floe.importance.statistics import LayerStatistics
from floe.selection.policies import NEEDS, POLICIES
from floe.types import Batch, Floats, Progress


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

    In eval mode with everything frozen; the model is left unchanged. All but gradient_norm,
    kl_guided, shapley and forward_selection, which need floe adapters, look at the base model
    alone.

    Args:
        model: a causal language model, plain or with floe adapters.
        batches: calibration rows: dicts passed to the model, with labels. A row's loss is its mean
            NLL over labelled tokens.
        names: of policies, see floe.selection.policies.NEEDS; those that need nothing are fine.
        seed: of all draws (adapters, noise, sets). rank: directions of eva. keep: share of weights
            of lamp. sets: of shapley; None = two for each adapted layer. probes: of coarse_to_fine;
            the relative deviation of its estimate is about 0.7 / sqrt(probes). steps: layers that
            forward_selection chooses one after the other; None = all, which costs L^2 / 4 forwards.
        progress: called as progress(done, in all, policy).

    Raises:
        ValueError: an unknown name, a number out of range, no rows, rows without labels, or a
            model that lacks what a policy looks at (adapters, unquantised weights).
    """
    wanted = _policies(names)
    rows = list(batches)
    if not rows:
        raise ValueError("batches must hold at least one row, got none")
    job = _Job(model, rows, seed, rank, keep, sets, probes, steps, progress)
    needed = {statistic for name in wanted for statistic in NEEDS.get(name, ())}
    values: dict[str, Floats] = {}
    for statistics, measure in _MEASURES.items():
        here = [name for name in statistics if name in needed]
        if here:
            values |= measure(job, here)
    return LayerStatistics(len(find_blocks(model)), values, _describe(job, wanted))


def _policies(names: Iterable[str]) -> list[str]:
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in POLICIES]
    if unknown:
        raise ValueError(f"names must be policies of {sorted(POLICIES)}, got {unknown}")
    return wanted


@dataclass(frozen=True)
class _Job:
    """What there is to measure, and how."""

    model: nn.Module
    batches: list[Batch]
    seed: int
    rank: int
    keep: float
    sets: int | None
    probes: int
    steps: int | None
    progress: Progress | None


def _signal(job: _Job, _names: Sequence[str]) -> dict[str, Floats]:
    return {"signal_share": weights.signal_share(job.model, job.progress)}


def _lamp(job: _Job, _names: Sequence[str]) -> dict[str, Floats]:
    return {"lamp_kept": weights.lamp_kept(job.model, job.keep, job.progress)}


def _eva(job: _Job, _names: Sequence[str]) -> dict[str, Floats]:
    names = _targets(job.model)
    found = activations.explained_variance(job.model, job.batches, names, job.rank, job.progress)
    return {"explained_variance": found}


def _angles(job: _Job, names: Sequence[str]) -> dict[str, Floats]:
    return activations.angles(job.model, job.batches, names, job.progress)


def _errors(job: _Job, _names: Sequence[str]) -> dict[str, Floats]:
    return {"error_growth": forward.error_growth(job.model, job.batches, job.seed, job.progress)}


def _zeroth(job: _Job, _names: Sequence[str]) -> dict[str, Floats]:
    found = forward.zeroth_order(job.model, job.batches, job.seed, job.probes, job.progress)
    return {"zeroth_order": found}


def _gradient(job: _Job, _names: Sequence[str]) -> dict[str, Floats]:
    found = gradients.gradient_norm(job.model, job.batches, job.seed, job.progress)
    return {"gradient_norm": found}


def _card(job: _Job, names: Sequence[str]) -> dict[str, Floats]:
    found = gradients.layer_card(job.model, job.batches, job.progress)
    return {name: found[name] for name in names}


def _kl(job: _Job, _names: Sequence[str]) -> dict[str, Floats]:
    return {"kl_to_full": adapters.kl_to_full(job.model, job.batches, job.progress)}


def _shapley(job: _Job, _names: Sequence[str]) -> dict[str, Floats]:
    found = adapters.shapley(job.model, job.batches, job.sets, job.seed, job.progress)
    return {"shapley": found}


def _forward_selection(job: _Job, names: Sequence[str]) -> dict[str, Floats]:
    place, loss = adapters.forward_selection(job.model, job.batches, job.steps, job.progress)
    found = {"forward_place": place, "forward_loss": loss}
    return {name: found[name] for name in names}


_Measure = Callable[[_Job, Sequence[str]], dict[str, Floats]]
_MEASURES: dict[tuple[str, ...], _Measure] = {
    ("signal_share",): _signal,
    ("lamp_kept",): _lamp,
    ("explained_variance",): _eva,
    ("angular_last", "angular_all"): _angles,
    ("error_growth",): _errors,
    ("zeroth_order",): _zeroth,
    ("gradient_norm",): _gradient,
    ("residual_norm", "activation_energy", "coupling"): _card,
    ("kl_to_full",): _kl,
    ("shapley",): _shapley,
    ("forward_place", "forward_loss"): _forward_selection,
}


def _targets(model: nn.Module) -> list[str]:
    """Names of the adapted projections, in the block's order; all of them in a plain model."""
    adapted = {
        path.rpartition(".")[2] for modules in adapted_layers(model).values() for path in modules
    }
    return [name for name in weights.projections(model) if not adapted or name in adapted]


def _describe(job: _Job, names: list[str]) -> dict[str, Any]:
    return {
        "policies": names,
        "rows": sum(len(batch["input_ids"]) for batch in job.batches),
        "tokens": sum(int(token_mask(batch).sum()) for batch in job.batches),
        "data": fingerprint(rows_of(job.batches)),
        "seed": job.seed,
        "rank": job.rank,
        "keep": job.keep,
        "sets": job.sets,
        "probes": job.probes,
        "steps": job.steps,
        "projections": weights.projections(job.model),
        "eva_projections": _targets(job.model),
        "versions": {"floe": floe.__version__},
    }
