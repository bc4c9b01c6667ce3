"""The MoE-LoRA linear as registered ops, ``moe_lora_forward`` and ``moe_lora_backward``.

They are found under ``torch.ops.floe``. The schemas live here because this package also stands
alone, without floe. Autograd is one ``autograd.Function`` around the two ops: cheaper per call than
an autograd registration, and ``torch.compile`` traces through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from floe_triton import eager

_SCHEMAS = (
    "moe_lora_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? base_output, "
    "Tensor shrink_weight, Tensor expand_weight, float scaling, float dropout_p, Tensor? seed) "
    "-> (Tensor y, Tensor hidden, Tensor gate, Tensor z)",
    "moe_lora_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor shrink_weight, "
    "Tensor expand_weight, Tensor hidden, Tensor gate, Tensor z, float scaling, float dropout_p, "
    "Tensor? seed, bool needs_x, bool needs_shrink, bool needs_expand) "
    "-> (Tensor grad_x, Tensor grad_shrink, Tensor grad_expand)",
)

_library = torch.library.Library("floe", "FRAGMENT")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("moe_lora_forward", eager.forward, "CompositeExplicitAutograd")
_library.impl("moe_lora_backward", eager.backward, "CompositeExplicitAutograd")


@torch.library.register_fake("floe::moe_lora_forward", lib=_library)
def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, experts, rank = expand_weight.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens = x.shape[0]
    return (
        x.new_empty(tokens, features),
        x.new_empty(tokens, rank, dtype=wide),
        x.new_empty(tokens, experts, dtype=wide),
        x.new_empty(tokens, experts * rank),
    )


@torch.library.register_fake("floe::moe_lora_backward", lib=_library)
def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    hidden: Tensor,
    gate: Tensor,
    z: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_shrink: bool,
    needs_expand: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if needs_x else x.new_empty(0),
        shrink_weight.new_empty(shrink_weight.shape) if needs_shrink else x.new_empty(0),
        expand_weight.new_empty(expand_weight.shape) if needs_expand else x.new_empty(0),
    )


class _MoELoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base_output: Tensor | None,
        shrink_weight: Tensor,
        expand_weight: Tensor,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        y: Tensor
        y, hidden, gate, z = torch.ops.floe.moe_lora_forward(
            x, weight, bias, base_output, shrink_weight, expand_weight, scaling, dropout_p, seed
        )
        ctx.save_for_backward(x, weight, shrink_weight, expand_weight, hidden, gate, z, seed)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, shrink_weight, expand_weight, hidden, gate, z, seed = ctx.saved_tensors
        needs_x, _, _, needs_base, needs_shrink, needs_expand = ctx.needs_input_grad[:6]
        grad_x, grad_shrink, grad_expand = torch.ops.floe.moe_lora_backward(
            grad_y, x, weight, shrink_weight, expand_weight, hidden, gate, z,
            ctx.scaling, ctx.dropout_p, seed, needs_x, needs_shrink, needs_expand,
        )  # fmt: skip
        return (
            grad_x if needs_x else None,
            None,
            None,
            grad_y if needs_base else None,
            grad_shrink if needs_shrink else None,
            grad_expand if needs_expand else None,
            None,
            None,
            None,
        )


def moe_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Frozen linear plus routed low-rank experts.

    Differentiable in x, shrink_weight and expand_weight. Equals
    :func:`floe_triton.reference.moe_lora`:
    ``y = x W^T + b + scaling * sum_i softmax(x R^T)_i * (dropout(x) A^T) B_i^T`` (FLoE Eq. 1).

    Args:
        x: [..., K], floating point, any strides.
        weight: [N, K], frozen, x's dtype and device.
        bias: [N] or None.
        shrink_weight: [r + M, K], rows of A then of the router, any float dtype (computed in x's).
        expand_weight: [N, M, r], likewise.
        scaling: alpha / r, applied before the only rounding.
        dropout_p: in [0, 1), in steps of 1/256; one mask for all experts, the router sees x
            undropped.
        seed: 0-dim int64 tensor on x's device, needed when dropout_p > 0.

    Returns:
        [..., N] in x's dtype. Under autocast, x, weight and bias are cast to autocast's dtype
        first.

    Raises:
        ValueError, TypeError: naming the argument, the rule and what came.
    """
    check_arguments(x, weight, bias, None, shrink_weight, expand_weight, scaling, dropout_p, seed)
    x, weight, bias = _autocast(x, weight, bias)
    return _apply(x, weight, bias, None, shrink_weight, expand_weight, scaling, dropout_p, seed)


def moe_lora_add(
    base_output: Tensor,
    x: Tensor,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """:func:`moe_lora` on top of a given base output [..., N].

    For quantised or otherwise wrapped base layers.
    """
    check_arguments(
        x, None, None, base_output, shrink_weight, expand_weight, scaling, dropout_p, seed
    )
    x, base_output, _ = _autocast(x, base_output, None)
    return _apply(
        x, None, None, base_output, shrink_weight, expand_weight, scaling, dropout_p, seed
    )


def _apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    flat_base = None if base_output is None else base_output.reshape(-1, base_output.shape[-1])
    y: Tensor = _MoELoRA.apply(
        x.reshape(-1, x.shape[-1]), weight, bias, flat_base, shrink_weight, expand_weight,
        float(scaling), float(dropout_p), seed if dropout_p > 0.0 else None,
    )  # fmt: skip
    return y.view(*x.shape[:-1], y.shape[-1])


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    # float64 stays as it is, as in torch's own autocast
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Raise ValueError or TypeError with name, rule and what came.

    Done before any kernel sees a pointer.
    """
    _check_tensors(x, weight, bias, base_output, shrink_weight, expand_weight)
    features, experts, rank = expand_weight.shape
    if rank < 1 or experts < 1:
        raise ValueError(
            f"expand_weight [N, M, r] needs M >= 1 and r >= 1, got {tuple(expand_weight.shape)}"
        )
    if x.dim() < 1 or shrink_weight.shape != (rank + experts, x.shape[-1]):
        raise ValueError(
            f"shrink_weight must be [r + M, K] = [{rank + experts}, K] for x [..., K], "
            f"got {tuple(shrink_weight.shape)} and x {tuple(x.shape)}"
        )
    if weight is not None and weight.shape != (features, x.shape[-1]):
        raise ValueError(
            f"weight must be [N, K] = [{features}, {x.shape[-1]}] "
            f"(expand_weight [N, M, r], x [..., K]), got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (features,):
        raise ValueError(f"bias must be [N] = [{features}], got {tuple(bias.shape)}")
    if base_output is not None and base_output.shape != (*x.shape[:-1], features):
        raise ValueError(
            f"base_output must be {(*x.shape[:-1], features)}, got {tuple(base_output.shape)}"
        )
    if not -float("inf") < scaling < float("inf"):
        raise ValueError(f"scaling must be a finite number, got {scaling}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0.0:
        _check_seed(seed, x)


def _check_tensors(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base_output: Tensor | None,
    shrink_weight: Tensor,
    expand_weight: Tensor,
) -> None:
    named: dict[str, Tensor | None]
    named = {"x": x, "shrink_weight": shrink_weight, "expand_weight": expand_weight}
    named |= {"base_output": base_output} if base_output is not None else {"weight": weight}
    if bias is not None:
        named["bias"] = bias
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        same_dtype = name in ("weight", "bias", "base_output") and not torch.is_autocast_enabled(
            x.device.type
        )
        if same_dtype and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    if expand_weight.dim() != 3:
        raise ValueError(f"expand_weight must be [N, M, r], got {tuple(expand_weight.shape)}")
    for name, frozen in (("weight", weight), ("bias", bias)):
        if frozen is not None and frozen.requires_grad:
            raise ValueError(
                f"{name} must be frozen (requires_grad=False): moe_lora gives it no gradient"
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
