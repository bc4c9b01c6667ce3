"""Every argument is checked before any kernel sees a pointer: name, rule, what came.

Each boundary checks what its direct callers may get wrong, and nothing below repeats it. The public
functions check everything with :func:`check_call`, and then run an implementation that trusts them.
The registered ops written in Python may be called by anyone: they hold a call to the same rules
with :func:`check_forward`, :func:`check_backward` and :func:`check_dropout`. So may those written
in C++: csrc/bindings guard what their memory accesses rely on, in a word each.
"""

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
_SINGULAR = {
    "expand_weights": "expand_weight",
    "shrink_weights": "shrink_weight",
    "router_biases": "router_bias",
    "weights": "weight",
    "biases": "bias",
    "base_outputs": "base_output",
    "gates": "gates",
}
_PLURAL = {singular: plural for plural, singular in _SINGULAR.items()}
_FROZEN = ("weight", "bias")
_OF_X = (*_FROZEN, "base_output")  # they have its dtype
_MAY_BE_NONE = ("bias", "router_bias")
_LARGEST = sys.float_info.max
LEAST_TEMPERATURE = 1e-6


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


def check_call(x: Tensor, group: Group, on_base: bool, dropout_mode: str) -> None:
    """Raise ValueError or TypeError unless a public function may work on x [..., K] and the group.

    ``on_base``: whether base outputs are to be given, or else weights and biases.
    """
    if not _is_usual(x, group, on_base):
        given = ("base_outputs",) if on_base else ("biases", "weights")
        gates = ("gates",) if _has_gates(group) else ()
        _check_group(x, group, ("router_biases", *given, *gates), may_cast=True)
    check_settings(x, group, dropout_mode)


def check_op(x: Tensor, group: Group) -> None:
    """Raise ValueError or TypeError unless an op can work on x [T, K] and the group.

    Any of the group's lists may be empty but those of shrink and expand weights.
    """
    _check_float("x", x)
    if group.weights and group.base_outputs:
        raise ValueError("weights must be empty where base_outputs are given")
    if x.dim() != 2:
        raise ValueError(f"x must be [T, K], got shape {tuple(x.shape)}")
    optional = ("router_biases", "biases", "weights", "base_outputs", "gates")
    _check_group(x, group, [name for name in optional if getattr(group, name)], False)
    check_settings(x, group, "shared")
    if group.seed is not None:
        _check_seed(group.seed, x)


def check_forward(x: Tensor, group: Group) -> None:
    """The same for a forward, which has either weights and biases or base outputs."""
    check_op(x, group)
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
        ("hidden", routed.hidden, (count, tokens, group.hidden_size), wide),
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


def _check_group(x: Tensor, group: Group, given: Sequence[str], may_cast: bool) -> None:
    """The tensors make a group of linears.

    ``given``: the fields that must have an entry per linear, beside shrink and expand weights.
    ``may_cast``: whether autocast, where it is on, makes dtypes equal afterwards.
    """
    _check_float("x", x)
    names = ("expand_weights", "shrink_weights", *given)
    lists: dict[str, Any] = {_SINGULAR[name]: getattr(group, name) for name in names}
    count = _count_linears(lists)
    cast = may_cast and autocasts(x)
    for g in range(count):
        where = "" if count == 1 else f" of linear {g}"
        tensors = {
            name: values[g]
            for name, values in lists.items()
            if name not in _MAY_BE_NONE or values[g] is not None
        }
        _check_tensors(tensors, x, cast, where)
        _check_shapes(tensors, x, where)
    shapes = [tuple(expand.shape[1:]) for expand in group.expand_weights]  # a set takes no SymInt
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"the linears of a group must have one number of experts and one rank, got (M, r) in "
            f"{shapes}"
        )
    if len({bias is None for bias in group.router_biases}) > 1:
        raise ValueError("router_biases must be all given or all None, got some of each")
    rows = [shrink.shape[0] for shrink in group.shrink_weights]
    if any(count != rows[0] for count in rows):
        raise ValueError(f"shrink_weights must have one number of rows, got {rows}")
    for name in ("shrink_weights", "expand_weights"):
        dtypes = {value.dtype for value in getattr(group, name)}
        if len(dtypes) > 1:
            raise TypeError(f"{name} must have one dtype, got {sorted(map(str, dtypes))}")


def _is_usual(x: Tensor, group: Group, on_base: bool) -> bool:
    """A quick answer for the usual call; False means that every tensor has to be looked at.

    Called in every forward of every adapted linear: a small model's host time is made of this.
    """
    try:
        device, dtype, shape = x.device, x.dtype, x.shape
        shrinks, expands = group.shrink_weights, group.expand_weights
        bases = group.base_outputs if on_base else group.weights
        biases = group.router_biases if on_base else group.biases
        of_adapters = shrinks[0].dtype, expands[0].dtype
        _, experts, rank = expands[0].shape
        rows = shrinks[0].shape
        if rows[1] != shape[-1] or rows[0] - experts not in (rank, experts * rank) or group.gates:
            return False
        for base, bias, shrink, expand, router_bias in zip(
            bases, biases, shrinks, expands, group.router_biases, strict=True
        ):
            features = expand.shape[0]
            is_linear = (
                base.device == shrink.device == expand.device == device
                and base.layout == shrink.layout == expand.layout == x.layout == torch.strided
                and base.dtype == dtype
                and (shrink.dtype, expand.dtype) == of_adapters
                and expand.shape == (features, experts, rank)
                and shrink.shape == rows
                and router_bias is None
            )
            if not is_linear:
                return False
            if bias is not None and (
                bias.shape != (features,)
                or bias.dtype != dtype
                or bias.device != device
                or bias.layout != torch.strided
                or bias.requires_grad
            ):
                return False
            if on_base:
                if base.shape != (*shape[:-1], features):
                    return False
            elif base.requires_grad or base.shape != (features, shape[-1]):
                return False
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    floats = dtype in FLOATS and all(each.is_floating_point for each in of_adapters)
    return floats and rank > 0 and experts > 0


def check_settings(x: Tensor, group: Group, dropout_mode: str) -> None:
    """Raise ValueError or TypeError unless the numbers and names are what the op takes."""
    numbers = group.scaling, group.temperature, group.dropout_p
    try:
        _check_numbers(*numbers)
    except TypeError:
        kinds = ", ".join(type(number).__name__ for number in numbers)
        raise TypeError(
            f"scaling, temperature and dropout_p must be numbers, got {kinds}"
        ) from None
    if group.top_k != 0 or group.gates:
        _check_routing(group)
    if group.dropout_p > 0.0:
        _check_seed(group.seed, x)
    if dropout_mode not in DROPOUT_MODES:
        raise ValueError(f"dropout_mode must be one of {DROPOUT_MODES}, got {dropout_mode!r}")
    if group.backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {group.backend!r}")


def _has_gates(group: Group) -> bool:
    """Whether gates are given, of whatever type they are."""
    return not (isinstance(group.gates, (list, tuple)) and len(group.gates) == 0)


def _check_routing(group: Group) -> None:
    """What chooses among experts: numbers of a router, or gates that take its place."""
    top_k, experts = group.top_k, group.experts
    if top_k != 0:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"top_k must be an int, got {type(top_k).__name__}")
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k must be 0 (all) or in [1, M] = [1, {experts}], got {top_k}")
    if not group.gates:
        return
    if any(bias is not None for bias in group.router_biases):
        raise ValueError("router_bias must be None where gates are given: there is no router")
    if top_k:
        raise ValueError(f"top_k must be 0 where gates are given, got {top_k}")
    if group.temperature != 1.0:
        raise ValueError(f"temperature must be 1 where gates are given, got {group.temperature}")


def check_dropout(x: Any, p: Any, seed: Any) -> None:
    """Raise TypeError or ValueError unless these are what ``keyed_dropout`` takes."""
    check_dense("x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be bfloat16, float16, float32 or float64, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError("x must be [..., K], got a 0-dimensional tensor")
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"p must be a number, got {type(p).__name__}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), got {p}")
    check_dense("seed", seed)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be int64, got {seed.dtype}")
    if seed.dim():
        raise ValueError(f"seed must be 0-dimensional, got shape {tuple(seed.shape)}")
    if seed.device != x.device:
        raise ValueError(f"seed must be on x's device {x.device}, got {seed.device}")


def _check_numbers(scaling: float, temperature: float, dropout_p: float) -> None:
    if not -_LARGEST <= scaling <= _LARGEST:  # whole numbers may be larger
        raise ValueError(f"scaling must be a finite number, got {scaling}")
    if not LEAST_TEMPERATURE <= temperature <= _LARGEST:  # smaller ones make logits infinite
        rule = f"a finite number of at least {LEAST_TEMPERATURE}"
        raise ValueError(f"temperature must be {rule}, got {temperature}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device; meta has none."""
    # is_autocast_available would know, but torch 2.11 cannot compile a call of it
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _count_linears(lists: dict[str, Any]) -> int:
    """How many there are, if every list names as many."""
    for name, values in lists.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(
                f"{_PLURAL[name]} must be a list of tensors, got {type(values).__name__}"
            )
    count = len(lists["expand_weight"])
    if count == 0:
        raise ValueError("expand_weights must name at least one linear, got none")
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(
                f"{_PLURAL[name]} must have one entry per linear, {count}, got {len(values)}"
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
    shrink, routed = given["shrink_weight"].shape, 0 if "gates" in given else experts
    counts = rank + routed, experts * rank + routed
    if x.dim() < 1 or shrink not in [(count, x.shape[-1]) for count in counts]:
        rule = "[r + M, K] = [{}, K] or [M r + M, K] = [{}, K]"
        if not routed:  # no router's rows
            rule = "[r, K] = [{}, K] or [M r, K] = [{}, K], as gates are given,"
        raise ValueError(
            f"shrink_weight{where} must be {rule.format(*counts)} for x [..., K], "
            f"got {tuple(shrink)} and x {tuple(x.shape)}"
        )
    on_base = (*x.shape[:-1], features)
    rules = {
        "weight": ((features, x.shape[-1]), "[N, K] = {} (expand_weight [N, M, r], x [..., K])"),
        "bias": ((features,), "[N] = {}"),
        "router_bias": ((experts,), "[M] = {}"),
        "base_output": (on_base, f"{on_base}"),
        "gates": ((*x.shape[:-1], experts), f"[..., M] = {(*x.shape[:-1], experts)}"),
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
