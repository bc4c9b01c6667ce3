"""The way out: every expert's columns as one product of rank M r, and the frozen product with it.

With z [T, M r] and Bcat [N, M r], the free view of expand_weight [N, M, r]::

    y = base + z Bcat^T          or        y = z Bcat^T + bias
    y = z Bcat^T + x W^T + bias                            the fused form, one accumulator

Every function here is one launch, every result summed in float32 and rounded once. The fused form
takes the small product as the first steps of the big one: no pass over y of its own. With few
tokens `decode_expand` serves all linears of a group: every program sums the parts of
`decode_shrink` again, in the same order, routes, and writes its tile of one linear's y.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments are no Python types)
# ruff: noqa: SIM102  (of two nested ifs in a kernel the outer one is decided by the compiler)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from floe_triton import tuning
from floe_triton.group import Group, Routed
from floe_triton.kernels.shrink import empty_routed, gates_of, numbered, pick, sizes
from floe_triton.launch import Blocks, device_of, launch


@triton.jit
def load_tile(base, row, rows, row_stride, column, columns):
    """``base[row, column]``, 0 beyond the counts; ``row`` is int64 where offsets may be."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    # [row's length, column's length], as each call says
    return tl.load(base + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(base, row, rows, row_stride, column, columns, tile):
    """``base[row, column] = tile`` within the counts."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    pointers = base + row[:, None] * row_stride + column[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def add_transposed(total, left, right, first, last, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr):
    """``total + left[:, first:last] right[:, first:last]^T``, of pointers to the starts of rows:
    ``left`` [BLOCK_T, 1] and ``right`` [1, BLOCK_N].
    """
    for start in range(first, last, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < last
        # [BLOCK_T, BLOCK_C]
        left_tile = tl.load(left + c[None, :], mask=inside[None, :], other=0.0)
        # [BLOCK_C, BLOCK_N]
        right_tile = tl.load(right + c[:, None], mask=inside[:, None], other=0.0)
        right_tile = right_tile.to(left_tile.dtype)
        # [BLOCK_T, BLOCK_C] x [BLOCK_C, BLOCK_N]
        total = tl.dot(left_tile, right_tile, total, input_precision=PRECISION)
    return total


@triton.jit
def add_product(
    total, left, right, right_stride, column, columns, first, last,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``total + left[:, first:last] right[first:last, column]``, 0 beyond the columns; ``left`` are
    pointers [BLOCK_T, 1] to the starts of rows.
    """
    for start in range(first, last, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < last
        # [BLOCK_T, BLOCK_C]
        left_tile = tl.load(left + c[None, :], mask=inside[None, :], other=0.0)
        at = right + c[:, None].to(tl.int64) * right_stride + column[None, :]
        mask = inside[:, None] & (column < columns)[None, :]
        right_tile = tl.load(at, mask=mask, other=0.0)  # [BLOCK_C, BLOCK_N]
        right_tile = right_tile.to(left_tile.dtype)
        # [BLOCK_T, BLOCK_C] x [BLOCK_C, BLOCK_N]
        total = tl.dot(left_tile, right_tile, total, input_precision=PRECISION)
    return total


@triton.jit
def tile_of(
    program, tokens, features,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Tokens (int64) and first feature of a program's tile: TILES tiles of tokens, then the next
    tile of features, so that programs in flight share what they read.
    """
    across = tl.cdiv(features, BLOCK_N)
    band = program // (TILES * across)
    height = min(tl.cdiv(tokens, BLOCK_T) - band * TILES, TILES)
    within = program % (TILES * across)
    tile = band * TILES + within % height
    return tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T), within // height * BLOCK_N


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    z, weight, bias, base, y, tokens, features, base_stride,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A tile of ``z Bcat^T + bias + base``."""
    token, first = tile_of(tl.program_id(0), tokens, features, BLOCK_T, BLOCK_N, TILES)
    feature = first + tl.arange(0, BLOCK_N)
    inside = (token < tokens)[:, None] & (feature < features)[None, :]
    # rows past the last token or feature repeat it: their sums are not stored, and need no mask
    z += tl.minimum(token, tokens - 1)[:, None] * WIDTH
    weight += tl.minimum(feature, features - 1)[None, :].to(tl.int64) * WIDTH
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    total = add_transposed(total, z, weight, 0, WIDTH, PRECISION, BLOCK_C)
    if bias is not None:
        added = tl.load(bias + feature, mask=feature < features, other=0.0)  # [BLOCK_N]
        total += added.to(tl.float32)[None, :]
    if base is not None:
        at = base + token[:, None] * base_stride + feature[None, :]
        added = tl.load(at, mask=inside, other=0.0)  # [BLOCK_T, BLOCK_N]
        total += added.to(tl.float32)
    out = y + token[:, None] * features + feature[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def fused_linear_kernel(
    x, weight, bias, z, expand, y, tokens, features, columns, x_stride, weight_stride,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A tile of ``z Bcat^T + x W^T + bias``."""
    token, first = tile_of(tl.program_id(0), tokens, features, BLOCK_T, BLOCK_N, TILES)
    feature = first + tl.arange(0, BLOCK_N)
    # rows past the last token or feature repeat it, as in `expand_kernel`
    near, close = tl.minimum(token, tokens - 1), tl.minimum(feature, features - 1).to(tl.int64)
    z, x = z + near[:, None] * WIDTH, x + near[:, None] * x_stride
    expand, weight = expand + close[None, :] * WIDTH, weight + close[None, :] * weight_stride
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    total = add_transposed(total, z, expand, 0, WIDTH, PRECISION, BLOCK_C)
    total = add_transposed(total, x, weight, 0, columns, PRECISION, BLOCK_K)
    if bias is not None:
        added = tl.load(bias + feature, mask=feature < features, other=0.0)  # [BLOCK_N]
        total += added.to(tl.float32)[None, :]
    out = y + token[:, None] * features + feature[None, :]
    inside = (token < tokens)[:, None] & (feature < features)[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def pick_size(linear, first, second, third, fourth):
    """Number ``linear`` of four."""
    last = tl.where(linear == 2, third, fourth)
    return tl.where(linear == 0, first, tl.where(linear == 1, second, last))


@triton.jit
def load_picked(linear, first, second, third, fourth, offsets, mask):
    """What pointer number ``linear`` has at ``offsets`` in float32, 0 where it is None."""
    values = tl.zeros(offsets.shape, tl.float32)  # as each load: [...] of the offsets
    if first is not None:
        if linear == 0:
            values += tl.load(first + offsets, mask=mask, other=0.0).to(tl.float32)
    if second is not None:
        if linear == 1:
            values += tl.load(second + offsets, mask=mask, other=0.0).to(tl.float32)
    if third is not None:
        if linear == 2:
            values += tl.load(third + offsets, mask=mask, other=0.0).to(tl.float32)
    if fourth is not None:
        if linear == 3:
            values += tl.load(fourth + offsets, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit(do_not_specialize=["tokens"])
def decode_expand_kernel(
    products, router0, router1, router2, router3, expand0, expand1, expand2, expand3,
    added0, added1, added2, added3, y0, y1, y2, y3, hidden, gate, z,
    features0, features1, features2, features3, tokens, scaling, inverse_temperature,
    LINEARS: tl.constexpr, EXPERTS: tl.constexpr, RANK: tl.constexpr, HIDDEN: tl.constexpr,
    LOGITS: tl.constexpr, TOP_K: tl.constexpr, PAD_EXPERTS: tl.constexpr, PAD_RANK: tl.constexpr,
    SPLITS: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One linear's routing, and a tile of its ``z Bcat^T`` + bias (or base output, if BASE)."""
    linear = tl.program_id(1)
    features = pick_size(linear, features0, features1, features2, features3)
    token = tl.arange(0, BLOCK_T)
    feature = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.arange(0, PAD_EXPERTS)
    rank = tl.arange(0, PAD_RANK)
    is_token, is_expert, is_rank = token < tokens, expert < EXPERTS, rank < RANK
    # the weight first: it does not wait for the sums
    c = tl.arange(0, PAD_EXPERTS * PAD_RANK)
    inside = (c // PAD_RANK < EXPERTS) & (c % PAD_RANK < RANK)
    # c itself where there is no padding within an expert, for whole-line loads
    c_real = c if PAD_RANK == RANK else (c // PAD_RANK) * RANK + c % PAD_RANK
    weight = pick(linear, expand0, expand1, expand2, expand3)
    weight += feature[None, :] * (EXPERTS * RANK) + c_real[:, None]
    mask = inside[:, None] & (feature < features)[None, :]
    weight = tl.load(weight, mask=mask, other=0.0)  # [PAD_EXPERTS PAD_RANK, BLOCK_N]
    # where each of the hidden values that a program sums lies, and that there is one
    place = rank if HIDDEN == RANK else c_real
    is_real = is_rank if HIDDEN == RANK else inside
    sums = tl.zeros((BLOCK_T, place.shape[0]), tl.float32)
    logits = tl.zeros((BLOCK_T, PAD_EXPERTS), tl.float32)
    for first in range(0, SPLITS, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)[:, None, None]
        real = (split < SPLITS) & is_token[None, :, None]
        part = products + (split * tokens + token[None, :, None]) * (LINEARS * (HIDDEN + LOGITS))
        a = part + linear * HIDDEN + place[None, None, :]
        # [AT_ONCE, BLOCK_T, PAD_RANK or PAD_EXPERTS PAD_RANK]
        sums += tl.sum(tl.load(a, mask=real & is_real[None, None, :], other=0.0), 0)
        if LOGITS > 0:
            b = part + LINEARS * HIDDEN + linear * EXPERTS + expert[None, None, :]
            # [AT_ONCE, BLOCK_T, PAD_EXPERTS]
            logits += tl.sum(tl.load(b, mask=real & is_expert[None, None, :], other=0.0), 0)
    row = linear * tokens + token[:, None]
    gates = gate + row * EXPERTS + expert[None, :]
    is_gate = is_token[:, None] & is_expert[None, :]
    if LOGITS == 0:
        weights = tl.load(gates, mask=is_gate, other=0.0)  # [BLOCK_T, PAD_EXPERTS]
    else:
        bias = load_picked(linear, router0, router1, router2, router3, expert, is_expert)
        logits = (logits + bias[None, :]) * inverse_temperature  # bias [PAD_EXPERTS]
        weights = gates_of(logits, expert[None, :], EXPERTS, TOP_K)
    if HIDDEN == RANK:
        routed = (scaling * weights)[:, :, None] * sums[:, None, :]
    else:
        by_expert = tl.reshape(sums, (BLOCK_T, PAD_EXPERTS, PAD_RANK))
        routed = (scaling * weights)[:, :, None] * by_expert
    routed = tl.reshape(routed.to(z.dtype.element_ty), (BLOCK_T, PAD_EXPERTS * PAD_RANK))
    if tl.program_id(0) == 0:
        hiddens = hidden + row * HIDDEN + place[None, :]
        tl.store(hiddens, sums, mask=is_token[:, None] & is_real[None, :])
        if LOGITS > 0:
            tl.store(gates, weights, mask=is_gate)
        zs = z + row * (EXPERTS * RANK) + c_real[None, :]
        tl.store(zs, routed, mask=is_token[:, None] & inside[None, :])
    # [BLOCK_T, PAD_EXPERTS PAD_RANK] x [PAD_EXPERTS PAD_RANK, BLOCK_N]
    total = tl.dot(routed, weight.to(routed.dtype), input_precision=PRECISION)
    at = token[:, None] * features + feature[None, :]
    real = is_token[:, None] & (feature < features)[None, :]
    added_at = at if BASE else at * 0 + feature[None, :]
    total += load_picked(linear, added0, added1, added2, added3, added_at, real)  # as total
    tl.store(pick(linear, y0, y1, y2, y3) + at, total.to(z.dtype.element_ty), mask=real)


def expand(z: Tensor, expand_weight: Tensor, bias: Tensor | None, base: Tensor | None) -> Tensor:
    """The experts' part of y, alone or on top of ``base`` [T, N], which is left as it is.

    z [T, M r] contiguous, bfloat16, float16 or float32; expand_weight [N, M, r] of any of these;
    bias [N]. Gives ``z Bcat^T + bias + base`` [T, N], new, in z's dtype.
    """
    tokens, width = z.shape
    features = expand_weight.shape[0]
    if base is not None and base.stride(1) != 1:
        base = base.contiguous()
    y = z.new_empty(tokens, features)
    blocks = tuning.expand_blocks(device_of(z), tokens, width, z.element_size())
    arguments = {
        "z": z.contiguous(),
        "weight": expand_weight.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "base": base,
        "y": y,
        "tokens": tokens,
        "features": features,
        "base_stride": 0 if base is None else base.stride(0),
    }
    constants = {"WIDTH": width, "PRECISION": tuning.precision()}
    flops = 2 * tokens * features * width
    grid = product_grid(tokens, features, blocks)
    launch(expand_kernel, grid, arguments, constants, blocks, flops)
    return y


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, expand_weight: Tensor
) -> Tensor:
    """The frozen linear with the experts' part in the same accumulator.

    x [T, K], bfloat16, float16 or float32; weight [N, K], bias [N] and z [T, M r] in its dtype;
    expand_weight [N, M, r] in any of these. Gives ``z Bcat^T + x W^T + bias`` [T, N] in x's dtype.
    """
    x, weight = dense_rows(x), dense_rows(weight)
    (tokens, columns), (features, _), (_, width) = x.shape, weight.shape, z.shape
    y = x.new_empty(tokens, features)
    aligned = tuning.rows_aligned(x, weight)
    blocks = tuning.fused_blocks(device_of(x), tokens, x.element_size(), aligned)
    arguments = {
        "x": x,
        "weight": weight,
        "bias": None if bias is None else bias.contiguous(),
        "z": z.contiguous(),
        "expand": expand_weight.contiguous(),
        "y": y,
        "tokens": tokens,
        "features": features,
        "columns": columns,
        "x_stride": x.stride(0),
        "weight_stride": weight.stride(0),
    }
    constants = {"WIDTH": width, "PRECISION": tuning.precision()}
    flops = 2 * tokens * features * (columns + width)
    grid = product_grid(tokens, features, blocks)
    launch(fused_linear_kernel, grid, arguments, constants, blocks, flops)
    return y


def decode_expand(
    products: Tensor, group: Group, dtype: torch.dtype
) -> tuple[list[Tensor], Routed]:
    """From `decode_shrink`'s products: the experts' part of every linear's y in ``dtype``.

    For each linear ``z Bcat^T`` + its bias (or base output) [T, N_g], new, to which ``x W^T`` is to
    be added; and ``Routed``. Not for groups of which `tuning.decode_expands_apart` is true.
    """
    splits, tokens, _ = products.shape
    pads = tuning.decode_pads(group.rank, group.experts)
    routed = empty_routed(products, group, tokens, dtype)
    features = [weight.shape[0] for weight in group.expand_weights]
    outputs = [routed.z.new_empty(tokens, count) for count in features]
    arguments = {
        "products": products,
        **numbered("router", group.router_biases),
        **numbered("expand", group.expand_weights),
        **numbered("added", group.base_outputs or group.biases),
        **numbered("y", outputs),
        **vars(routed),
        **numbered("features", features, 0),
        "tokens": tokens,
        "scaling": group.scaling,
        "inverse_temperature": 1.0 / group.temperature,
    }
    constants = {
        **sizes(group),
        **pads,
        "LINEARS": len(group),
        "SPLITS": splits,
        "BASE": bool(group.base_outputs),
        "PRECISION": tuning.precision(),
    }
    device = device_of(products)
    shared = group.hidden_size == group.rank
    itemsize = routed.z.element_size()
    blocks = tuning.decode_expand_blocks(device, features, pads, itemsize, shared)
    grid = (triton.cdiv(max(features), blocks.constants["BLOCK_N"]), len(group))
    flops = 2 * tokens * sum(features) * group.experts * group.rank
    launch(decode_expand_kernel, grid, arguments, constants, blocks, flops)
    return outputs, routed


def product_grid(tokens: int, features: int, blocks: Blocks) -> tuple[int]:
    """Programs of a kernel that takes its tile from `tile_of`."""
    across = triton.cdiv(features, blocks.constants["BLOCK_N"])
    return (triton.cdiv(tokens, blocks.constants["BLOCK_T"]) * across,)


def dense_rows(matrix: Tensor) -> Tensor:
    """The kernels take any row stride, but neighbouring columns."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
