"""Measure a warm-up model's importance scores: Fisher on the adapted model, Taylor on its base."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import floe
from floe.adapters.fingerprint import model_fingerprint
from floe.adapters.linear import module_generator
from floe.adapters.targets import adapted_layers, adapted_modules
from floe.data.batches import TokenRow, fingerprint, rows_of
from floe.decoder_blocks import base_of, find_blocks
from floe.importance.adapter_gradients import active_adapters
from floe.importance.chunk_store import CHUNK_ROWS, PASS_TOKENS, Workbook
from floe.importance.fisher import Fisher, FisherPlan
from floe.importance.scores import Scores
from floe.importance.taylor import Taylor, TaylorPlan
from floe.types import Batch, Progress

TAYLOR_ROWS = 32
_PACKAGES = ("torch", "transformers", "peft", "numpy")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How :func:`score` measures.

    Attributes:
        reduction, mask_scope, first_order, keep_samples: see ``FisherPlan``.
        taylor_kind, taylor_aggregate, taylor_tokens: see ``TaylorPlan``.
        probe: also measure the adapter Fisher at fresh adapters (B = 0), which needs no warm-up;
            the adapters are put back bit by bit. seed: of that draw.
    """

    reduction: str = "sample"
    mask_scope: str = "base"
    first_order: bool = False
    taylor_kind: str = "element"
    taylor_aggregate: str = "abs_of_mean"
    taylor_tokens: str = "all"
    keep_samples: bool = False
    probe: bool = False
    seed: int = 41


def score(
    model: nn.Module,
    batches: Iterable[Batch | TokenRow],
    *,
    taylor_batches: Iterable[Batch | TokenRow] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Scores:
    """Importance of every head, neuron and layer of an adapted model (FLoE Eq. 4-11).

    Mask Fisher and adapter Fisher come from the same backward passes over ``batches``, in eval mode
    with everything frozen; Taylor costs from the base model alone. The model is left unchanged.

    The scores do not depend on how rows are batched. They are measured in chunks of 32 rows; with
    torch.distributed (torchrun), every worker measures some, and all return the same scores: the
    same bits for any number of workers, on machines and thread counts that are alike.

    Args:
        model: the warm-up model, a PeftModel with floe adapters.
        batches: calibration rows: dicts passed to the model, with labels, or rows as tokens. The
            same for all workers.
        taylor_batches: rows of the Taylor cost; None = the first 32 of ``batches``.
        folder: keeps finished chunks, so that a killed measurement continues; needed, and shared,
            with several workers.
        progress: called as progress(done, in all, "fisher", "taylor" or "probe") about this
            worker's part.
        options: reduction, mask_scope, first_order, taylor_kind, taylor_aggregate, taylor_tokens,
            keep_samples, probe, seed; see :class:`ScoreOptions`, which has their defaults.

    Raises:
        ValueError: the model carries no floe adapters, an unknown option, bad rows or values, or
            workers that disagree. TypeError: an argument that is not known.

    Warns:
        RuntimeWarning: when a whole kind of score is zero and can rank nothing, or the base is
            quantised and "vector" costs are measured instead of "element" ones.
    """
    asked = ScoreOptions(**options)
    if not adapted_modules(model):
        raise ValueError("model must carry floe adapters (floe.get_model), got none")
    rows = rows_of(batches)
    taylor_rows = None if taylor_batches is None else rows_of(taylor_batches)
    scores = _measure(model, rows, taylor_rows, asked, folder, progress)
    _warn_of_zeros(scores)
    if scores.meta["base_quantised"] and asked.taylor_kind == "element":
        _warn(
            "taylor_kind is 'vector', not 'element': quantised base weights have no gradient, "
            "the masks on their inputs do"
        )
    return scores


def _measure(
    model: nn.Module,
    rows: Sequence[TokenRow],
    taylor_rows: Sequence[TokenRow] | None,
    options: ScoreOptions,
    folder: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Scores:
    """Do this worker's part, wait for the others, and put the scores together."""
    fisher = FisherPlan(
        model,
        rows,
        options.reduction,
        options.mask_scope,
        adapters=True,
        keep_samples=options.keep_samples,
        first_order=options.first_order,
    )
    kinds = (options.taylor_kind, options.taylor_aggregate, options.taylor_tokens)
    taylor = TaylorPlan(model, rows[:TAYLOR_ROWS] if taylor_rows is None else taylor_rows, *kinds)
    fresh = FisherPlan(model, rows, masks=False, adapters=True, scope="full", name="probe")
    meta: dict[str, Any] = {
        "reduction": options.reduction,
        "mask_scope": options.mask_scope,
        "seed": options.seed,
        "taylor_aggregate": options.taylor_aggregate,
        "taylor_loss": options.taylor_tokens,
        "taylor_kind_asked": options.taylor_kind,
        "taylor_from_calibration": taylor_rows is None,
        "data": fingerprint(rows),
        "taylor_data": fingerprint(taylor.rows),
        "model_values": model_fingerprint(model),
        "versions": {"floe": floe.__version__} | {n: metadata.version(n) for n in _PACKAGES},
    }
    # Everything that decides the bits of a piece, as far as a program can tell.
    plans = {"fisher": fisher.identity, "taylor": taylor.identity}
    sizes = {"chunk_rows": CHUNK_ROWS, "pass_tokens": PASS_TOKENS}
    book = Workbook(folder, meta | plans | sizes)
    taylor.work(book, progress)
    fisher.work(book, progress)
    if options.probe:
        with fresh_adapters(model, options.seed):
            fresh.work(book, progress)
    book.wait()
    measured, costs = fisher.result(book), taylor.result(book)
    drawn = fresh.result(book).adapter if options.probe else None
    book.wait()  # a worker may clear the folder when all have read it
    return Scores(
        head_taylor=costs.head,
        neuron_taylor=costs.neuron,
        meta=_describe(model, measured, costs) | meta,
        probe_fisher=drawn,
        **measured.fields_of_scores,
    )


@contextmanager
def fresh_adapters(model: nn.Module, seed: int) -> Iterator[None]:
    """Within it the active adapters hold new initial values (B zero); then their own again."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for path, module in adapted_modules(model).items():
                for name in active_adapters(module):
                    saved += [(w, w.detach().clone()) for w in module.weights(name)]
                    module.draw(name, module_generator(seed, path))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)


def _warn_of_zeros(scores: Scores) -> None:
    bare = np.flatnonzero(scores.adapter_fisher == 0).tolist()
    if 0 < len(bare) < scores.layer_count:
        _warn(f"adapter_fisher of layers {bare} is zero: without adapters none was measured")
    for name in ("head_fisher", "neuron_fisher", "head_taylor", "neuron_taylor", "adapter_fisher"):
        if not getattr(scores, name).any():
            _warn(
                f"{name} is zero for every unit of every layer, so it ranks nothing; "
                "check the labels and that the adapters were trained"
            )


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _describe(model: nn.Module, fisher: Fisher, taylor: Taylor) -> dict[str, Any]:
    config = getattr(base_of(model), "config", None)
    counts = [0] * len(find_blocks(model))
    for layer, modules in adapted_layers(model).items():
        for module in modules.values():
            for name in active_adapters(module):
                counts[layer] += sum(weight.numel() for weight in module.weights(name))
    return {
        "model": getattr(config, "name_or_path", "") or getattr(config, "model_type", ""),
        "rows": fisher.rows,
        "tokens": fisher.tokens,
        "taylor_rows": taylor.rows,
        "taylor_tokens": taylor.tokens,
        "taylor_kind": taylor.kind,
        "adapter_modules": list(fisher.projections),
        "base_quantised": taylor.quantised,
        "adapter_parameters": counts,
    }
