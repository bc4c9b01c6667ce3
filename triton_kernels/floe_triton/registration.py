"""The registered ops ``moe_lora_forward`` and ``moe_lora_backward`` under ``torch.ops.floe``.

The schemas live here, not in C++, because this package also stands alone, without floe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from floe_triton import paths
from floe_triton.group import Group, Needs, Routed

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
Optionals = list[Tensor | None]

library = torch.library.Library("floe", "FRAGMENT")
for _schema in _SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(library, "moe_lora_forward", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    weights: Tensors,
    biases: Optionals,
    base_outputs: Tensors,
    shrink_weights: Tensors,
    expand_weights: Tensors,
    router_biases: Optionals,
    scaling: float,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensors, Tensor, Tensor, Tensor]:
    group = Group(
        weights, biases, base_outputs, shrink_weights, expand_weights, router_biases,
        scaling, temperature, dropout_p, seed,
    )  # fmt: skip
    ys, routed = paths.forward(x, group, backend)
    return ys, routed.hidden, routed.gate, routed.z


@torch.library.impl(library, "moe_lora_backward", "CompositeExplicitAutograd")
def _backward(
    grad_ys: Tensors,
    x: Tensor,
    weights: Tensors,
    biases: Optionals,
    base_outputs: Tensors,
    shrink_weights: Tensors,
    expand_weights: Tensors,
    router_biases: Optionals,
    scaling: float,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    hidden: Tensor,
    gate: Tensor,
    z: Tensor,
    needs_x: bool,
    needs_shrink: bool,
    needs_expand: bool,
    needs_router_bias: bool,
) -> tuple[Tensor, Tensors, Tensors, Tensors]:
    group = Group(
        weights, biases, base_outputs, shrink_weights, expand_weights, router_biases,
        scaling, temperature, dropout_p, seed,
    )  # fmt: skip
    needs = Needs(needs_x, needs_shrink, needs_expand, needs_router_bias)
    found = paths.backward(grad_ys, x, group, Routed(hidden, gate, z), needs, backend)
    grad_x = x.new_empty(0) if found.x is None else found.x
    return grad_x, list(found.shrink), list(found.expand), list(found.router_bias)


@torch.library.register_fake("floe::moe_lora_forward", lib=library)
def _forward_fake(
    x: Tensor,
    weights: Tensors,
    biases: Optionals,
    base_outputs: Tensors,
    shrink_weights: Tensors,
    expand_weights: Tensors,
    router_biases: Optionals,
    scaling: float,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensors, Tensor, Tensor, Tensor]:
    size, (_, experts, rank) = len(expand_weights), expand_weights[0].shape
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens = x.shape[0]
    return (
        [x.new_empty(tokens, expand.shape[0]) for expand in expand_weights],
        x.new_empty(size, tokens, rank, dtype=wide),
        x.new_empty(size, tokens, experts, dtype=wide),
        x.new_empty(size, tokens, experts * rank),
    )


@torch.library.register_fake("floe::moe_lora_backward", lib=library)
def _backward_fake(
    grad_ys: Tensors,
    x: Tensor,
    weights: Tensors,
    biases: Optionals,
    base_outputs: Tensors,
    shrink_weights: Tensors,
    expand_weights: Tensors,
    router_biases: Optionals,
    scaling: float,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    hidden: Tensor,
    gate: Tensor,
    z: Tensor,
    needs_x: bool,
    needs_shrink: bool,
    needs_expand: bool,
    needs_router_bias: bool,
) -> tuple[Tensor, Tensors, Tensors, Tensors]:
    def like(tensors: Optionals, needed: bool) -> Tensors:
        return [t.new_empty(t.shape) for t in tensors if needed and t is not None]

    return (
        x.new_empty(x.shape) if needs_x else x.new_empty(0),
        like([*shrink_weights], needs_shrink),
        like([*expand_weights], needs_expand),
        like(router_biases, needs_router_bias),
    )
