"""Fingerprints of a model's weights: an adapter is worth nothing on another base."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from floe.adapters.linear import MoELoRALinear
from floe.decoder_blocks import base_of, find_blocks, linear_at

_UNREAD = "-"
_ROWS = 4096  # of a tensor at once


def fingerprint(model: nn.Module) -> str | None:
    """``"dtype:P:O"``: digests of projections and head, and of norms, embedding and adapters.

    Every value counts, rounded to bfloat16, so that a model in float32 and in bfloat16 is one. Of
    the embedding, which may grow at its end, as many rows count as the largest power of two that it
    has. P or O is "-" where weights cannot be read, as quantised, sharded and offloaded ones
    cannot. None if nothing can be read. Adapters are those of other methods that the base carries.
    Settings of the model's configuration do not count.
    """
    base = base_of(model)
    blocks = find_blocks(base)
    paths = [path for block in blocks for path in block.linears.values()]
    linears = [linear_at(base, path) for path in paths]
    projections = [getattr(linear, "weight", None) for linear in linears]
    projections += [b for linear in linears if (b := getattr(linear, "bias", None)) is not None]
    others: list[Any] = [
        parameter
        for name, module in base.named_modules()
        if "norm" in type(module).__name__.lower() and ".modules_to_save." not in name
        for parameter in module.parameters(recurse=False)
    ]
    others += [
        parameter
        for module in foreign_adapters(base)
        for name in module.adapter_layer_names
        for parameter in getattr(module, name).parameters()
    ]
    head, embedding = (_rows(base, f"get_{kind}_embeddings") for kind in ("output", "input"))
    parts = [_digest([*projections, *head]), _digest([*others, *embedding])]
    if parts == [_UNREAD, _UNREAD]:
        return None
    dtype = next(weight.dtype for weight in [*others, *projections] if _readable(weight))
    return ":".join([str(dtype).removeprefix("torch."), *parts])


def foreign_adapters(model: nn.Module) -> list[Any]:
    """Layers of other methods' adapters, which belong to the base."""
    wrapped = {
        part
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for part in module.modules()
    }
    return [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module, MoELoRALinear)
        and module not in wrapped
    ]


def same_base(first: str, second: str) -> bool:
    """Whether two fingerprints can be of the same weights.

    What was not read cannot differ, nor can float16 and another dtype be compared: it rounds twice.
    """
    (dtype, *parts), (other_dtype, *other_parts) = first.split(":"), second.split(":")
    if dtype != other_dtype and "float16" in (dtype, other_dtype):
        return True
    pairs = zip(parts, other_parts, strict=True)
    return all(a == b or _UNREAD in (a, b) for a, b in pairs)


def check_base(config: Any, model: nn.Module) -> None:
    """ValueError where the configuration belongs to a base model of other weights."""
    base, here = config.base_fingerprint, getattr(model, "_floe_fingerprint", None)
    if base is not None and here is not None and not same_base(base, here):
        name = config.base_model_name_or_path
        raise ValueError(
            "base model must have the weights that the adapter was trained on (fingerprint "
            f"{base}, base_model_name_or_path {name!r}), got {here}; for an adapter on another "
            "base set base_fingerprint to None (load_adapter: other_base=True)"
        )


def _rows(base: nn.Module, getter: str) -> list[Any]:
    """Those of an embedding or head that do not change when the vocabulary grows."""
    get = getattr(base, getter, None)
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


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's and buffer's name, shape, dtype and values."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _hash(digest, name, tensor.detach())
    return digest.hexdigest()


def _hash(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    if is_traceable_wrapper_subclass(tensor):  # quantised: what it is made of
        for part in tensor.__tensor_flatten__()[0]:
            _hash(digest, part, getattr(tensor, part))
    elif not tensor.is_meta:
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
