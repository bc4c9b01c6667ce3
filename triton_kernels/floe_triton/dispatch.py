"""Who computes a call: a visible rule, no trial and error; and the ops registered for it.

========  =========================================================================================
backend   what runs
========  =========================================================================================
eager     the product form in plain torch (:mod:`floe_triton.product_form`), any device and dtype
native    the same with floe's C++ for the experts' part, on the CPU where floe is loaded
gemm      Triton kernels around the BLAS library's frozen product (:mod:`floe_triton.gpu`)
fused     the same, the frozen product in Triton as well, with the experts in its accumulator
auto      float64: eager. CPU: native if loaded, else eager. CUDA of capability 8.0 and newer:
          gemm or fused by :func:`floe_triton.tuning.prefers_fused`; older: eager
========  =========================================================================================

``torch.ops.floe.moe_lora_forward`` and ``moe_lora_backward`` run what this rule chooses, for those
who need to see an op: a compiler, a dispatch mode, a tensor subclass. Their schemas live here, not
in C++, because this package also stands alone, without floe.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from floe_triton import launch, product_form
from floe_triton.checks import check_backward, check_forward, check_op, refuse_tangents
from floe_triton.group import Gradients, Group, Implementation, Needs, Routed

Shape = Sequence[int]
Shapes = Sequence[Shape]

EAGER = Implementation(product_form.forward, product_form.backward)
NATIVE = Implementation(product_form.native_forward, product_form.native_backward)


def implementation(x: Tensor, group: Group, *others: Tensor) -> Implementation:
    """Who computes the group on x: the chosen path, or the registered op where it must be seen.

    A call through the dispatcher takes as long as five small kernels, so there is none when no
    dispatch mode, subclass or compiler needs to see the op.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return REGISTERED
    for tensor in (x, *others, *group.tensors()):  # no generator: hot path
        kind = type(tensor)
        if kind is not Parameter and kind is not Tensor and tensor is not None:
            return REGISTERED
    return choose(x, group.backend)


def choose(x: Tensor, backend: str = "auto") -> Implementation:
    """The path of a backend on x's device, by the table above.

    Raises:
        ValueError: the backend cannot run there, with the reason.
    """
    device = x.device
    if backend == "eager" or (backend == "auto" and x.dtype == torch.float64):
        return EAGER
    if backend == "auto" and device.type == "cpu":
        return NATIVE if product_form.native_available() else EAGER
    if backend == "auto" and not launch.runs_triton(device):
        return EAGER
    obstacle = None if backend == "auto" else _obstacle(x, backend)
    if obstacle is not None:
        raise ValueError(f"backend {backend!r} {obstacle}")
    if backend == "native":
        return NATIVE
    from floe_triton import gpu  # which needs triton

    return Implementation(gpu.forward, gpu.backward)


def _obstacle(x: Tensor, backend: str) -> str | None:
    if backend == "native":
        if x.device.type != "cpu":
            return f"runs on the CPU, got x on {x.device}"
        available = product_form.native_available()
        return None if available else "needs floe's operators, which are not loaded"
    if x.dtype == torch.float64:
        return "takes bfloat16, float16 and float32, got float64"
    obstacle = launch.obstacle(x.device)
    if obstacle is None or x.device.type not in ("cpu", "meta"):
        return obstacle
    interpreted = x.device.type == "meta" or launch.interpreted()
    return None if interpreted else obstacle


def _registered_forward(x: Tensor, group: Group) -> tuple[list[Tensor], Routed]:
    ys, *routed = torch.ops.floe.moe_lora_forward(x, *group.fields())
    return ys, Routed(*routed)


def _registered_backward(
    grad_ys: list[Tensor], x: Tensor, group: Group, routed: Routed, needs: Needs
) -> Gradients:
    grad_x, *grads = torch.ops.floe.moe_lora_backward(
        grad_ys, x, *group.fields(), *vars(routed).values(), *vars(needs).values()
    )
    return Gradients(grad_x if needs.x else None, *grads)


REGISTERED = Implementation(_registered_forward, _registered_backward)

_GROUP = (
    "Tensor[] weights, Tensor?[] biases, Tensor[] base_outputs, Tensor[] shrink_weights, "
    "Tensor[] expand_weights, Tensor?[] router_biases, float scaling, float temperature, "
    "float dropout_p, Tensor? seed, str backend, Tensor[] gates, int top_k"
)
_SCHEMAS = (
    f"moe_lora_forward(Tensor x, {_GROUP}) -> (Tensor[] ys, Tensor hidden, Tensor gate, Tensor z)",
    f"moe_lora_backward(Tensor[] grad_ys, Tensor x, {_GROUP}, Tensor hidden, Tensor gate, "
    "Tensor z, bool needs_x, bool needs_shrink, bool needs_expand, bool needs_router_bias, "
    "bool needs_gates) -> (Tensor grad_x, Tensor[] grad_shrink, Tensor[] grad_expand, "
    "Tensor[] grad_router_bias, Tensor[] grad_gates)",
)
_library = torch.library.Library("floe", "FRAGMENT")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

# What an op gives: of the forward (ys, hidden, gate, z), of the backward (grad_x, grad_shrink,
# grad_expand, grad_router_bias, grad_gates).
_Forward = tuple[list[Tensor], Tensor, Tensor, Tensor]
_Backward = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


@torch.library.impl(_library, "moe_lora_forward", "CompositeExplicitAutograd")
def _forward(x: Tensor, *described: Any) -> _Forward:
    group = Group(*described)
    check_forward(x, group)
    refuse_tangents("moe_lora_forward", x, *group.tensors())
    ys, routed = choose(x, group.backend).forward(x, group)
    return ys, routed.hidden, routed.gate, routed.z


@torch.library.register_fake("floe::moe_lora_forward", lib=_library)
def _forward_fake(x: Tensor, *described: Any) -> _Forward:
    group = Group(*described)
    check_forward(x, group)
    size, experts, rank = len(group), group.experts, group.rank
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens = x.shape[0]
    return (
        [x.new_empty(tokens, expand.shape[0]) for expand in group.expand_weights],
        x.new_empty(size, tokens, group.hidden_size, dtype=wide),
        x.new_empty(size, tokens, experts, dtype=wide),
        x.new_empty(size, tokens, experts * rank),
    )


def _checked_backward(
    grad_ys: list[Tensor], x: Tensor, arguments: Sequence[Any]
) -> tuple[Group, Routed, Needs]:
    """What a backward works on, of its op's arguments after x."""
    group, routed = Group(*arguments[:-8]), Routed(*arguments[-8:-5])
    check_op(x, group)
    check_backward(grad_ys, x, group, routed)
    return group, routed, Needs(*arguments[-5:])


@torch.library.impl(_library, "moe_lora_backward", "CompositeExplicitAutograd")
def _backward(grad_ys: list[Tensor], x: Tensor, *arguments: Any) -> _Backward:
    group, routed, needs = _checked_backward(grad_ys, x, arguments)
    saved = tuple(vars(routed).values())
    refuse_tangents("moe_lora_backward", x, *grad_ys, *group.tensors(), *saved)
    routed = Routed(*(tensor.contiguous() for tensor in saved))
    grads = choose(x, group.backend).backward(grad_ys, x, group, routed, needs)
    grad_x = x.new_empty(0) if grads.x is None else grads.x
    of_adapters = list(grads.shrink), list(grads.expand), list(grads.router_bias)
    return grad_x, *of_adapters, list(grads.gates)


@torch.library.register_fake("floe::moe_lora_backward", lib=_library)
def _backward_fake(grad_ys: list[Tensor], x: Tensor, *arguments: Any) -> _Backward:
    group, _, needs = _checked_backward(grad_ys, x, arguments)

    def like(tensors: Sequence[Tensor | None], needed: bool) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in tensors if needed and t is not None]

    return (
        x.new_empty(x.shape) if needs.x else x.new_empty(0),
        like(group.shrink_weights, needs.shrink),
        like(group.expand_weights, needs.expand),
        like(group.router_biases, needs.router_bias),
        like(group.gates, needs.gates),
    )


def _no_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "floe::moe_lora_forward and floe::moe_lora_backward have no derivatives of their own; "
        "floe_triton.moe_lora has"
    )


for _name in ("floe::moe_lora_forward", "floe::moe_lora_backward"):
    torch.library.register_autograd(_name, _no_derivative, lib=_library)


@register_flop_formula(torch.ops.floe.moe_lora_forward)  # type: ignore[untyped-decorator]
def _forward_flops(x: Shape, *described: Any, **out: Any) -> int:
    weights, _, _, shrink_weights, expand_weights, *_ = described
    return count_products(x, [*weights, *shrink_weights, *expand_weights])


@register_flop_formula(torch.ops.floe.moe_lora_backward)  # type: ignore[untyped-decorator]
def _backward_flops(grad_ys: Any, x: Shape, *arguments: Any, **out: Any) -> int:
    weights, _, _, shrink_weights, expand_weights, *_ = arguments
    return count_gradients(x, weights, shrink_weights, expand_weights, Needs(*arguments[-5:]))


def count_products(x: Shape, matrices: Shapes) -> int:
    """FLOPs of every row of x with each of the matrices."""
    return 2 * x[0] * sum(map(prod, matrices))


def count_gradients(
    x: Shape, weights: Shapes, shrink_weights: Shapes, expand_weights: Shapes, needs: Needs
) -> int:
    """FLOPs of the backward's products."""
    of_z = needs.products or needs.gates
    products = [*expand_weights] * (of_z + needs.expand) + [*shrink_weights] * needs.shrink
    return count_products(x, products + [*shrink_weights, *weights] * needs.x)
