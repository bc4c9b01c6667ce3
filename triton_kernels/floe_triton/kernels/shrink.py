"""The way in: x meets the rows of A and of the routers once, and each token is routed.

With x [T, K] and G linears, each with rows A_g [r, K] and R_g [M, K]::

    hidden_g = dropout(x) A_g^T                               [T, r]
    gate_g   = softmax((x R_g^T + router_bias_g) / temperature)   [T, M]
    z_g[t, i r + j] = scaling gate_g[t, i] hidden_g[t, j]     [T, M r], the only rounding

Every function here is one launch. `shrink` routes too where one program sees all columns of x;
otherwise it leaves parts of the products for `route`. With few tokens (at most 16) nothing is read
twice that matters, and what costs is waiting for memory: `decode_shrink` cuts x's columns over many
programs and reads each linear's own tensors, concatenating nothing.
"""

# ruff: noqa: SIM102  (of two nested ifs in a kernel the outer one is decided by the compiler)

# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments are no Python types)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from floe_triton import tuning
from floe_triton.group import Group, Routed
from floe_triton.kernels.dropout import keep_mask
from floe_triton.launch import device_of, launch
from floe_triton.reference import dropout_scale, dropout_threshold

MAX_TOKENS = 16  # of the launches that decode
MAX_LINEARS = 4  # each tensor is an argument


@triton.jit
def route_tile(
    hiddens, logits, token, linear, router_bias, hidden, gate, z, tokens, linears, scaling,
    inverse_temperature, EXPERTS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Softmax over the experts and z, of ``hiddens`` [BLOCK_T, SLOTS, PAD_RANK] and ``logits``
    [BLOCK_T, SLOTS, PAD_EXPERTS], for the tokens ``token`` (int64) and linears ``linear`` [SLOTS].
    """
    expert = tl.arange(0, logits.shape[2])
    rank = tl.arange(0, hiddens.shape[2])
    real = (token < tokens)[:, None] & (linear < linears)[None, :]
    if router_bias is not None:
        inside = (linear < linears)[:, None] & (expert < EXPERTS)[None, :]
        biases = router_bias + linear[:, None] * EXPERTS + expert[None, :]
        bias = tl.load(biases, mask=inside, other=0.0)  # [SLOTS, PAD_EXPERTS]
        logits += bias.to(tl.float32)[None, :, :]
    is_expert = (expert < EXPERTS)[None, None, :]
    is_rank = (rank < RANK)[None, None, :]
    logits = tl.where(is_expert, logits * inverse_temperature, float("-inf"))
    odds = tl.exp(logits - tl.max(logits, 2)[:, :, None])
    weights = odds / tl.sum(odds, 2)[:, :, None]
    row = (linear.to(tl.int64)[None, :] * tokens + token[:, None])[:, :, None]  # of [G T, ...]
    tl.store(hidden + row * RANK + rank[None, None, :], hiddens, mask=real[:, :, None] & is_rank)
    gates = gate + row * EXPERTS + expert[None, None, :]
    tl.store(gates, weights, mask=real[:, :, None] & is_expert)
    zs = z + row * (EXPERTS * RANK) + rank[None, None, :]
    for i in tl.static_range(EXPERTS):
        weight = scaling * tl.sum(tl.where((expert == i)[None, None, :], weights, 0.0), 2)
        routed = (weight[:, :, None] * hiddens).to(z.dtype.element_ty)
        tl.store(zs + i * RANK, routed, mask=real[:, :, None] & is_rank)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def shrink_kernel(
    x, rows, router_bias, seed, products, hidden, gate, z, tokens, columns, stride, span,
    scaling, inverse_temperature, threshold, keep_scale,
    LINEARS: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr, SLOTS: tl.constexpr,
    PAD_EXPERTS: tl.constexpr, PAD_RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Both products of a tile of tokens over ``span`` columns of x, and where that is all of them
    the routing at once. Otherwise ``products`` [S, T, G (r + M)] gets the sums of each span.

    A linear has a slot of padded width in either accumulator, so that G = 3, r = 5, M = 3 are
    [BLOCK_T, 4 * 8] and [BLOCK_T, 4 * 4]. Padded rows are not read.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    is_token = (token < tokens)[:, None]
    a = tl.arange(0, SLOTS * PAD_RANK)
    b = tl.arange(0, SLOTS * PAD_EXPERTS)
    a_real = ((a // PAD_RANK < LINEARS) & (a % PAD_RANK < RANK))[None, :]
    b_real = ((b // PAD_EXPERTS < LINEARS) & (b % PAD_EXPERTS < EXPERTS))[None, :]
    a_row = ((a // PAD_RANK) * RANK + a % PAD_RANK)[None, :]
    b_row = (LINEARS * RANK + (b // PAD_EXPERTS) * EXPERTS + b % PAD_EXPERTS)[None, :]
    hiddens = tl.zeros((BLOCK_T, SLOTS * PAD_RANK), tl.float32)
    logits = tl.zeros((BLOCK_T, SLOTS * PAD_EXPERTS), tl.float32)
    if seed is not None:
        key = tl.load(seed)  # []
    for first in range(split * span, min((split + 1) * span, columns), BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        inside = column < columns
        at = x + token[:, None] * stride + column[None, :]
        tile = tl.load(at, mask=is_token & inside[None, :], other=0.0)  # [BLOCK_T, BLOCK_K]
        at = rows + a_row * columns + column[:, None]
        a_tile = tl.load(at, mask=a_real & inside[:, None], other=0.0)  # [BLOCK_K, SLOTS PAD_RANK]
        at = rows + b_row * columns + column[:, None]
        # [BLOCK_K, SLOTS PAD_EXPERTS]
        b_tile = tl.load(at, mask=b_real & inside[:, None], other=0.0)
        # [BLOCK_T, BLOCK_K] x [BLOCK_K, SLOTS PAD_EXPERTS]
        logits = tl.dot(tile, b_tile.to(tile.dtype), logits, input_precision=PRECISION)
        if seed is not None:
            keep = keep_mask(key, token, first, threshold, BLOCK_T, BLOCK_K)
            tile = tl.where(keep, tile, 0.0)
        # [BLOCK_T, BLOCK_K] x [BLOCK_K, SLOTS PAD_RANK]
        hiddens = tl.dot(tile, a_tile.to(tile.dtype), hiddens, input_precision=PRECISION)
    if seed is not None:
        hiddens *= keep_scale
    if products is not None:
        row = split * tokens.to(tl.int64) + token[:, None]
        out = products + row * (LINEARS * (RANK + EXPERTS))
        tl.store(out + a_row, hiddens, mask=is_token & a_real)
        tl.store(out + b_row, logits, mask=is_token & b_real)
    else:
        route_tile(
            tl.reshape(hiddens, (BLOCK_T, SLOTS, PAD_RANK)),
            tl.reshape(logits, (BLOCK_T, SLOTS, PAD_EXPERTS)),
            token,
            tl.arange(0, SLOTS),
            router_bias,
            hidden,
            gate,
            z,
            tokens,
            LINEARS,
            scaling,
            inverse_temperature,
            EXPERTS,
            RANK,
        )


@triton.jit(do_not_specialize=["tokens", "splits", "linears"])
def route_kernel(
    products, router_bias, hidden, gate, z, tokens, splits, linears, scaling, inverse_temperature,
    EXPERTS: tl.constexpr, RANK: tl.constexpr, PAD_EXPERTS: tl.constexpr, PAD_RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sum ``products`` [S, T, G (r + M)] over S, in order, and route: one linear a program."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    linear = tl.program_id(1) + tl.arange(0, 1)
    expert = tl.arange(0, PAD_EXPERTS)[None, None, :]
    rank = tl.arange(0, PAD_RANK)[None, None, :]
    width = linears * (RANK + EXPERTS)
    hiddens = tl.zeros((BLOCK_T, 1, PAD_RANK), tl.float32)
    logits = tl.zeros((BLOCK_T, 1, PAD_EXPERTS), tl.float32)
    for split in range(splits):
        part = products + (split * tokens.to(tl.int64) + token[:, None, None]) * width
        a = part + linear[None, :, None] * RANK + rank
        b = part + linears * RANK + linear[None, :, None] * EXPERTS + expert
        real = (token < tokens)[:, None, None]
        hiddens += tl.load(a, mask=real & (rank < RANK), other=0.0)  # [BLOCK_T, 1, PAD_RANK]
        logits += tl.load(b, mask=real & (expert < EXPERTS), other=0.0)  # [BLOCK_T, 1, PAD_EXPERTS]
    route_tile(
        hiddens,
        logits,
        token,
        linear,
        router_bias,
        hidden,
        gate,
        z,
        tokens,
        linears,
        scaling,
        inverse_temperature,
        EXPERTS,
        RANK,
    )


@triton.jit
def pick(linear, first, second, third, fourth):
    """Pointer number ``linear`` of those that are given; they have one dtype."""
    picked = first
    if second is not None:
        if linear == 1:
            picked = second
    if third is not None:
        if linear == 2:
            picked = third
    if fourth is not None:
        if linear == 3:
            picked = fourth
    return picked


@triton.jit(do_not_specialize=["tokens"])
def decode_shrink_kernel(
    x, shrink0, shrink1, shrink2, shrink3, products, tokens, columns, stride, span,
    LINEARS: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr, PAD: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One linear's ``x shrink^T`` over ``span`` columns, to its columns of ``products``
    [S, T, G (r + M)]: all hidden, then all logits.
    """
    split = tl.program_id(0)
    linear = tl.program_id(1)
    shrink = pick(linear, shrink0, shrink1, shrink2, shrink3)
    token = tl.arange(0, BLOCK_T)[:, None]
    row = tl.arange(0, PAD)[None, :]
    is_row = row < RANK + EXPERTS
    sums = tl.zeros((BLOCK_T, PAD), tl.float32)
    for first in range(split * span, min((split + 1) * span, columns), BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        inside = column < columns
        at = x + token.to(tl.int64) * stride + column[None, :]
        # [BLOCK_T, BLOCK_K]
        tile = tl.load(at, mask=(token < tokens) & inside[None, :], other=0.0)
        at = shrink + row * columns + column[:, None]
        rows = tl.load(at, mask=is_row & inside[:, None], other=0.0)  # [BLOCK_K, PAD]
        # [BLOCK_T, BLOCK_K] x [BLOCK_K, PAD]
        sums = tl.dot(tile, rows.to(tile.dtype), sums, input_precision=PRECISION)
    hidden = linear * RANK + row
    logit = LINEARS * RANK + linear * EXPERTS + row - RANK
    out = products + (split * tokens + token) * (LINEARS * (RANK + EXPERTS))
    out += tl.where(row < RANK, hidden, logit)
    tl.store(out, sums, mask=(token < tokens) & is_row)


def shrink(x: Tensor, rows: Tensor, group: Group) -> Routed | Tensor:
    """One read of x [T, K] for every linear; ``rows`` [G (r + M), K] are ``group.shrink_rows()``.

    x in bfloat16, float16 or float32, rows in any of these. Gives ``Routed`` (hidden and gate in
    float32, z in x's dtype) or, where programs share the columns or are out of registers, what
    `route` takes: products [S, T, G (r + M)] in float32.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, columns = x.shape
    device = device_of(x)
    pads = tuning.route_pads(group.rank, group.experts, len(group))
    dropping = group.dropout_p > 0.0
    blocks = tuning.shrink_blocks(device, tokens, pads, x.element_size(), rows.element_size())
    span = tuning.shrink_span(device, tokens, columns, blocks)
    splits = triton.cdiv(columns, span)
    routes = splits == 1 and not tuning.routes_apart(pads)
    result: Routed | Tensor
    if routes:
        result = empty_routed(x, group, tokens, x.dtype)
        written = {"products": None, **vars(result)}
    else:
        result = x.new_empty(splits, tokens, len(rows), dtype=torch.float32)
        written = {"products": result, "hidden": None, "gate": None, "z": None}
    arguments = {
        "x": x,
        "rows": rows.contiguous(),
        "router_bias": group.router_bias() if routes else None,
        "seed": group.seed if dropping else None,
        **written,
        "tokens": tokens,
        "columns": columns,
        "stride": x.stride(0),
        "span": span,
        "scaling": group.scaling,
        "inverse_temperature": 1.0 / group.temperature,
        "threshold": dropout_threshold(group.dropout_p),
        "keep_scale": dropout_scale(group.dropout_p),
    }
    constants = {**sizes(group), "LINEARS": len(group), "PRECISION": tuning.precision(), **pads}
    grid = (triton.cdiv(tokens, blocks.constants["BLOCK_T"]), splits)
    launch(shrink_kernel, grid, arguments, constants, blocks, 2 * tokens * columns * len(rows))
    return result


def route(products: Tensor, group: Group, dtype: torch.dtype) -> Routed:
    """Hidden, gate and z (in ``dtype``) from what x's products with the rows are.

    ``products``: [S, T, G (r + M)] float32, summed over S in order; columns as the rows of
    ``Group.shrink_rows``, of any r and M.
    """
    splits, tokens, _ = products.shape
    routed = empty_routed(products, group, tokens, dtype)
    pads = tuning.route_pads(group.rank, group.experts, 1)
    arguments = {
        "products": products.contiguous(),
        "router_bias": group.router_bias(),
        **vars(routed),
        "tokens": tokens,
        "splits": splits,
        "linears": len(group),
        "scaling": group.scaling,
        "inverse_temperature": 1.0 / group.temperature,
    }
    constants = {**sizes(group), **{name: pads[name] for name in ("PAD_EXPERTS", "PAD_RANK")}}
    blocks = tuning.route_blocks(device_of(products), tokens, pads)
    grid = (triton.cdiv(tokens, blocks.constants["BLOCK_T"]), len(group))
    launch(route_kernel, grid, arguments, constants, blocks)
    return routed


def decode_shrink(x: Tensor, group: Group) -> Tensor:
    """`shrink`'s products [S, T, G (r + M)] for few tokens.

    x [T, K] in bfloat16, float16 or float32, T at most ``MAX_TOKENS``; at most ``MAX_LINEARS``
    linears and no dropout.

    Raises:
        ValueError: more tokens or linears than that, or dropout.
    """
    if x.shape[0] > MAX_TOKENS:
        raise ValueError(f"x must have at most {MAX_TOKENS} tokens, got {x.shape[0]}")
    if len(group) > MAX_LINEARS:
        raise ValueError(f"a group must have at most {MAX_LINEARS} linears, got {len(group)}")
    if group.dropout_p:
        raise ValueError(f"dropout_p must be 0, got {group.dropout_p}")
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, columns = x.shape
    rows = group.rank + group.experts
    blocks = tuning.decode_shrink_blocks(device_of(x), rows, x.element_size())
    span = tuning.decode_span(columns, rows, blocks)
    splits = triton.cdiv(columns, span)
    products = x.new_empty(splits, tokens, len(group) * rows, dtype=torch.float32)
    arguments = {
        "x": x,
        **numbered("shrink", group.shrink_weights),
        "products": products,
        "tokens": tokens,
        "columns": columns,
        "stride": x.stride(0),
        "span": span,
    }
    constants = {
        **sizes(group),
        "LINEARS": len(group),
        "PRECISION": tuning.precision(),
        "PAD": max(16, tuning.power_of_two(rows)),
    }
    flops = 2 * tokens * columns * len(group) * rows
    launch(decode_shrink_kernel, (splits, len(group)), arguments, constants, blocks, flops)
    return products


def empty_routed(like: Tensor, group: Group, tokens: int, dtype: torch.dtype) -> Routed:
    """``Routed`` to be written, on ``like``'s device."""
    size, rank, experts = (len(group), tokens), group.rank, group.experts
    return Routed(
        like.new_empty(*size, rank, dtype=torch.float32),
        like.new_empty(*size, experts, dtype=torch.float32),
        like.new_empty(*size, experts * rank, dtype=dtype),
    )


def sizes(group: Group) -> dict[str, Any]:
    """What every routing kernel is compiled for."""
    return {"EXPERTS": group.experts, "RANK": group.rank}


def numbered(name: str, values: Sequence[object], missing: object = None) -> dict[str, object]:
    """``values`` as the arguments name0 .. name3 of a kernel that decodes."""
    dense = [t.contiguous() if isinstance(t, Tensor) else t for t in values]
    dense += [missing] * (MAX_LINEARS - len(dense))
    return {f"{name}{g}": value for g, value in enumerate(dense)}
