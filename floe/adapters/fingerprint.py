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
    paths = [path for block in find_blocks(base) for path in block.linears.values()]
    linears: list[Any] = [linear_at(base, path) for path in paths]
    projections = [getattr(linear, "weight", None) for linear in linears]
    projections += [b for linear in linears if (b := getattr(linear, "bias", None)) is not None]
    others: list[Any] = [
        parameter
        for name, module in base.named_modules()
        if "norm" in type(module).__name__.lower() and ".modules_to_save." not in name
        for parameter in module.parameters(recurse=False)
    ]
    for module in foreign_adapters(base):
        for name in module.adapter_layer_names:
            others += getattr(module, name).parameters()
    projections += _rows(base, "get_output_embeddings")
    others += _rows(base, "get_input_embeddings")
    weights = [weight for weight in (*others, *projections) if _readable(weight)]
    parts = [_digest(projections), _digest(others)]
    if parts == [_UNREAD, _UNREAD]:
        return None
    return ":".join([str(weights[0].dtype).removeprefix("torch."), *parts])


def foreign_adapters(model: nn.Module) -> list[Any]:
    """Layers of other methods' adapters, which belong to the base."""
    modules = list(model.modules())
    wrappers = [module for module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
    inside = {part for wrapper in wrappers for part in wrapper.modules()}
    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
    return [m for m in layers if not isinstance(m, MoELoRALinear) and m not in inside]


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
        raise ValueError(
            "base model must have the weights that the adapter was trained on (fingerprint "
            f"{base}, base_model_name_or_path {config.base_model_name_or_path!r}), got {here}; for "
            "an adapter on another base set base_fingerprint to None (load_adapter: "
            "other_base=True)"
        )


def _rows(base: nn.Module, getter: str) -> list[Any]:
    """Those of an embedding or head that do not change when the vocabulary grows."""
    get = getattr(base, getter, None)
    module = get() if callable(get) else None
    if module is None:
        return []
    weight: Any = getattr(getattr(module, "original_module", module), "weight", None)
    return [weight[: 1 << (len(weight).bit_length() - 1)] if _readable(weight) else None]


@torch.no_grad()
def _digest(weights: list[Any]) -> str:
    """Of each row's and column's sum of the values' bits, which is exact on every device."""
    if not weights or not all(map(_readable, weights)):
        return _UNREAD
    digest = hashlib.sha256()
    for weight in weights:
        columns = torch.zeros(weight.shape[-1], dtype=torch.int64, device=weight.device)
        for rows in weight.reshape(-1, weight.shape[-1]).split(_ROWS):
            bits = rows.bfloat16().view(torch.int16)
            digest.update(bits.sum(1, dtype=torch.int64).cpu().numpy().tobytes())
            columns += bits.sum(0, dtype=torch.int64)
        digest.update(columns.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


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
