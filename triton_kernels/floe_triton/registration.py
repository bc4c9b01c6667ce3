"""The registered ops ``moe_lora_forward`` and ``moe_lora_backward`` under ``torch.ops.floe``.

The schemas live here, not in C++, because this package also stands alone, without floe.
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

from floe_triton import paths
from floe_triton.checks import check_backward, check_forward, check_op, refuse_tangents
from floe_triton.group import Gradients, Group, Needs, Routed

_GROUP = (
    "Tensor[] weights, Tensor?[] biases, Tensor[] base_outputs, Tensor[] shrink_weights, "
    "Tensor[] expand_weights, Tensor?[] router_biases, float scaling, float temperature, "
    "float dropout_p, Tensor? seed, str backend"
)
_SCHEMAS = (
    f"moe_lora_forward(Tensor x, {_GROUP}) -> (Tensor[] ys, Tensor hidden, Tensor gate, Tensor z)",
    f"moe_lora_backward(Tensor[] grad_ys, Tensor x, {_GROUP}, Tensor hidden, Tensor gate, "
    "Tensor z, bool needs_x, bool needs_shrink, bool needs_expand, bool needs_router_bias) "
    "-> (Tensor grad_x, Tensor[] grad_shrink, Tensor[] grad_expand, Tensor[] grad_router_bias)",
)

Tensors = list[Tensor]
Shape = Sequence[int]
Shapes = Sequence[Shape]

library = torch.library.Library("floe", "FRAGMENT")
for _schema in _SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


# In what follows ``described`` are the schemas' arguments from ``weights`` to ``seed``, in order:
# the fields of Group.


@torch.library.impl(library, "moe_lora_forward", "CompositeExplicitAutograd")
def _forward(x: Tensor, *arguments: Any) -> tuple[Tensors, Tensor, Tensor, Tensor]:
    *described, backend = arguments
    group = Group(*described)
    check_forward(x, group, backend)
    refuse_tangents("moe_lora_forward", x, *group.tensors())
    ys, routed = paths.forward(x, group, backend)
    return ys, routed.hidden, routed.gate, routed.z


@torch.library.impl(library, "moe_lora_backward", "CompositeExplicitAutograd")
def _backward(
    grad_ys: Tensors, x: Tensor, *arguments: Any
) -> tuple[Tensor, Tensors, Tensors, Tensors]:
    *described, backend = arguments[:-7]
    group, needs = Group(*described), Needs(*arguments[-4:])
    check_op(x, group, backend)
    check_backward(grad_ys, x, group, Routed(*arguments[-7:-4]))
    refuse_tangents("moe_lora_backward", x, *grad_ys, *group.tensors(), *arguments[-7:-4])
    routed = Routed(*(saved.contiguous() for saved in arguments[-7:-4]))
    found = paths.backward(grad_ys, x, group, routed, needs, backend)
    grad_x = x.new_empty(0) if found.x is None else found.x
    return grad_x, list(found.shrink), list(found.expand), list(found.router_bias)


@torch.library.register_fake("floe::moe_lora_forward", lib=library)
def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensors, Tensor, Tensor, Tensor]:
    group = Group(*arguments[:-1])
    check_forward(x, group, arguments[-1])
    size, experts, rank = len(group), group.experts, group.rank
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens = x.shape[0]
    return (
        [x.new_empty(tokens, expand.shape[0]) for expand in group.expand_weights],
        x.new_empty(size, tokens, rank, dtype=wide),
        x.new_empty(size, tokens, experts, dtype=wide),
        x.new_empty(size, tokens, experts * rank),
    )


@torch.library.register_fake("floe::moe_lora_backward", lib=library)
def _backward_fake(
    grad_ys: Tensors, x: Tensor, *arguments: Any
) -> tuple[Tensor, Tensors, Tensors, Tensors]:
    group, needs = Group(*arguments[:-8]), Needs(*arguments[-4:])
    check_op(x, group, arguments[-8])
    check_backward(grad_ys, x, group, Routed(*arguments[-7:-4]))

    def like(tensors: Sequence[Tensor | None], needed: bool) -> Tensors:
        return [t.new_empty(t.shape) for t in tensors if needed and t is not None]

    return (
        x.new_empty(x.shape) if needs.x else x.new_empty(0),
        like(group.shrink_weights, needs.shrink),
        like(group.expand_weights, needs.expand),
        like(group.router_biases, needs.router_bias),
    )


def _no_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "floe::moe_lora_forward and floe::moe_lora_backward have no derivatives of their own; "
        "floe_triton.moe_lora has"
    )


for _name in ("floe::moe_lora_forward", "floe::moe_lora_backward"):
    torch.library.register_autograd(_name, _no_derivative, lib=library)


def count_products(x: Shape, matrices: Sequence[Shape]) -> int:
    """FLOPs of every row of x with each of the matrices."""
    return 2 * x[0] * sum(map(prod, matrices))


@register_flop_formula(torch.ops.floe.moe_lora_forward)  # type: ignore[untyped-decorator]
def _forward_flops(
    x: Shape, weights: Shapes, biases: Any, base_outputs: Any, shrink_weights: Shapes,
    expand_weights: Shapes, *settings: Any, **out: Any,
) -> int:  # fmt: skip
    return count_products(x, [*weights, *shrink_weights, *expand_weights])


@register_flop_formula(torch.ops.floe.moe_lora_backward)  # type: ignore[untyped-decorator]
def _backward_flops(
    grad_ys: Any, x: Shape, weights: Shapes, biases: Any, base_outputs: Any,
    shrink_weights: Shapes, expand_weights: Shapes, *settings: Any, **out: Any,
) -> int:  # fmt: skip
    return count_gradients(x, weights, shrink_weights, expand_weights, Needs(*settings[-4:]))


def count_gradients(
    x: Shape, weights: Shapes, shrink_weights: Shapes, expand_weights: Shapes, needs: Needs
) -> int:
    """FLOPs of the backward's products."""
    of_rows = needs.x or needs.shrink or needs.router_bias
    products = [*expand_weights] * (of_rows + needs.expand) + [*shrink_weights] * needs.shrink
    return count_products(x, products + [*shrink_weights, *weights] * needs.x)


def forward(x: Tensor, group: Group, backend: str) -> tuple[Tensors, Routed]:
    """``moe_lora_forward``, or where nobody watches ops, what it runs.

    Those who watch are compilers, dispatch modes and tensor subclasses. A call through the
    dispatcher takes as long as five small kernels.
    """
    if _unwatched(x, *group.tensors()):
        return paths.forward(x, group, backend)
    ys, *routed = torch.ops.floe.moe_lora_forward(x, *group.fields(), backend)
    return ys, Routed(*routed)


def backward(
    grad_ys: Tensors, x: Tensor, group: Group, routed: Routed, needs: Needs, backend: str
) -> Gradients:
    """``moe_lora_backward``, likewise."""
    if _unwatched(x, *grad_ys, *group.tensors()):
        return paths.backward(grad_ys, x, group, routed, needs, backend)
    grad_x, *found = torch.ops.floe.moe_lora_backward(
        grad_ys, x, *group.fields(), backend, routed.hidden, routed.gate, routed.z, needs.x,
        needs.shrink, needs.expand, needs.router_bias,
    )  # fmt: skip
    return Gradients(grad_x if needs.x else None, *found)


def _unwatched(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    for tensor in tensors:  # no generator: this is asked for every tensor of every call
        kind = type(tensor)
        if kind is not Parameter and kind is not Tensor and tensor is not None:
            return False
    return True
