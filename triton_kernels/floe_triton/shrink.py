"""The way in: x meets the rows of A and of the routers once, and each token is routed.

With x [T, K] and G linears, each with rows A_g [r, K] and R_g [M, K]::

    hidden_g = dropout(x) A_g^T                               [T, r]
    gate_g   = softmax((x R_g^T + router_bias_g) / temperature)   [T, M]
    z_g[t, i r + j] = scaling gate_g[t, i] hidden_g[t, j]     [T, M r], the only rounding
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments are no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from floe_triton import tuning
from floe_triton.group import Routed
from floe_triton.launch import device_of, launch
from floe_triton.philox import keep_mask
from floe_triton.reference import dropout_scale, dropout_threshold


@triton.jit
def route_tile(
    products, logits, t, g, router_bias, hidden, gate, z, tokens, groups, scaling,
    inverse_temperature,
    M: tl.constexpr, R: tl.constexpr, PAD_M: tl.constexpr, PAD_R: tl.constexpr,
):  # fmt: skip
    """Softmax over the experts and z, of ``products`` [BLOCK_T, SLOTS, PAD_R] (hidden) and
    ``logits`` [BLOCK_T, SLOTS, PAD_M], for the tokens ``t`` (int64) and the linears ``g`` [SLOTS].
    """
    i = tl.arange(0, PAD_M)
    j = tl.arange(0, PAD_R)
    real = (t < tokens)[:, None] & (g < groups)[None, :]
    if router_bias is not None:
        inside = (g < groups)[:, None] & (i < M)[None, :]
        bias = tl.load(router_bias + g[:, None] * M + i[None, :], mask=inside, other=0.0)
        logits += bias.to(tl.float32)[None, :, :]
    logits = tl.where((i < M)[None, None, :], logits * inverse_temperature, float("-inf"))
    odds = tl.exp(logits - tl.max(logits, 2)[:, :, None])
    weights = odds / tl.sum(odds, 2)[:, :, None]
    token = g.to(tl.int64)[None, :] * tokens + t[:, None]  # row of [G T, ...]
    hiddens = hidden + token[:, :, None] * R + j[None, None, :]
    tl.store(hiddens, products, mask=real[:, :, None] & (j < R)[None, None, :])
    gates = gate + token[:, :, None] * M + i[None, None, :]
    tl.store(gates, weights, mask=real[:, :, None] & (i < M)[None, None, :])
    zs = z + token[:, :, None] * (M * R) + j[None, None, :]
    for expert in tl.static_range(M):
        chosen = scaling * tl.sum(tl.where((i == expert)[None, None, :], weights, 0.0), 2)
        routed = (chosen[:, :, None] * products).to(z.dtype.element_ty)
        tl.store(zs + expert * R, routed, mask=real[:, :, None] & (j < R)[None, None, :])


@triton.jit(do_not_specialize=["tokens", "threshold"])
def shrink_kernel(
    x, rows, router_bias, seed, products, hidden, gate, z, tokens, columns, stride, span,
    scaling, inverse_temperature, threshold, keep_scale,
    G: tl.constexpr, M: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, PAD_M: tl.constexpr,
    PAD_R: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Both products of a tile of tokens over ``span`` columns of x, and where that is all of them
    the routing at once. Otherwise ``products`` [S, T, G (r + M)] gets the sums of each span.

    A linear has a slot of padded width in either accumulator, so that G = 3, r = 5, M = 3 are
    [BLOCK_T, 4 * 8] and [BLOCK_T, 4 * 4]. Padded rows are not read.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    a = tl.arange(0, SLOTS * PAD_R)
    b = tl.arange(0, SLOTS * PAD_M)
    a_real = (a // PAD_R < G) & (a % PAD_R < R)
    b_real = (b // PAD_M < G) & (b % PAD_M < M)
    a_row = (a // PAD_R) * R + a % PAD_R
    b_row = G * R + (b // PAD_M) * M + b % PAD_M
    hiddens = tl.zeros((BLOCK_T, SLOTS * PAD_R), tl.float32)
    logits = tl.zeros((BLOCK_T, SLOTS * PAD_M), tl.float32)
    if seed is not None:
        key = tl.load(seed)
    for first in range(split * span, min((split + 1) * span, columns), BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = k < columns
        tile = tl.load(
            x + t[:, None] * stride + k[None, :],
            mask=(t < tokens)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        a_tile = tl.load(
            rows + a_row[None, :] * columns + k[:, None],
            mask=a_real[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        b_tile = tl.load(
            rows + b_row[None, :] * columns + k[:, None],
            mask=b_real[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        logits = tl.dot(tile, b_tile.to(tile.dtype), logits, input_precision=PRECISION)
        if seed is not None:
            keep = keep_mask(key, t, first, threshold, BLOCK_T, BLOCK_K)
            tile = tl.where(keep, tile, 0.0)
        hiddens = tl.dot(tile, a_tile.to(tile.dtype), hiddens, input_precision=PRECISION)
    if seed is not None:
        hiddens *= keep_scale
    if products is not None:
        out = products + (split * tokens.to(tl.int64) + t[:, None]) * (G * (R + M))
        tl.store(out + a_row[None, :], hiddens, mask=(t < tokens)[:, None] & a_real[None, :])
        tl.store(out + b_row[None, :], logits, mask=(t < tokens)[:, None] & b_real[None, :])
    else:
        route_tile(
            tl.reshape(hiddens, (BLOCK_T, SLOTS, PAD_R)),
            tl.reshape(logits, (BLOCK_T, SLOTS, PAD_M)),
            t, tl.arange(0, SLOTS), router_bias, hidden, gate, z, tokens, G, scaling,
            inverse_temperature, M, R, PAD_M, PAD_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "splits", "groups"])
def route_kernel(
    products, router_bias, hidden, gate, z, tokens, splits, groups, scaling, inverse_temperature,
    M: tl.constexpr, R: tl.constexpr, PAD_M: tl.constexpr, PAD_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sum ``products`` [S, T, G (r + M)] over S, in order, and route: one linear a program."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    g = tl.program_id(1) + tl.arange(0, 1)
    i = tl.arange(0, PAD_M)
    j = tl.arange(0, PAD_R)
    width = groups * (R + M)
    hiddens = tl.zeros((BLOCK_T, 1, PAD_R), tl.float32)
    logits = tl.zeros((BLOCK_T, 1, PAD_M), tl.float32)
    for split in range(splits):
        token = (split * tokens.to(tl.int64) + t[:, None, None]) * width
        a = products + token + g[None, :, None] * R + j[None, None, :]
        b = products + token + groups * R + g[None, :, None] * M + i[None, None, :]
        real = (t < tokens)[:, None, None]
        hiddens += tl.load(a, mask=real & (j < R)[None, None, :], other=0.0)
        logits += tl.load(b, mask=real & (i < M)[None, None, :], other=0.0)
    route_tile(
        hiddens, logits, t, g, router_bias, hidden, gate, z, tokens, groups, scaling,
        inverse_temperature, M, R, PAD_M, PAD_R,
    )  # fmt: skip


def shrink_route(
    x: Tensor,
    rows: Tensor,
    router_bias: Tensor | None,
    *,
    groups: int,
    rank: int,
    experts: int,
    scaling: float,
    temperature: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Routed:
    """Hidden, gate and z of every linear of a group from one read of x.

    Args:
        x: [T, K], bfloat16, float16 or float32.
        rows: [G (r + M), K], all A's rows, then all routers' (``Group.rows``), any of the dtypes.
        router_bias: [G, M] or None.
        groups: G.
        rank: r.
        experts: M.
        scaling: Factor of z.
        temperature: The routers'.
        dropout_p: Rate of x's elements dropped before A, in [0, 1).
        seed: 0-dim int64 tensor, needed where ``dropout_p`` > 0.

    Returns:
        ``Routed``, hidden and gate in float32, z in x's dtype.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, columns = x.shape
    device = device_of(x)
    pads = tuning.route_pads(rank, experts, groups)
    dropping = dropout_p > 0.0
    blocks = tuning.shrink_blocks(device, tokens, pads, x.element_size(), rows.element_size())
    span = tuning.shrink_span(device, tokens, columns, blocks)
    splits = triton.cdiv(columns, span)
    products = routed = None
    if splits > 1 or tuning.routes_apart(pads):
        products = x.new_empty(splits, tokens, len(rows), dtype=torch.float32)
    else:
        routed = _empty(x, groups, tokens, rank, experts, x.dtype)
    arguments = {
        "x": x,
        "rows": rows.contiguous(),
        "router_bias": router_bias if routed else None,
        "seed": seed if dropping else None,
        "products": products,
        **_outputs(routed),
        "tokens": tokens,
        "columns": columns,
        "stride": x.stride(0),
        "span": span,
        "scaling": scaling,
        "inverse_temperature": 1.0 / temperature,
        "threshold": dropout_threshold(dropout_p),
        "keep_scale": dropout_scale(dropout_p),
    }
    constants = {"G": groups, "M": experts, "R": rank, "PRECISION": tuning.precision(), **pads}
    grid = (triton.cdiv(tokens, blocks.constants["BLOCK_T"]), splits)
    launch(shrink_kernel, grid, arguments, constants, blocks, 2 * tokens * columns * len(rows))
    if routed is not None:
        return routed
    assert products is not None
    return route(
        products, router_bias, groups=groups, rank=rank, experts=experts, scaling=scaling,
        temperature=temperature, dtype=x.dtype,
    )  # fmt: skip


def route(
    products: Tensor,
    router_bias: Tensor | None,
    *,
    groups: int,
    rank: int,
    experts: int,
    scaling: float,
    temperature: float,
    dtype: torch.dtype,
) -> Routed:
    """Hidden, gate and z from what x's products with the rows are.

    Args:
        products: [S, T, G (r + M)] float32, summed over S in order. Columns as the rows of
            ``Group.rows``.
        router_bias: [G, M] or None.
        groups: G.
        rank: r, any.
        experts: M, any.
        scaling: Factor of z.
        temperature: The routers'.
        dtype: z's.

    Returns:
        ``Routed``.
    """
    splits, tokens, _ = products.shape
    routed = _empty(products, groups, tokens, rank, experts, dtype)
    pads = tuning.route_pads(rank, experts, 1)
    arguments = {
        "products": products.contiguous(),
        "router_bias": router_bias,
        **_outputs(routed),
        "tokens": tokens,
        "splits": splits,
        "groups": groups,
        "scaling": scaling,
        "inverse_temperature": 1.0 / temperature,
    }
    constants = {"M": experts, "R": rank, "PAD_M": pads["PAD_M"], "PAD_R": pads["PAD_R"]}
    blocks = tuning.route_blocks(device_of(products), tokens, pads)
    grid = (triton.cdiv(tokens, blocks.constants["BLOCK_T"]), groups)
    launch(route_kernel, grid, arguments, constants, blocks)
    return routed


def _empty(
    like: Tensor, groups: int, tokens: int, rank: int, experts: int, dtype: torch.dtype
) -> Routed:
    return Routed(
        like.new_empty(groups, tokens, rank, dtype=torch.float32),
        like.new_empty(groups, tokens, experts, dtype=torch.float32),
        like.new_empty(groups, tokens, experts * rank, dtype=dtype),
    )


def _outputs(routed: Routed | None) -> dict[str, Tensor | None]:
    if routed is None:
        return {"hidden": None, "gate": None, "z": None}
    return {"hidden": routed.hidden, "gate": routed.gate, "z": routed.z}
