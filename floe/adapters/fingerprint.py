"""A fingerprint of a base model's weights: an adapter is worth nothing on another base."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from floe.blocks import base_of, find_blocks, linear_at

_VERSION = "1"
_SAMPLES = 16  # values of each tensor
_STRIDE = 7919  # between values of an embedding, which may grow at its end
_UNREAD = "-"


def fingerprint(model: nn.Module) -> str | None:
    """``"1:P:O"``: digests of samples of the projections, and of the embedding and the norms.

    They are the same in float32, bfloat16 and float16 if the weights are: values are rounded to
    bfloat16, and those that float16 cannot hold so exactly count as 0. P is "-" where projections
    cannot be read (quantised, sharded, offloaded). None if nothing can be read.
    """
    base = base_of(model)
    blocks = find_blocks(base)
    paths = [path for block in blocks for path in block.linears.values()]
    projections = [getattr(linear_at(base, path), "weight", None) for path in paths]
    norms = [
        parameter
        for block in blocks
        for module in block.module.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    ]
    parts = [
        _digest([_even(weight) for weight in projections]),
        _digest([_first(weight) for weight in _embeddings(base)] + [_even(w) for w in norms]),
    ]
    return None if parts == [_UNREAD, _UNREAD] else ":".join([_VERSION, *parts])


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints can be of the same weights; what was not read cannot differ."""
    pairs = list(zip(one.split(":"), other.split(":"), strict=False))
    if pairs[0] != (_VERSION, _VERSION):
        return True  # of another version: nothing to compare
    return all(a == b or _UNREAD in (a, b) for a, b in pairs)


def _embeddings(base: nn.Module) -> list[Any]:
    get = getattr(base, "get_input_embeddings", None)
    module = get() if callable(get) else None
    module = getattr(module, "original_module", module)  # what PEFT may have put around it
    return [] if module is None else [getattr(module, "weight", None)]


def _digest(samples: list[Tensor | None]) -> str:
    read = [sample for sample in samples if sample is not None]
    if not read or len(read) < len(samples):
        return _UNREAD
    values = torch.cat(read).bfloat16()
    values[values.abs() < 2.0**-14] = 0  # float16's smallest normal number
    return hashlib.sha256(values.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def _even(weight: Any) -> Tensor | None:
    """Values of a tensor, evenly spaced."""
    if not _readable(weight):
        return None
    places = torch.linspace(0, weight.numel() - 1, _SAMPLES, dtype=torch.float64).round().long()
    return _at(weight, places)


def _first(weight: Any) -> Tensor | None:
    """Values of a tensor that stay where they are when rows are added."""
    if not _readable(weight):
        return None
    places = torch.arange(_SAMPLES * 8) * _STRIDE
    return _at(weight, places[places < weight.numel()])


def _at(weight: Tensor, places: Tensor) -> Tensor:
    return weight.detach().reshape(-1)[places.to(weight.device)].float().cpu()


def _readable(weight: Any) -> bool:
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.is_floating_point()
        and not weight.is_meta
        and weight.numel() > 0
    )
