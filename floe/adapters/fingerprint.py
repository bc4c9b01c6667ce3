"""A fingerprint of a base model's weights: an adapter is worth nothing on another base."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from floe.blocks import base_of, find_blocks, linear_at

_UNREAD = "-"
_ROWS = 4096  # of a tensor at once


def fingerprint(model: nn.Module) -> str | None:
    """``"dtype:P:O"``: digests of the blocks' projections, and of the norms and the embedding.

    Every value counts, rounded to bfloat16, so that a model in float32 and in bfloat16 is one. Of
    the embedding, which may grow at its end, as many rows count as the largest power of two that it
    has. P or O is "-" where weights cannot be read, as quantised, sharded and offloaded ones
    cannot. None if nothing can be read.
    """
    base = base_of(model)
    blocks = find_blocks(base)
    paths = [path for block in blocks for path in block.linears.values()]
    projections = [getattr(linear_at(base, path), "weight", None) for path in paths]
    others: list[Any] = [
        parameter
        for block in blocks
        for module in block.module.modules()
        if "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    ]
    parts = [_digest(projections), _digest([*others, *_embedding(base)])]
    if parts == [_UNREAD, _UNREAD]:
        return None
    dtype = next(weight.dtype for weight in [*others, *projections] if _readable(weight))
    return ":".join([str(dtype).removeprefix("torch."), *parts])


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints can be of the same weights.

    What was not read cannot differ, nor can float16 and another dtype be compared: it rounds twice.
    """
    (dtype, *parts), (other_dtype, *other_parts) = one.split(":"), other.split(":")
    if dtype != other_dtype and "float16" in (dtype, other_dtype):
        return True
    pairs = zip(parts, other_parts, strict=True)
    return all(a == b or _UNREAD in (a, b) for a, b in pairs)


def _embedding(base: nn.Module) -> list[Any]:
    get = getattr(base, "get_input_embeddings", None)
    module = get() if callable(get) else None
    module = getattr(module, "original_module", module)  # what PEFT may have put around it
    weight: Any = getattr(module, "weight", None)
    if module is None:
        return []
    return [weight[: 1 << (len(weight).bit_length() - 1)] if _readable(weight) else None]


def _digest(weights: list[Any]) -> str:
    if not weights or not all(map(_readable, weights)):
        return _UNREAD
    digest = hashlib.sha256()
    for weight in weights:
        for sums in _sums(weight):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _sums(weight: Tensor) -> list[Tensor]:
    """Of each row and each column: the sum of the values' bits, exact on every device."""
    by_row, by_column = [], torch.zeros(weight.shape[-1], dtype=torch.int64, device=weight.device)
    for rows in weight.reshape(-1, weight.shape[-1]).split(_ROWS):
        bits = rows.bfloat16().view(torch.int16)
        by_row.append(bits.sum(1, dtype=torch.int64))
        by_column += bits.sum(0, dtype=torch.int64)
    return [*by_row, by_column]


def _readable(weight: Any) -> bool:
    return (
        isinstance(weight, Tensor)
        and type(weight.data) is Tensor
        and weight.is_floating_point()
        and not weight.is_meta
        and weight.numel() > 0
    )
