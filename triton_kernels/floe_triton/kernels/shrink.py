"""The way in: x meets the rows of A and of the routers once, and each token is routed.

With x [T, K] and G linears, each with rows A_g [H, K] and R_g [M, K]::

    hidden_g = dropout(x) A_g^T                               [T, H]
    gate_g   = softmax((x R_g^T + router_bias_g) / temperature)   [T, M]
    z_g[t, i r + j] = scaling gate_g[t, i] hidden_g[t, j]     [T, M r], the only rounding

H is r; where every expert has an A of its own it is M r, and hidden_g[t, i r + j] meets gate i. The
softmax may be over the TOP_K largest logits of a token alone. Gates may be given: ``gate`` holds
them then, LOGITS is 0, and there are no R_g.

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
def gates_of(logits, expert, EXPERTS: tl.constexpr, TOP_K: tl.constexpr):
    """Softmax of ``logits`` [..., PAD_EXPERTS] over the experts, or over the TOP_K largest, equal
    ones by the lower index. NaN counts among those.
    """
    logits = tl.where(expert < EXPERTS, logits, float("-inf"))
    if TOP_K > 0:
        left = logits
        for _ in range(TOP_K):
            largest = tl.expand_dims(tl.max(left, -1), -1)
            first = tl.min(tl.where(left == largest, expert, EXPERTS), -1)
            left = tl.where(expert == tl.expand_dims(first, -1), float("-inf"), left)
        logits = tl.where((left != logits) | (logits != logits), logits, float("-inf"))
    odds = tl.exp(logits - tl.expand_dims(tl.max(logits, -1), -1))
    return odds / tl.expand_dims(tl.sum(odds, -1), -1)


@triton.jit
def route_tile(
    hiddens, logits, token, linear, router_bias, hidden, gate, z, tokens, linears, scaling,
    inverse_temperature, EXPERTS: tl.constexpr, RANK: tl.constexpr, HIDDEN: tl.constexpr,
    LOGITS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """The gates and z, of ``hiddens`` [BLOCK_T, SLOTS, PAD_HIDDEN] and ``logits``
    [BLOCK_T, SLOTS, PAD_EXPERTS], for the tokens ``token`` (int64) and linears ``linear`` [SLOTS].
    """
    expert = tl.arange(0, logits.shape[2])
    column = tl.arange(0, hiddens.shape[2])
    real = ((token < tokens)[:, None] & (linear < linears)[None, :])[:, :, None]
    row = (linear.to(tl.int64)[None, :] * tokens + token[:, None])[:, :, None]  # of [G T, ...]
    gates = gate + row * EXPERTS + expert[None, None, :]
    is_gate = real & (expert < EXPERTS)[None, None, :]
    if LOGITS == 0:
        weights = tl.load(gates, mask=is_gate, other=0.0)  # [BLOCK_T, SLOTS, PAD_EXPERTS]
    else:
        if router_bias is not None:
            inside = (linear < linears)[:, None] & (expert < EXPERTS)[None, :]
            biases = router_bias + linear[:, None] * EXPERTS + expert[None, :]
            bias = tl.load(biases, mask=inside, other=0.0)  # [SLOTS, PAD_EXPERTS]
            logits += bias.to(tl.float32)[None, :, :]
        weights = gates_of(logits * inverse_temperature, expert[None, None, :], EXPERTS, TOP_K)
        tl.store(gates, weights, mask=is_gate)
    is_hidden = real & (column < HIDDEN)[None, None, :]
    tl.store(hidden + row * HIDDEN + column[None, None, :], hiddens, mask=is_hidden)
    zs = z + row * (EXPERTS * RANK) + column[None, None, :]
    factors = hiddens
    for i in tl.static_range(EXPERTS):
        weight = scaling * tl.sum(tl.where((expert == i)[None, None, :], weights, 0.0), 2)
        if HIDDEN == RANK:
            routed = (weight[:, :, None] * hiddens).to(z.dtype.element_ty)
            tl.store(zs + i * RANK, routed, mask=is_hidden)
        else:
            is_expert = (column // RANK == i)[None, None, :]
            factors = tl.where(is_expert, weight[:, :, None], factors)
    if HIDDEN != RANK:
        tl.store(zs, (factors * hiddens).to(z.dtype.element_ty), mask=is_hidden)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def shrink_kernel(
    x, rows, router_bias, seed, products, hidden, gate, z, tokens, columns, stride, span,
    scaling, inverse_temperature, threshold, keep_scale,
    LINEARS: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr, HIDDEN: tl.constexpr,
    LOGITS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, PAD_EXPERTS: tl.constexpr,
    PAD_HIDDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Both products of a tile of tokens over ``span`` columns of x, and where that is all of them
    the routing at once. Otherwise ``products`` [S, T, G (H + M)] gets the sums of each span.

    A linear has a slot of padded width in either accumulator, so that G = 3, r = 5, M = 3 are
    [BLOCK_T, 4 * 8] and [BLOCK_T, 4 * 4]. Padded rows are not read.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    is_token = (token < tokens)[:, None]
    a = tl.arange(0, SLOTS * PAD_HIDDEN)
    b = tl.arange(0, SLOTS * PAD_EXPERTS)
    a_real = ((a // PAD_HIDDEN < LINEARS) & (a % PAD_HIDDEN < HIDDEN))[None, :]
    b_real = ((b // PAD_EXPERTS < LINEARS) & (b % PAD_EXPERTS < EXPERTS))[None, :]
    a_row = ((a // PAD_HIDDEN) * HIDDEN + a % PAD_HIDDEN)[None, :]
    b_row = (LINEARS * HIDDEN + (b // PAD_EXPERTS) * EXPERTS + b % PAD_EXPERTS)[None, :]
    hiddens = tl.zeros((BLOCK_T, SLOTS * PAD_HIDDEN), tl.float32)
    logits = tl.zeros((BLOCK_T, SLOTS * PAD_EXPERTS), tl.float32)
    if seed is not None:
        key = tl.load(seed)  # []
    for first in range(split * span, min((split + 1) * span, columns), BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        inside = column < columns
        at = x + token[:, None] * stride + column[None, :]
        tile = tl.load(at, mask=is_token & inside[None, :], other=0.0)  # [BLOCK_T, BLOCK_K]
        at = rows + a_row * columns + column[:, None]
        a_tile = tl.load(
            at, mask=a_real & inside[:, None], other=0.0
        )  # [BLOCK_K, SLOTS PAD_HIDDEN]
        if LOGITS > 0:
            at = rows + b_row * columns + column[:, None]
            # [BLOCK_K, SLOTS PAD_EXPERTS]
            b_tile = tl.load(at, mask=b_real & inside[:, None], other=0.0)
            # [BLOCK_T, BLOCK_K] x [BLOCK_K, SLOTS PAD_EXPERTS]
            logits = tl.dot(tile, b_tile.to(tile.dtype), logits, input_precision=PRECISION)
        if seed is not None:
            keep = keep_mask(key, token, first, threshold, BLOCK_T, BLOCK_K)
            tile = tl.where(keep, tile, 0.0)
        # [BLOCK_T, BLOCK_K] x [BLOCK_K, SLOTS PAD_HIDDEN]
        hiddens = tl.dot(tile, a_tile.to(tile.dtype), hiddens, input_precision=PRECISION)
    if seed is not None:
        hiddens *= keep_scale
    if products is not None:
        row = split * tokens.to(tl.int64) + token[:, None]
        out = products + row * (LINEARS * (HIDDEN + LOGITS))
        tl.store(out + a_row, hiddens, mask=is_token & a_real)
        if LOGITS > 0:
            tl.store(out + b_row, logits, mask=is_token & b_real)
    else:
        route_tile(
            tl.reshape(hiddens, (BLOCK_T, SLOTS, PAD_HIDDEN)),
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
            HIDDEN,
            LOGITS,
            TOP_K,
        )


@triton.jit(do_not_specialize=["tokens", "splits", "linears"])
def route_kernel(
    products, router_bias, hidden, gate, z, tokens, splits, linears, scaling, inverse_temperature,
    EXPERTS: tl.constexpr, RANK: tl.constexpr, HIDDEN: tl.constexpr, LOGITS: tl.constexpr,
    TOP_K: tl.constexpr, PAD_EXPERTS: tl.constexpr, PAD_HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sum ``products`` [S, T, G (H + M)] over S, in order, and route: one linear a program."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    linear = tl.program_id(1) + tl.arange(0, 1)
    expert = tl.arange(0, PAD_EXPERTS)[None, None, :]
    column = tl.arange(0, PAD_HIDDEN)[None, None, :]
    width = linears * (HIDDEN + LOGITS)
    hiddens = tl.zeros((BLOCK_T, 1, PAD_HIDDEN), tl.float32)
    logits = tl.zeros((BLOCK_T, 1, PAD_EXPERTS), tl.float32)
    for split in range(splits):
        part = products + (split * tokens.to(tl.int64) + token[:, None, None]) * width
        a = part + linear[None, :, None] * HIDDEN + column
        b = part + linears * HIDDEN + linear[None, :, None] * EXPERTS + expert
        real = (token < tokens)[:, None, None]
        hiddens += tl.load(a, mask=real & (column < HIDDEN), other=0.0)  # [BLOCK_T, 1, PAD_HIDDEN]
        if LOGITS > 0:  # [BLOCK_T, 1, PAD_EXPERTS]
            logits += tl.load(b, mask=real & (expert < EXPERTS), other=0.0)
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
        HIDDEN,
        LOGITS,
        TOP_K,
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
    LINEARS: tl.constexpr, HIDDEN: tl.constexpr, LOGITS: tl.constexpr, PAD: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One linear's ``x shrink^T`` over ``span`` columns, to its columns of ``products``
    [S, T, G (H + M)]: all hidden, then all logits.
    """
    split = tl.program_id(0)
    linear = tl.program_id(1)
    shrink = pick(linear, shrink0, shrink1, shrink2, shrink3)
    token = tl.arange(0, BLOCK_T)[:, None]
    row = tl.arange(0, PAD)[None, :]
    is_row = row < HIDDEN + LOGITS
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
    hidden = linear * HIDDEN + row
    logit = LINEARS * HIDDEN + linear * LOGITS + row - HIDDEN
    out = products + (split * tokens + token) * (LINEARS * (HIDDEN + LOGITS))
    out += tl.where(row < HIDDEN, hidden, logit)
    tl.store(out, sums, mask=(token < tokens) & is_row)


def shrink(x: Tensor, rows: Tensor, group: Group) -> Routed | Tensor:
    """One read of x [T, K] for every linear; ``rows`` [G (H + M), K] are ``group.shrink_rows()``.

    x in bfloat16, float16 or float32, rows in any of these. Gives ``Routed`` (hidden and gate in
    float32, z in x's dtype) or, where programs share the columns or are out of registers, what
    `route` takes: products [S, T, G (H + M)] in float32.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, columns = x.shape
    device = device_of(x)
    pads = tuning.route_pads(group.hidden_size, group.experts, len(group))
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

    ``products``: [S, T, G (H + M)] float32, summed over S in order; columns as the rows of
    ``Group.shrink_rows``, of any r and M.
    """
    splits, tokens, _ = products.shape
    routed = empty_routed(products, group, tokens, dtype)
    pads = tuning.route_pads(group.hidden_size, group.experts, 1)
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
    constants = {**sizes(group), **{name: pads[name] for name in ("PAD_EXPERTS", "PAD_HIDDEN")}}
    blocks = tuning.route_blocks(device_of(products), tokens, pads)
    grid = (triton.cdiv(tokens, blocks.constants["BLOCK_T"]), len(group))
    launch(route_kernel, grid, arguments, constants, blocks)
    return routed


def decode_shrink(x: Tensor, group: Group) -> Tensor:
    """`shrink`'s products [S, T, G (H + M)] for few tokens.

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
    rows = group.hidden_size + group.router_rows
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
        "HIDDEN": group.hidden_size,
        "LOGITS": group.router_rows,
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
    given = group.given_gates(torch.float32)
    return Routed(
        like.new_empty(*size, group.hidden_size, dtype=torch.float32),
        like.new_empty(*size, experts, dtype=torch.float32) if given is None else given,
        like.new_empty(*size, experts * rank, dtype=dtype),
    )


def sizes(group: Group) -> dict[str, Any]:
    """What every routing kernel is compiled for."""
    return {
        "EXPERTS": group.experts,
        "RANK": group.rank,
        "HIDDEN": group.hidden_size,
        "LOGITS": group.router_rows,
        "TOP_K": group.top_k % group.experts,  # all of them is no choice
    }


def numbered(name: str, values: Sequence[object], missing: object = None) -> dict[str, object]:
    """``values`` as the arguments name0 .. name3 of a kernel that decodes."""
    dense = [t.contiguous() if isinstance(t, Tensor) else t for t in values]
    dense += [missing] * (MAX_LINEARS - len(dense))
    return {f"{name}{g}": value for g, value in enumerate(dense)}
