"""Measure a warm-up model's importance scores: Fisher on the adapted model, Taylor on its base."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import floe
from floe.adapters.moe_lora import MoELoRALinear, module_generator
from floe.adapters.targets import adapted_layers, adapted_modules
from floe.blocks import base_of
from floe.importance.adapter import active_adapters
from floe.importance.fisher import Fisher, Progress, measure_adapter_fisher, measure_fisher
from floe.importance.frozen import Batch, token_mask
from floe.importance.scores import Scores
from floe.importance.taylor import Taylor, measure_taylor

TAYLOR_ROWS = 32
_PACKAGES = ("torch", "transformers", "peft", "numpy")


def score(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    taylor_batches: Iterable[Batch] | None = None,
    reduction: str = "sample",
    mask_scope: str = "base",
    taylor_kind: str = "element",
    taylor_aggregate: str = "abs_of_mean",
    taylor_tokens: str = "all",
    head_unit: str = "head",
    keep_samples: bool = False,
    probe: bool = False,
    seed: int = 41,
    progress: Progress | None = None,
) -> Scores:
    """Importance of every head, neuron and layer of an adapted model (FLoE Eq. 4-11).

    Mask Fisher and adapter Fisher come from the same backward passes over ``batches``, in eval mode
    with everything frozen; Taylor costs from the base model alone. The model is left unchanged.

    Args:
        model: the warm-up model, a PeftModel with floe adapters.
        batches: calibration rows: dicts passed to the model, with labels.
        taylor_batches: rows of the Taylor cost; None = the first batches, up to 32 rows or so.
        reduction, mask_scope, head_unit, keep_samples: see ``measure_fisher``.
        taylor_kind, taylor_aggregate, taylor_tokens: see ``measure_taylor``.
        probe: also measure the adapter Fisher at fresh adapters (B = 0), which needs no warm-up;
            the adapters are put back bit by bit. seed: of that draw.
        progress: called as progress(done, in all, "fisher", "taylor" or "probe").

    Raises:
        ValueError: the model carries no floe adapters, an unknown option, or bad rows or values.

    Warns:
        RuntimeWarning: when a whole kind of score is zero and can rank nothing.
    """
    if not adapted_modules(model):
        raise ValueError("model must carry floe adapters (floe.get_model), got none")
    batches = list(batches)
    taylor_rows = leading(batches, TAYLOR_ROWS) if taylor_batches is None else list(taylor_batches)
    fisher = measure_fisher(
        model, batches, reduction=reduction, scope=mask_scope, head_unit=head_unit, adapters=True,
        keep_samples=keep_samples, progress=progress,
    )  # fmt: skip
    taylor = measure_taylor(
        model, taylor_rows, kind=taylor_kind, aggregate=taylor_aggregate, tokens=taylor_tokens,
        head_unit=head_unit, progress=progress,
    )  # fmt: skip
    options = {
        "reduction": reduction, "mask_scope": mask_scope, "head_unit": head_unit, "seed": seed,
        "taylor_aggregate": taylor_aggregate, "taylor_loss": taylor_tokens,
        "taylor_from_calibration": taylor_batches is None,
    }  # fmt: skip
    data = {"data": fingerprint(batches), "taylor_data": fingerprint(taylor_rows)}
    fresh = _probe(model, batches, seed, progress) if probe else None
    return _assemble(fisher, taylor, _describe(model, fisher, taylor) | options | data, fresh)


def leading(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """The first batches that together hold at least ``rows`` rows, or all of them."""
    taken: list[Batch] = []
    count = 0
    for batch in batches:
        if count >= rows:
            break
        taken.append(batch)
        count += len(batch["input_ids"])
    return taken


def fingerprint(batches: Iterable[Batch]) -> str:
    """SHA-256 over the rows' real tokens and labels in order, whatever batching and padding."""
    digest = hashlib.sha256()
    for batch in batches:
        ids, real = batch["input_ids"].cpu(), token_mask(batch).cpu()
        labels = torch.full_like(ids, -100)
        if batch.get("labels") is not None:
            given = batch["labels"].cpu()
            labels[:, ids.shape[1] - given.shape[1] :] = given
        for row in range(len(ids)):
            for part in (ids[row, real[row]], labels[row, real[row]]):
                values = part.numpy().astype("<i8")
                digest.update(np.int64(len(values)).astype("<i8").tobytes() + values.tobytes())
    return digest.hexdigest()


@contextmanager
def fresh_adapters(model: nn.Module, seed: int) -> Iterator[None]:
    """Within it the active adapters hold new initial values (B zero); then their own again."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for path, module in adapted_modules(model).items():
                for name in active_adapters(module):
                    for parameter in (module.floe_shrink[name], module.floe_expand[name]):
                        saved.append((parameter, parameter.detach().clone()))
                    _draw(module, name, module_generator(seed, path))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)


def _draw(module: MoELoRALinear, name: str, generator: torch.Generator) -> None:
    shrink = module.floe_shrink[name]
    bound = 1.0 / math.sqrt(shrink.shape[1])
    shrink.copy_(torch.empty(shrink.shape).uniform_(-bound, bound, generator=generator))
    module.floe_expand[name].zero_()


def _assemble(
    fisher: Fisher, taylor: Taylor, meta: dict[str, Any], probe: NDArray[np.float64] | None
) -> Scores:
    assert fisher.adapter is not None
    scores = Scores(
        fisher.head, fisher.neuron, taylor.head, taylor.neuron, fisher.adapter, meta, probe,
        fisher.head_gradient, fisher.neuron_gradient,
    )  # fmt: skip
    for name in ("head_fisher", "neuron_fisher", "head_taylor", "neuron_taylor", "adapter_fisher"):
        if not getattr(scores, name).any():
            warnings.warn(
                f"{name} is zero for every unit of every layer, so it ranks nothing; "
                "check the labels and that the adapters were trained",
                RuntimeWarning,
                stacklevel=3,
            )
    return scores


def _probe(
    model: nn.Module, batches: Sequence[Batch], seed: int, progress: Progress | None
) -> NDArray[np.float64]:
    with fresh_adapters(model, seed):
        return measure_adapter_fisher(model, batches, progress)


def _describe(model: nn.Module, fisher: Fisher, taylor: Taylor) -> dict[str, Any]:
    config = getattr(base_of(model), "config", None)
    counts = [0] * len(fisher.head)
    for layer, modules in adapted_layers(model).items():
        for module in modules.values():
            for name in active_adapters(module):
                counts[layer] += module.floe_shrink[name].numel() + module.floe_expand[name].numel()
    return {
        "model": getattr(config, "name_or_path", "") or getattr(config, "model_type", ""),
        "rows": fisher.rows,
        "tokens": fisher.tokens,
        "taylor_rows": taylor.rows,
        "taylor_tokens": taylor.tokens,
        "taylor_kind": taylor.kind,
        "base_quantised": taylor.quantised,
        "adapter_parameters": counts,
        "versions": {"floe": floe.__version__}
        | {name: metadata.version(name) for name in _PACKAGES},
    }
