"""Few tokens: two small launches for a whole group, whatever its number of linears.

With at most 16 tokens nothing is read twice that matters, and what costs is a launch and waiting
for memory. So the first launch cuts x's columns over many programs, and in the second every
program sums those parts again, in the same order, routes, and writes its tile of
``z_g Bcat_g^T``: to that the frozen product adds. Each linear's own tensors are read where they
are; nothing is concatenated. At most four linears, since each tensor is an argument.

Wide float32 experts, which no tensor core multiplies, take the second launch apart: see `decode`.
"""

# ruff: noqa: SIM102  (of two nested ifs in a kernel the outer one is decided by the compiler)

# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments are no Python types)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from floe_triton import tuning
from floe_triton.expand import expand
from floe_triton.group import Group, Routed
from floe_triton.launch import device_of, launch
from floe_triton.shrink import route

MAX_TOKENS = 16
MAX_LINEARS = 4


@triton.jit
def pick(g, first, second, third, fourth):
    """Pointer number ``g`` of those that are given; they have one dtype."""
    picked = first
    if second is not None:
        if g == 1:
            picked = second
    if third is not None:
        if g == 2:
            picked = third
    if fourth is not None:
        if g == 3:
            picked = fourth
    return picked


@triton.jit
def pick_size(g, first, second, third, fourth):
    """Number ``g`` of four."""
    return tl.where(g == 0, first, tl.where(g == 1, second, tl.where(g == 2, third, fourth)))


@triton.jit
def load_picked(g, first, second, third, fourth, offsets, mask):
    """What pointer number ``g`` has at ``offsets`` in float32, 0 where it is None."""
    values = tl.zeros(offsets.shape, tl.float32)
    if first is not None:
        if g == 0:
            values += tl.load(first + offsets, mask=mask, other=0.0).to(tl.float32)
    if second is not None:
        if g == 1:
            values += tl.load(second + offsets, mask=mask, other=0.0).to(tl.float32)
    if third is not None:
        if g == 2:
            values += tl.load(third + offsets, mask=mask, other=0.0).to(tl.float32)
    if fourth is not None:
        if g == 3:
            values += tl.load(fourth + offsets, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["tokens"])
def decode_shrink_kernel(
    x, shrink0, shrink1, shrink2, shrink3, products, tokens, columns, stride, span,
    G: tl.constexpr, M: tl.constexpr, R: tl.constexpr, PAD: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One linear's ``x shrink^T`` over ``span`` columns, to its columns of ``products``
    [S, T, G (r + M)]: all hidden, then all logits.
    """
    split = tl.program_id(0)
    g = tl.program_id(1)
    shrink = pick(g, shrink0, shrink1, shrink2, shrink3)
    t = tl.arange(0, BLOCK_T)
    p = tl.arange(0, PAD)
    sums = tl.zeros((BLOCK_T, PAD), tl.float32)
    for first in range(split * span, min((split + 1) * span, columns), BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < columns
        tile = tl.load(
            x + t[:, None].to(tl.int64) * stride + k[None, :],
            mask=(t < tokens)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        rows = tl.load(
            shrink + p[None, :] * columns + k[:, None],
            mask=(p < R + M)[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        sums = tl.dot(tile, rows.to(tile.dtype), sums, input_precision=PRECISION)
    column = tl.where(p < R, g * R + p, G * R + g * M + p - R)
    out = products + (split * tokens + t[:, None]) * (G * (R + M)) + column[None, :]
    tl.store(out, sums, mask=(t < tokens)[:, None] & (p < R + M)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def decode_expand_kernel(
    products, router0, router1, router2, router3, expand0, expand1, expand2, expand3,
    added0, added1, added2, added3, y0, y1, y2, y3, hidden, gate, z,
    features0, features1, features2, features3, tokens, scaling, inverse_temperature,
    G: tl.constexpr, M: tl.constexpr, R: tl.constexpr, PAD_M: tl.constexpr, PAD_R: tl.constexpr,
    SPLITS: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One linear's routing, and a tile of its ``z Bcat^T`` + bias (or base output, if BASE)."""
    g = tl.program_id(1)
    features = pick_size(g, features0, features1, features2, features3)
    t = tl.arange(0, BLOCK_T)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, PAD_M)
    j = tl.arange(0, PAD_R)
    token = t < tokens
    # the weight first: it does not wait for the sums
    c = tl.arange(0, PAD_M * PAD_R)
    inside = (c // PAD_R < M) & (c % PAD_R < R)
    # c itself where there is no padding within an expert, for whole-line loads
    c_real = c if PAD_R == R else (c // PAD_R) * R + c % PAD_R
    weight = tl.load(
        pick(g, expand0, expand1, expand2, expand3) + n[None, :] * (M * R) + c_real[:, None],
        mask=inside[:, None] & (n < features)[None, :], other=0.0,
    )  # fmt: skip
    sums = tl.zeros((BLOCK_T, PAD_R), tl.float32)
    logits = tl.zeros((BLOCK_T, PAD_M), tl.float32)
    for first in range(0, SPLITS, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)[:, None, None]
        real = (split < SPLITS) & token[None, :, None]
        part = products + (split * tokens + t[None, :, None]) * (G * (R + M))
        a = part + g * R + j[None, None, :]
        b = part + G * R + g * M + i[None, None, :]
        sums += tl.sum(tl.load(a, mask=real & (j < R)[None, None, :], other=0.0), 0)
        logits += tl.sum(tl.load(b, mask=real & (i < M)[None, None, :], other=0.0), 0)
    logits += load_picked(g, router0, router1, router2, router3, i, i < M)[None, :]
    logits = tl.where((i < M)[None, :], logits * inverse_temperature, float("-inf"))
    odds = tl.exp(logits - tl.max(logits, 1)[:, None])
    weights = odds / tl.sum(odds, 1)[:, None]
    routed = (scaling * weights)[:, :, None] * sums[:, None, :]
    routed = tl.reshape(routed.to(z.dtype.element_ty), (BLOCK_T, PAD_M * PAD_R))
    row = g * tokens + t[:, None]
    if tl.program_id(0) == 0:
        tl.store(hidden + row * R + j[None, :], sums, mask=token[:, None] & (j < R)[None, :])
        tl.store(gate + row * M + i[None, :], weights, mask=token[:, None] & (i < M)[None, :])
        out = z + row * (M * R) + c_real[None, :]
        tl.store(out, routed, mask=token[:, None] & inside[None, :])
    total = tl.dot(routed, weight.to(routed.dtype), input_precision=PRECISION)
    at = t[:, None] * features + n[None, :]
    real = token[:, None] & (n < features)[None, :]
    added_at = at if BASE else at * 0 + n[None, :]
    total += load_picked(g, added0, added1, added2, added3, added_at, real)
    tl.store(pick(g, y0, y1, y2, y3) + at, total.to(z.dtype.element_ty), mask=real)


def decode(x: Tensor, group: Group) -> tuple[list[Tensor], Routed]:
    """The experts' part of every linear's y, for few tokens: two launches.

    In float32 with more than 64 (padded) columns M r, the second launch is one that routes and one
    per linear: an exact float32 product of that depth does not fit into registers.

    Args:
        x: [T, K], T at most ``MAX_TOKENS``, bfloat16, float16 or float32.
        group: At most ``MAX_LINEARS`` linears and no dropout.

    Returns:
        For each linear ``z Bcat^T`` + its bias (or base output) [T, N_g] in x's dtype, new, to
        which ``x W^T`` is to be added; and ``Routed``.

    Raises:
        ValueError: more tokens or linears than that, or dropout.
    """
    _check(x, group)
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens = x.shape[0]
    products = _shrink(x, group)
    pads = tuning.decode_pads(group.rank, group.experts)
    if tuning.decode_expands_apart(pads, x.element_size()):
        return _apart(products, group, x.dtype)
    size = (len(group), tokens)
    routed = Routed(
        products.new_empty(*size, group.rank),
        products.new_empty(*size, group.experts),
        x.new_empty(*size, group.experts * group.rank),
    )
    outputs = [x.new_empty(tokens, weight.shape[0]) for weight in group.expand_weights]
    features = [y.shape[1] for y in outputs]
    added = group.base_outputs or group.biases
    arguments = {
        "products": products,
        **_four("router", group.router_biases),
        **_four("expand", group.expand_weights),
        **_four("added", added),
        **_four("y", outputs),
        "hidden": routed.hidden,
        "gate": routed.gate,
        "z": routed.z,
        **_four("features", features, 0),
        "tokens": tokens,
        "scaling": group.scaling,
        "inverse_temperature": 1.0 / group.temperature,
    }
    constants = {
        **_sizes(group), **pads, "SPLITS": len(products), "BASE": bool(group.base_outputs),
    }  # fmt: skip
    blocks = tuning.decode_expand_blocks(device_of(x), features, pads, x.element_size())
    grid = (triton.cdiv(max(features), blocks.constants["BLOCK_N"]), len(group))
    flops = 2 * tokens * sum(features) * group.experts * group.rank
    launch(decode_expand_kernel, grid, arguments, constants, blocks, flops)
    return outputs, routed


def _shrink(x: Tensor, group: Group) -> Tensor:
    tokens, columns = x.shape
    rows = group.rank + group.experts
    blocks = tuning.decode_shrink_blocks(device_of(x), rows, x.element_size())
    span = tuning.decode_span(columns, rows, blocks)
    splits = triton.cdiv(columns, span)
    products = x.new_empty(splits, tokens, len(group) * rows, dtype=torch.float32)
    arguments = {
        "x": x,
        **_four("shrink", group.shrink_weights),
        "products": products,
        "tokens": tokens,
        "columns": columns,
        "stride": x.stride(0),
        "span": span,
    }
    constants = {**_sizes(group), "PAD": max(16, tuning.power_of_two(rows))}
    flops = 2 * tokens * columns * len(group) * rows
    launch(decode_shrink_kernel, (splits, len(group)), arguments, constants, blocks, flops)
    return products


def _apart(products: Tensor, group: Group, dtype: torch.dtype) -> tuple[list[Tensor], Routed]:
    routed = route(
        products, group.router_bias(), groups=len(group), rank=group.rank, experts=group.experts,
        scaling=group.scaling, temperature=group.temperature, dtype=dtype,
    )  # fmt: skip
    none = [None] * len(group)
    added = zip(group.biases or none, group.base_outputs or none, strict=True)
    outputs = [
        expand(z, weight, *one)
        for z, weight, one in zip(routed.z, group.expand_weights, added, strict=True)
    ]
    return outputs, routed


def _four(name: str, given: Sequence[object], default: object = None) -> dict[str, object]:
    """``given`` as the arguments name0 .. name3."""
    values = [t.contiguous() if isinstance(t, Tensor) else t for t in given]
    values += [default] * (MAX_LINEARS - len(values))
    return {f"{name}{g}": value for g, value in enumerate(values)}


def _sizes(group: Group) -> dict[str, int | str]:
    precision = tuning.precision()
    return {"G": len(group), "M": group.experts, "R": group.rank, "PRECISION": precision}


def _check(x: Tensor, group: Group) -> None:
    if x.shape[0] > MAX_TOKENS:
        raise ValueError(f"x must have at most {MAX_TOKENS} tokens, got {x.shape[0]}")
    if len(group) > MAX_LINEARS:
        raise ValueError(f"a group must have at most {MAX_LINEARS} linears, got {len(group)}")
    if group.dropout_p:
        raise ValueError(f"dropout_p must be 0, got {group.dropout_p}")
