"""Every argument is checked before any kernel sees a pointer: name, rule, what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "eager", "native", "gemm", "fused")
DROPOUT_MODES = ("shared", "per_expert")
_FROZEN = ("weight", "bias")
_OF_X = (*_FROZEN, "base_output")  # they have its dtype


def check_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    base_outputs: Sequence[Tensor],
    shrink_weights: Sequence[Tensor],
    expand_weights: Sequence[Tensor],
    router_biases: Sequence[Tensor | None],
) -> None:
    """Raise ValueError or TypeError unless the tensors make a group of linears."""
    usual = (base_outputs or weights, biases, shrink_weights, expand_weights, router_biases)
    if _is_group(x, usual, on_base=len(base_outputs) > 0):
        return
    count = len(expand_weights)
    if count == 0:
        raise ValueError("expand_weights must name at least one linear, got none")
    lists: dict[str, Sequence[Any]] = {
        "shrink_weights": shrink_weights,
        "router_biases": router_biases,
        "biases": biases,
        **({"base_outputs": base_outputs} if base_outputs else {"weights": weights}),
    }
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(f"{name} must have one entry per linear, {count}, got {len(values)}")
    _check_float("x", x, "")
    cast = autocasts(x)
    for g in range(count):
        _check_linear(
            x,
            None if base_outputs else weights[g],
            biases[g],
            base_outputs[g] if base_outputs else None,
            shrink_weights[g],
            expand_weights[g],
            router_biases[g],
            cast,
            "" if count == 1 else f" of linear {g}",
        )
    shapes = {tuple(expand.shape[1:]) for expand in expand_weights}
    if len(shapes) > 1:
        raise ValueError(
            f"the linears of a group must have one number of experts and one rank, got (M, r) in "
            f"{sorted(shapes)}"
        )
    if len({bias is None for bias in router_biases}) > 1:
        raise ValueError("router_biases must be all given or all None, got some of each")
    for name, values in (("shrink_weights", shrink_weights), ("expand_weights", expand_weights)):
        dtypes = {value.dtype for value in values}
        if len(dtypes) > 1:
            raise TypeError(f"{name} must have one dtype, got {sorted(map(str, dtypes))}")


def _is_group(x: Tensor, lists: Sequence[Sequence[Any]], on_base: bool) -> bool:
    """A quick answer for the usual call; False means that every tensor has to be looked at.

    ``lists``: weights or base outputs, biases, shrink weights, expand weights, router biases.
    Called in every forward of every adapted linear: a small model's host time is made of this.
    """
    try:
        device, dtype, shape = x.device, x.dtype, x.shape
        _, _, shrinks, expands, _ = lists
        of_adapters = shrinks[0].dtype, expands[0].dtype
        _, experts, rank = expands[0].shape
        rows = rank + experts, shape[-1]
        for own, bias, shrink, expand, router_bias in zip(*lists, strict=True):
            features = expand.shape[0]
            is_linear = (
                own.device == shrink.device == expand.device == device
                and own.dtype == dtype
                and (shrink.dtype, expand.dtype) == of_adapters
                and expand.shape == (features, experts, rank)
                and shrink.shape == rows
                and bias is None
                and router_bias is None
            )
            if not is_linear:
                return False
            if on_base:
                if own.shape != (*shape[:-1], features):
                    return False
            elif own.requires_grad or own.shape != (features, shape[-1]):
                return False
    except (AttributeError, IndexError, TypeError, ValueError):
        return False
    floats = all(one.is_floating_point for one in (dtype, *of_adapters))
    return floats and rank > 0 and experts > 0


def check_settings(
    x: Tensor,
    scaling: float,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    dropout_mode: str,
    backend: str,
) -> None:
    """Raise ValueError or TypeError unless the numbers and names are what the op takes."""
    if not -float("inf") < scaling < float("inf"):
        raise ValueError(f"scaling must be a finite number, got {scaling}")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0.0:
        _check_seed(seed, x)
    if dropout_mode not in DROPOUT_MODES:
        raise ValueError(f"dropout_mode must be one of {DROPOUT_MODES}, got {dropout_mode!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device; meta has none."""
    # is_autocast_available would know, but torch 2.11 cannot compile a call of it
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _check_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    router_bias: Tensor | None,
    cast: bool,
    where: str,
) -> None:
    own = ("weight", weight) if base_output is None else ("base_output", base_output)
    named: list[tuple[str, Any]]
    named = [("shrink_weight", shrink_weight), ("expand_weight", expand_weight), own]
    named += [("bias", bias)] if bias is not None else []
    named += [("router_bias", router_bias)] if router_bias is not None else []
    _check_tensors(named, x, cast, where)
    if expand_weight.dim() != 3:
        shape = tuple(expand_weight.shape)
        raise ValueError(f"expand_weight{where} must be [N, M, r], got {shape}")
    features, experts, rank = expand_weight.shape
    if rank < 1 or experts < 1:
        raise ValueError(
            f"expand_weight{where} [N, M, r] needs M >= 1 and r >= 1, "
            f"got {tuple(expand_weight.shape)}"
        )
    if x.dim() < 1 or shrink_weight.shape != (rank + experts, x.shape[-1]):
        raise ValueError(
            f"shrink_weight{where} must be [r + M, K] = [{rank + experts}, K] for x [..., K], "
            f"got {tuple(shrink_weight.shape)} and x {tuple(x.shape)}"
        )
    if weight is not None and weight.shape != (features, x.shape[-1]):
        raise ValueError(
            f"weight{where} must be [N, K] = [{features}, {x.shape[-1]}] "
            f"(expand_weight [N, M, r], x [..., K]), got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (features,):
        raise ValueError(f"bias{where} must be [N] = [{features}], got {tuple(bias.shape)}")
    if base_output is not None and base_output.shape != (*x.shape[:-1], features):
        raise ValueError(
            f"base_output{where} must be {(*x.shape[:-1], features)}, "
            f"got {tuple(base_output.shape)}"
        )
    if router_bias is not None and router_bias.shape != (experts,):
        raise ValueError(
            f"router_bias{where} must be [M] = [{experts}], got {tuple(router_bias.shape)}"
        )


def _check_float(name: str, tensor: object, where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}{where} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}{where} must be floating point, got {tensor.dtype}")


def _check_tensors(named: Sequence[tuple[str, Any]], x: Tensor, cast: bool, where: str) -> None:
    device, dtype = x.device, x.dtype
    for name, tensor in named:
        _check_float(name, tensor, where)
        if tensor.device != device:
            raise ValueError(f"{name}{where} must be on x's device {device}, got {tensor.device}")
        if name in _OF_X and tensor.dtype != dtype and not cast:
            raise TypeError(f"{name}{where} must have x's dtype {dtype}, got {tensor.dtype}")
        if name in _FROZEN and tensor.requires_grad:
            raise ValueError(
                f"{name}{where} must be frozen (requires_grad=False): moe_lora gives it no gradient"
            )


def _check_seed(seed: Tensor | None, x: Tensor) -> None:
    if not isinstance(seed, Tensor):
        raise TypeError(
            f"seed must be a 0-dim int64 tensor when dropout_p > 0, got {type(seed).__name__}"
        )
    if seed.dim() != 0 or seed.dtype != torch.int64:
        raise ValueError(f"seed must be a 0-dim int64 tensor, got {seed.dtype} {tuple(seed.shape)}")
    if seed.device != x.device:
        raise ValueError(f"seed must be on x's device {x.device}, got {seed.device}")
