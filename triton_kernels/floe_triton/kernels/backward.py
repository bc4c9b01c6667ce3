"""The adapters' backward: one read of grad_y, one read of x, and the same bits every time.

With grads [T, P], the gradients of x's products with the rows [P, K] (A's, then the routers'), and
keep, the dropout's mask divided by the rate of keeping::

    grad_x    = keep (grads_A A) + grads_R R  (+ grad_y W, in the fused form)     [T, K]
    grad_rows = [grads_A^T (keep x); grads_R^T x]                                 [P, K]
    grad_expand = grad_y^T z,    grad_z = grad_y Bcat, and from it a linear's columns of grads

Sums over tokens are cut into stripes, whose float32 parts are added in a fixed order: there are no
atomics, and how many stripes there are depends on the shapes and the GPU's size alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments are no Python types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from floe_triton import reference, tuning
from floe_triton.group import Group, Routed
from floe_triton.kernels.dropout import keep_mask
from floe_triton.kernels.expand import (
    add_product,
    dense_rows,
    load_tile,
    product_grid,
    store_tile,
    tile_of,
)
from floe_triton.launch import device_of, launch


@triton.jit(do_not_specialize=["threshold"])
def grad_x_kernel(
    grads, x, rows, grad_x, parts, seed, tokens, columns, stripe, x_stride, threshold, scale,
    DROPPED: tl.constexpr, PLAIN: tl.constexpr, WRITE_X: tl.constexpr, WRITE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_DROPPED: tl.constexpr, BLOCK_PLAIN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, SEALED: tl.constexpr,
):  # fmt: skip
    """One tile of columns of x, over one stripe of tokens.

    The first DROPPED rows (A's) met x under dropout, the PLAIN others x itself::

        grad_x = keep * scale * (dropped_grads dropped_rows) + plain_grads plain_rows
        parts[stripe] = [scale * dropped_grads^T (keep * x); plain_grads^T x]

    Without dropout DROPPED is 0. SEALED is `keep_mask`'s.
    """
    ROWS: tl.constexpr = DROPPED + PLAIN
    first_column = tl.program_id(0) * BLOCK_K
    column = first_column + tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * stripe
    end = min(begin + stripe, tokens)
    plain = DROPPED + tl.arange(0, BLOCK_PLAIN)
    plain_sum = tl.zeros((BLOCK_PLAIN, BLOCK_K), tl.float32)
    if WRITE_X:  # [BLOCK_PLAIN, BLOCK_K]
        plain_rows = load_tile(rows, plain, ROWS, columns, column, columns).to(x.dtype.element_ty)
    if DROPPED > 0:
        dropped = tl.arange(0, BLOCK_DROPPED)
        dropped_sum = tl.zeros((BLOCK_DROPPED, BLOCK_K), tl.float32)
        key = tl.load(seed)  # []
        if WRITE_X:  # [BLOCK_DROPPED, BLOCK_K]
            dropped_rows = load_tile(rows, dropped, DROPPED, columns, column, columns)
            dropped_rows = dropped_rows.to(x.dtype.element_ty)
    for start in range(begin, end, BLOCK_T):
        token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        plain_grads = load_tile(grads, token, end, ROWS, plain, ROWS)  # [BLOCK_T, BLOCK_PLAIN]
        if WRITE_ROWS:
            tile = load_tile(x, token, end, x_stride, column, columns)  # [BLOCK_T, BLOCK_K]
            # [BLOCK_PLAIN, BLOCK_T] x [BLOCK_T, BLOCK_K]
            plain_sum = tl.dot(tl.trans(plain_grads), tile, plain_sum, input_precision=PRECISION)
        if DROPPED > 0:
            # [BLOCK_T, BLOCK_DROPPED]
            dropped_grads = load_tile(grads, token, end, ROWS, dropped, DROPPED)
            keep = keep_mask(key, token, first_column, threshold, BLOCK_T, BLOCK_K, SEALED)
            if WRITE_ROWS:
                tile = tl.where(keep, tile, 0.0).to(x.dtype.element_ty)
                # [BLOCK_DROPPED, BLOCK_T] x [BLOCK_T, BLOCK_K]
                dropped_sum = tl.dot(
                    tl.trans(dropped_grads), tile, dropped_sum, input_precision=PRECISION
                )
        if WRITE_X:
            if DROPPED > 0:
                # [BLOCK_T, BLOCK_DROPPED] x [BLOCK_DROPPED, BLOCK_K]
                total = tl.dot(dropped_grads, dropped_rows, input_precision=PRECISION)
                total = tl.where(keep, total * scale, 0.0)
                # [BLOCK_T, BLOCK_PLAIN] x [BLOCK_PLAIN, BLOCK_K]
                total = tl.dot(plain_grads, plain_rows, total, input_precision=PRECISION)
            else:
                # [BLOCK_T, BLOCK_PLAIN] x [BLOCK_PLAIN, BLOCK_K]
                total = tl.dot(plain_grads, plain_rows, input_precision=PRECISION)
            store_tile(grad_x, token, end, columns, column, columns, total)
    if WRITE_ROWS:
        part = parts + tl.program_id(1).to(tl.int64) * ROWS * columns
        store_tile(part, plain, ROWS, columns, column, columns, plain_sum)
        if DROPPED > 0:
            store_tile(part, dropped, DROPPED, columns, column, columns, dropped_sum * scale)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def fused_grad_x_kernel(
    grad_y, weight, grads, rows, seed, grad_x, tokens, columns, features, grad_stride,
    weight_stride, grads_stride, threshold, keep_scale,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A tile of ``keep (grads[:, :HIDDEN] rows[:HIDDEN]) + grads[:, HIDDEN:] rows[HIDDEN:] +
    grad_y W``. Here BLOCK_N cuts x's columns and BLOCK_K what is summed over, y's features.
    Without dropout HIDDEN is all ROWS.
    """
    token, first = tile_of(tl.program_id(0), tokens, columns, BLOCK_T, BLOCK_N, TILES)
    column = first + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    near = tl.minimum(token, tokens - 1)[:, None]
    grads += near * grads_stride
    grad_y += near * grad_stride
    total = add_product(total, grads, rows, columns, column, columns, 0, HIDDEN, PRECISION, BLOCK_C)
    if seed is not None:
        key = tl.load(seed)  # []
        keep = keep_mask(key, token, first, threshold, BLOCK_T, BLOCK_N)
        total = tl.where(keep, total * keep_scale, 0.0)
    total = add_product(
        total, grads, rows, columns, column, columns, HIDDEN, ROWS, PRECISION, BLOCK_C
    )
    total = add_product(
        total, grad_y, weight, weight_stride, column, columns, 0, features, PRECISION, BLOCK_K
    )
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    out = grad_x + token[:, None] * columns + column[None, :]
    tl.store(out, total.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def grad_y_kernel(
    grad_y, z, expand, z_parts, expand_parts, tokens, features, stripe, stride,
    WIDTH: tl.constexpr, WRITE_Z: tl.constexpr, WRITE_EXPAND: tl.constexpr,
    PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of features of grad_y, over one stripe of tokens; ``expand`` is [N, WIDTH = M r].

    ::

        z_parts[tile of features] = grad_y expand       (over these features)
        expand_parts[stripe] = grad_y^T z               (over these tokens)

    TRANSPOSED sums the second as [WIDTH, BLOCK_N]: for mma.sync the tile then has one layout in
    both products, so that it is copied asynchronously; wgmma wants the long side first instead.
    """
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * stripe
    end = min(begin + stripe, tokens)
    width = tl.arange(0, BLOCK_WIDTH)
    if TRANSPOSED:
        expand_sum = tl.zeros((BLOCK_WIDTH, BLOCK_N), tl.float32)
    else:
        expand_sum = tl.zeros((BLOCK_N, BLOCK_WIDTH), tl.float32)
    if WRITE_Z:
        # [BLOCK_N, BLOCK_WIDTH]
        expand_tile = load_tile(expand, feature, features, WIDTH, width, WIDTH)
        expand_tile = expand_tile.to(grad_y.dtype.element_ty)
        z_part = z_parts + tl.program_id(0).to(tl.int64) * tokens * WIDTH
    for start in range(begin, end, BLOCK_T):
        token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        tile = load_tile(grad_y, token, end, stride, feature, features)  # [BLOCK_T, BLOCK_N]
        if WRITE_Z:  # first: mma.sync then shares the warps out along the columns in both products
            # [BLOCK_T, BLOCK_N] x [BLOCK_N, BLOCK_WIDTH]
            products = tl.dot(tile, expand_tile, input_precision=PRECISION)
            store_tile(z_part, token, end, WIDTH, width, WIDTH, products)
        if WRITE_EXPAND:
            z_tile = load_tile(z, token, end, WIDTH, width, WIDTH)  # [BLOCK_T, BLOCK_WIDTH]
            if TRANSPOSED:
                # [BLOCK_WIDTH, BLOCK_T] x [BLOCK_T, BLOCK_N]
                expand_sum = tl.dot(tl.trans(z_tile), tile, expand_sum, input_precision=PRECISION)
            else:
                # [BLOCK_N, BLOCK_T] x [BLOCK_T, BLOCK_WIDTH]
                expand_sum = tl.dot(tl.trans(tile), z_tile, expand_sum, input_precision=PRECISION)
    if WRITE_EXPAND:
        if TRANSPOSED:
            expand_sum = tl.trans(expand_sum)
        expand_part = expand_parts + tl.program_id(1).to(tl.int64) * features * WIDTH
        store_tile(expand_part, feature, features, WIDTH, width, WIDTH, expand_sum)


@triton.jit
def route_backward_kernel(
    parts, hidden, gate, grads, grad_gates, splits, tokens, rows, hidden_column, router_column,
    scaling, inverse_temperature,
    EXPERTS: tl.constexpr, RANK: tl.constexpr, HIDDEN: tl.constexpr,
    PAD_EXPERTS: tl.constexpr, PAD_RANK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """From the parts [S, T, M r] of grad_z to the gradients of hidden and of the router's products.

    ``dz`` is scaling times the sum of the parts, taken in order. Then::

        dhidden = sum_i gate_i dz_i,    dgate_i = <dz_i, hidden>
        dlogit = gate * (dgate - <gate, dgate>) / temperature

    With an A for every expert (HIDDEN = M r): dhidden_i = gate_i dz_i, dgate_i = <dz_i, hidden_i>.
    The gradient of given gates is dgate itself: grad_gates [T, M].
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_T  # within a tile 32 bits address everything
    token, left = tl.arange(0, BLOCK_T), tokens - first
    expert = tl.arange(0, PAD_EXPERTS)
    rank = tl.arange(0, PAD_RANK)
    real = (expert < EXPERTS)[:, None] & (rank < RANK)[None, :]
    inside = (token < left)[:, None, None] & real[None, :, :]
    width = expert[:, None] * RANK + rank[None, :]
    offsets = token[:, None, None] * (EXPERTS * RANK) + width[None, :, :]
    part = parts + first * (EXPERTS * RANK)
    step = tl.full((), tokens, tl.int64) * (EXPERTS * RANK)
    dz = tl.zeros((BLOCK_T, PAD_EXPERTS, PAD_RANK), tl.float32)
    for _ in range(splits):
        dz += tl.load(part + offsets, mask=inside, other=0.0)  # [BLOCK_T, PAD_EXPERTS, PAD_RANK]
        part += step
    dz = dz * scaling
    # [BLOCK_T, PAD_EXPERTS]
    weights = load_tile(gate + first * EXPERTS, token, left, EXPERTS, expert, EXPERTS)
    grads += first * rows
    if HIDDEN == RANK:  # [BLOCK_T, PAD_RANK]
        hiddens = load_tile(hidden + first * RANK, token, left, RANK, rank, RANK)[:, None, :]
        grad_hidden = tl.sum(dz * weights[:, :, None], axis=1)
        store_tile(grads + hidden_column, token, left, rows, rank, RANK, grad_hidden)
    else:  # [BLOCK_T, PAD_EXPERTS, PAD_RANK]
        hiddens = tl.load(hidden + first * HIDDEN + offsets, mask=inside, other=0.0)
        grad_hidden = (dz * weights[:, :, None]).to(grads.dtype.element_ty)
        at = grads + hidden_column + token[:, None, None] * rows + width[None, :, :]
        tl.store(at, grad_hidden, mask=inside)
    grad_gate = tl.sum(dz * hiddens, axis=2)
    if grad_gates is not None:
        at = grad_gates + first * EXPERTS
        store_tile(at, token, left, EXPERTS, expert, EXPERTS, grad_gate)
    else:
        mean = tl.sum(weights * grad_gate, axis=1)
        grad_logit = weights * (grad_gate - mean[:, None]) * inverse_temperature
        store_tile(grads + router_column, token, left, rows, expert, EXPERTS, grad_logit)


@triton.jit
def sum_parts_kernel(parts, out, splits, length, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr):
    """``out[l] = sum_s parts[s, l]``, always in the same order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    totals = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        totals += load_tile(parts, split, splits, length, place, length)  # [BLOCK_S, BLOCK]
    tl.store(out + place, tl.sum(totals, axis=0).to(out.dtype.element_ty), mask=place < length)


def backward_x(
    grads: Tensor, x: Tensor, rows: Tensor, group: Group, needs_x: bool, needs_rows: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What flows through the rows that x was multiplied with, in one read of x.

    x [T, K] in bfloat16, float16 or float32; grads [T, P] contiguous in its dtype; rows [P, K] are
    ``group.shrink_rows()``, P at most ``tuning.MAX_ROWS``. Gives grad_x [T, K] and grad_rows [P, K]
    as above, in x's and in rows' dtype; None for what is not needed.
    """
    (tokens, columns), count = x.shape, rows.shape[0]
    grad_x = x.new_empty((tokens, columns)) if needs_x else None
    grad_rows = rows.new_empty(rows.shape) if needs_rows else None
    if tokens == 0 or not (needs_x or needs_rows):
        return grad_x, None if grad_rows is None else grad_rows.zero_()
    x, device = dense_rows(x), device_of(x)
    dropped = group.hidden_rows if group.dropout_p > 0 else 0
    plain, drops = (max(16, tuning.power_of_two(n)) for n in (count - dropped, dropped))
    pads = {"BLOCK_DROPPED": drops, "BLOCK_PLAIN": plain}
    padded = plain + (drops if dropped else 0)
    blocks = tuning.grad_x_blocks(
        device, padded, dropped > 0, x.element_size(), tuning.tiles_aligned(x), needs_x
    )
    column_tiles = triton.cdiv(columns, blocks.constants["BLOCK_K"])
    stripe = tuning.stripe(device, tokens, column_tiles, blocks, warps=24)
    stripes = triton.cdiv(tokens, stripe)
    parts = _parts(stripes, grad_rows)
    arguments = {
        "grads": grads,
        "x": x,
        "rows": rows.contiguous(),
        "grad_x": grad_x,
        "parts": parts,
        "seed": group.seed if dropped else None,
        "tokens": tokens,
        "columns": columns,
        "stripe": stripe,
        "x_stride": x.stride(0),
        "threshold": reference.dropout_threshold(group.dropout_p),
        "scale": reference.dropout_scale(group.dropout_p),
    }
    constants = {
        "DROPPED": dropped,
        "PLAIN": count - dropped,
        "WRITE_X": needs_x,
        "WRITE_ROWS": needs_rows,
        "PRECISION": tuning.precision(),
        **pads,
    }
    flops = 2 * tokens * columns * count * (needs_x + needs_rows)
    launch(grad_x_kernel, (column_tiles, stripes), arguments, constants, blocks, flops)
    _sum_parts(parts, grad_rows)
    return grad_x, grad_rows


def fused_grad_x(
    grad_y: Tensor, weight: Tensor, grads: Tensor, rows: Tensor, group: Group
) -> Tensor:
    """The gradient of x [T, K] through one frozen linear and all the group's adapters.

    grad_y [T, N] in bfloat16, float16 or float32; weight [N, K] in its dtype, read as it lies;
    grads [T, P] in its dtype and rows [P, K] as above.
    """
    grad_y, weight, grads = dense_rows(grad_y), dense_rows(weight), dense_rows(grads)
    (tokens, features), (_, columns), count = grad_y.shape, weight.shape, grads.shape[1]
    grad_x = grad_y.new_empty(tokens, columns)
    dropping = group.dropout_p > 0.0
    aligned = tuning.rows_aligned(grad_y, weight)
    blocks = tuning.fused_blocks(
        device_of(grad_y), tokens, grad_y.element_size(), aligned, dropping
    )
    arguments = {
        "grad_y": grad_y,
        "weight": weight,
        "grads": grads,
        "rows": rows.contiguous(),
        "seed": group.seed if dropping else None,
        "grad_x": grad_x,
        "tokens": tokens,
        "columns": columns,
        "features": features,
        "grad_stride": grad_y.stride(0),
        "weight_stride": weight.stride(0),
        "grads_stride": grads.stride(0),
        "threshold": reference.dropout_threshold(group.dropout_p),
        "keep_scale": reference.dropout_scale(group.dropout_p),
    }
    hidden = group.hidden_rows if dropping else count
    constants = {"HIDDEN": hidden, "ROWS": count, "PRECISION": tuning.precision()}
    flops = 2 * tokens * columns * (features + count)
    grid = product_grid(tokens, columns, blocks)
    launch(fused_grad_x_kernel, grid, arguments, constants, blocks, flops)
    return grad_x


def backward_y(
    grad_y: Tensor,
    group: Group,
    g: int,
    routed: Routed,
    grads: Tensor,
    needs_expand: bool,
    needs_grads: bool,
    grad_gates: Tensor | None = None,
) -> Tensor | None:
    """The gradients of linear g's experts and of its routing, in one read of grad_y.

    grad_y [T, N] in bfloat16, float16 or float32; M r at most ``tuning.MAX_WIDTH``. Gives that of
    ``expand_weight`` in its dtype and shape if ``needs_expand``; writes the linear's columns of
    ``grads`` and ``grad_gates`` (see `route_backward`) if ``needs_grads``.
    """
    expand_weight, z = group.expand_weights[g], routed.z[g]
    (tokens, features), width = grad_y.shape, z.shape[1]
    grad_expand = expand_weight.new_empty(expand_weight.shape) if needs_expand else None
    if tokens == 0 or not (needs_expand or needs_grads):
        return None if grad_expand is None else grad_expand.zero_()
    grad_y = dense_rows(grad_y)
    device, aligned = device_of(grad_y), tuning.tiles_aligned(grad_y)
    blocks = tuning.grad_y_blocks(device, width, grad_y.element_size(), aligned)
    feature_tiles = triton.cdiv(features, blocks.constants["BLOCK_N"])
    stripe = tuning.stripe(device, tokens, feature_tiles, blocks, warps=8)
    stripes = triton.cdiv(tokens, stripe)
    parts = _parts(stripes, grad_expand)
    wide = torch.float32
    grad_z = grad_y.new_empty(feature_tiles, tokens, width, dtype=wide) if needs_grads else None
    arguments = {
        "grad_y": grad_y,
        "z": z,
        "expand": expand_weight.contiguous(),
        "z_parts": grad_z,
        "expand_parts": parts,
        "tokens": tokens,
        "features": features,
        "stripe": stripe,
        "stride": grad_y.stride(0),
    }
    constants = {
        "WIDTH": width,
        "WRITE_Z": needs_grads,
        "WRITE_EXPAND": needs_expand,
        "PRECISION": tuning.precision(),
        "BLOCK_WIDTH": max(16, tuning.power_of_two(width)),
    }
    flops = 2 * tokens * features * width * (needs_grads + needs_expand)
    launch(grad_y_kernel, (feature_tiles, stripes), arguments, constants, blocks, flops)
    if grad_z is not None:
        route_backward(grad_z, group, g, routed, grads, grad_gates)
    _sum_parts(parts, grad_expand)
    return grad_expand


def route_backward(
    grad_z: Tensor, group: Group, g: int, routed: Routed, grads: Tensor, grad_gates: Tensor | None
) -> None:
    """Write linear g's columns of ``grads`` [T, G (H + M)]: those of A's products and its router's.

    grad_z [S, T, M r] float32, contiguous: its sum over S is ``grad_y Bcat``, unscaled. The columns
    from ``g H`` and from ``G H + g M`` on are written; where gates are given ``grad_gates[g]`` of
    [G, T, M] float32 instead of the latter.
    """
    (splits, tokens, _), rank, experts = grad_z.shape, group.rank, group.experts
    pads = {"PAD_EXPERTS": tuning.power_of_two(experts), "PAD_RANK": tuning.power_of_two(rank)}
    blocks = tuning.route_backward_blocks(device_of(grads), pads)
    arguments = {
        "parts": grad_z,
        "hidden": routed.hidden[g].contiguous(),
        "gate": routed.gate[g].contiguous(),
        "grads": grads,
        "grad_gates": None if grad_gates is None else grad_gates[g],
        "splits": splits,
        "tokens": tokens,
        "rows": grads.shape[1],
        "hidden_column": g * group.hidden_size,
        "router_column": group.hidden_rows + g * experts,
        "scaling": group.scaling,
        "inverse_temperature": 1.0 / group.temperature,
    }
    constants = {"EXPERTS": experts, "RANK": rank, "HIDDEN": group.hidden_size, **pads}
    grid = (triton.cdiv(tokens, blocks.constants["BLOCK_T"]),)
    launch(route_backward_kernel, grid, arguments, constants, blocks)


def _parts(count: int, total: Tensor | None) -> Tensor | None:
    """Where ``count`` stripes leave their sums: ``total`` itself if there is but one."""
    if total is None or count == 1:
        return total
    return total.new_empty((count, *total.shape), dtype=torch.float32)


def _sum_parts(parts: Tensor | None, total: Tensor | None) -> None:
    """``total = parts.sum(0)``, rounded once, unless the parts are the total."""
    if parts is None or total is None or parts is total:
        return
    blocks = tuning.sum_blocks(device_of(total))
    grid = (triton.cdiv(total.numel(), blocks.constants["BLOCK"]),)
    arguments = {"parts": parts, "out": total, "splits": len(parts), "length": total.numel()}
    launch(sum_parts_kernel, grid, arguments, {}, blocks)
