"""Every argument is checked before any kernel sees a pointer: name, rule, what came."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from floe_triton.group import Group, Routed

BACKENDS = ("auto", "eager", "native", "gemm", "fused")
DROPOUT_MODES = ("shared", "per_expert")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_FROZEN = ("weight", "bias")
_OF_X = (*_FROZEN, "base_output")  # they have its dtype
_LARGEST = sys.float_info.max
_MAY_BE_NONE = ("bias", "router_bias")


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is under way.

    Those see through torch's own operators alone: an op of ours would lose their tangents.
    """
    # no public name for either; private ones that torch.compile knows too
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if a tensor carries a forward-mode derivative, which ``op`` would drop."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"floe::{op} has no forward-mode derivative")


def check_op(x: Tensor, group: Group, backend: str = "auto") -> None:
    """Raise ValueError or TypeError unless an op can work on x [T, K] and the group.

    Any of the group's lists may be empty but those of shrink and expand weights.
    """
    _check_float("x", x)
    if group.weights and group.base_outputs:
        raise ValueError("weights must be empty where base_outputs are given")
    if x.dim() != 2:
        raise ValueError(f"x must be [T, K], got shape {tuple(x.shape)}")
    none = [None] * len(group)
    check_group(
        x, group.weights or None, group.biases or none, group.base_outputs or None,
        group.shrink_weights, group.expand_weights, group.router_biases or none, cast=False,
    )  # fmt: skip
    check_settings(
        x, group.scaling, group.temperature, group.dropout_p, group.seed, "shared", backend
    )
    if group.seed is not None:
        _check_seed(group.seed, x)


def check_forward(x: Tensor, group: Group, backend: str) -> None:
    """The same for a forward, which has either weights and biases or base outputs."""
    check_op(x, group, backend)
    if not (group.weights or group.base_outputs):
        raise ValueError("weights or base_outputs must be given")
    if group.base_outputs and any(bias is not None for bias in group.biases):
        raise ValueError("biases must be empty or None where base_outputs are given")


def check_backward(grad_ys: Sequence[Tensor], x: Tensor, group: Group, routed: Routed) -> None:
    """Raise ValueError or TypeError unless these are of a forward on x [T, K] and the group."""
    tokens, count, wide = x.shape[0], len(group), torch.promote_types(x.dtype, torch.float32)
    if len(grad_ys) != count:
        raise ValueError(f"grad_ys must have one entry per linear, {count}, got {len(grad_ys)}")
    experts, rank = group.experts, group.rank
    expected: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
        ("hidden", routed.hidden, (count, tokens, rank), wide),
        ("gate", routed.gate, (count, tokens, experts), wide),
        ("z", routed.z, (count, tokens, experts * rank), x.dtype),
    ]
    for grad_y, expand in zip(grad_ys, group.expand_weights, strict=True):
        expected.append(("grad_ys", grad_y, (tokens, expand.shape[0]), x.dtype))
    for name, tensor, shape, dtype in expected:
        check_dense(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} for x of {x.dtype}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")


def check_group(
    x: Tensor,
    weights: Sequence[Tensor] | None,
    biases: Sequence[Tensor | None],
    base_outputs: Sequence[Tensor] | None,
    shrink_weights: Sequence[Tensor],
    expand_weights: Sequence[Tensor],
    router_biases: Sequence[Tensor | None],
    cast: bool | None = None,
) -> None:
    """Raise ValueError or TypeError unless the tensors make a group of linears.

    ``cast``: whether dtypes are made equal afterwards; None asks autocast.
    """
    own = weights if base_outputs is None else base_outputs
    usual: Any = (own, biases, shrink_weights, expand_weights, router_biases)
    if _is_group(x, usual, on_base=base_outputs is not None):
        return
    _check_float("x", x)
    lists: dict[str, Any] = {
        "expand_weight": expand_weights,
        "shrink_weight": shrink_weights,
        "router_bias": router_biases,
        "bias": biases,
        **({} if weights is None else {"weight": weights}),
        **({} if base_outputs is None else {"base_output": base_outputs}),
    }
    count = _count_linears(lists)
    cast = autocasts(x) if cast is None else cast
    for g in range(count):
        where = "" if count == 1 else f" of linear {g}"
        given = {
            name: values[g]
            for name, values in lists.items()
            if name not in _MAY_BE_NONE or values[g] is not None
        }
        _check_tensors(given, x, cast, where)
        _check_shapes(given, x, where)
    shapes = [tuple(expand.shape[1:]) for expand in expand_weights]  # a set takes no SymInt
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"the linears of a group must have one number of experts and one rank, got (M, r) in "
            f"{shapes}"
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
                and own.layout == shrink.layout == expand.layout == x.layout == torch.strided
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
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    floats = dtype in FLOATS and all(one.is_floating_point for one in of_adapters)
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
    try:
        _check_numbers(scaling, temperature, dropout_p)
    except TypeError:
        kinds = [type(number).__name__ for number in (scaling, temperature, dropout_p)]
        raise TypeError(
            f"scaling, temperature and dropout_p must be numbers, got {', '.join(kinds)}"
        ) from None
    if dropout_p > 0.0:
        _check_seed(seed, x)
    if dropout_mode not in DROPOUT_MODES:
        raise ValueError(f"dropout_mode must be one of {DROPOUT_MODES}, got {dropout_mode!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


def _check_numbers(scaling: float, temperature: float, dropout_p: float) -> None:
    if not -_LARGEST <= scaling <= _LARGEST:  # whole numbers may be larger
        raise ValueError(f"scaling must be a finite number, got {scaling}")
    if not 0.0 < temperature <= _LARGEST:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device; meta has none."""
    # is_autocast_available would know, but torch 2.11 cannot compile a call of it
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _count_linears(lists: dict[str, Any]) -> int:
    """How many there are, if every list names as many."""
    plural = {name: f"{name}es" if name in _MAY_BE_NONE else f"{name}s" for name in lists}
    for name, values in lists.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(
                f"{plural[name]} must be a list of tensors, got {type(values).__name__}"
            )
    count = len(lists["expand_weight"])
    if count == 0:
        raise ValueError("expand_weights must name at least one linear, got none")
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(
                f"{plural[name]} must have one entry per linear, {count}, got {len(values)}"
            )
    return count


def _check_shapes(given: dict[str, Tensor], x: Tensor, where: str) -> None:
    """Of one linear's tensors, by name."""
    expand = tuple(given["expand_weight"].shape)
    if len(expand) != 3:
        raise ValueError(f"expand_weight{where} must be [N, M, r], got {expand}")
    features, experts, rank = expand
    if rank < 1 or experts < 1:
        raise ValueError(f"expand_weight{where} [N, M, r] needs M >= 1 and r >= 1, got {expand}")
    shrink = given["shrink_weight"].shape
    if x.dim() < 1 or shrink != (rank + experts, x.shape[-1]):
        raise ValueError(
            f"shrink_weight{where} must be [r + M, K] = [{rank + experts}, K] for x [..., K], "
            f"got {tuple(shrink)} and x {tuple(x.shape)}"
        )
    on_base = (*x.shape[:-1], features)
    rules = {
        "weight": ((features, x.shape[-1]), "[N, K] = {} (expand_weight [N, M, r], x [..., K])"),
        "bias": ((features,), "[N] = {}"),
        "router_bias": ((experts,), "[M] = {}"),
        "base_output": (on_base, f"{on_base}"),
    }
    for name, (shape, rule) in rules.items():
        if name in given and given[name].shape != shape:
            raise ValueError(
                f"{name}{where} must be {rule.format(list(shape))}, got {tuple(given[name].shape)}"
            )


def check_dense(name: str, tensor: object) -> None:
    """Raise TypeError unless this is a tensor with one element after another."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")


def _check_float(name: str, tensor: object) -> None:
    check_dense(name, tensor)
    assert isinstance(tensor, Tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if name == "x" and tensor.dtype not in FLOATS:
        raise TypeError(f"x must be bfloat16, float16, float32 or float64, got {tensor.dtype}")


def _check_tensors(given: dict[str, Any], x: Tensor, cast: bool, where: str) -> None:
    device, dtype = x.device, x.dtype
    for name, tensor in given.items():
        _check_float(f"{name}{where}", tensor)
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
    check_dense("seed", seed)
    if seed.dim() != 0 or seed.dtype != torch.int64:
        raise ValueError(f"seed must be a 0-dim int64 tensor, got {seed.dtype} {tuple(seed.shape)}")
    if seed.device != x.device:
        raise ValueError(f"seed must be on x's device {x.device}, got {seed.device}")
