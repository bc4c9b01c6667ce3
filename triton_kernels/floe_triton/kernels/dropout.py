"""Keyed dropout in Triton: the mask as every kernel draws it, and the dropout alone.

The twin of ``reference.dropout_keep`` (and of floe's csrc/philox.h).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments are no Python types)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from floe_triton import reference, tuning
from floe_triton.launch import device_of, launch


@triton.jit
def keep_mask(
    seed, token, first_column, threshold,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, SEALED: tl.constexpr = False,
):  # fmt: skip
    """Keep-decisions [BLOCK_T, BLOCK_K] of ``token`` (int64 [BLOCK_T]) from ``first_column`` on.

    One Philox-4x32-7 call gives the sixteen bytes of sixteen columns, so ``first_column`` and
    BLOCK_K are multiples of 16. A column is kept iff its byte is at least ``threshold``.

    SEALED hides the joins. Triton before 3.8 lays a product's operands out for a type of half the
    width if one comes from a join, and then moves them about in registers in every step.
    """
    blocks = first_column // 16 + tl.arange(0, BLOCK_K // 16)
    c0 = tl.broadcast_to(blocks[None, :], (BLOCK_T, BLOCK_K // 16)).to(tl.uint32)
    low = (token & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (token >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, c0, low + c0 * 0, high + c0 * 0, c0 * 0, n_rounds=7)
    # join puts its second argument last: this order reads w0, w1, w2, w3 along the last axis
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.uint32, bitcast=True)
    if SEALED:  # the compiler does not look past a sum, and that of one word is no instruction
        words = tl.sum(tl.reshape(words, (BLOCK_T, BLOCK_K // 4, 1)), axis=2)
    else:
        words = tl.reshape(words, (BLOCK_T, BLOCK_K // 4))
    shifts = (tl.arange(0, 4) * 8).to(tl.uint32)
    bytes_ = (words[:, :, None] >> shifts[None, None, :]) & 0xFF
    return tl.reshape(bytes_, (BLOCK_T, BLOCK_K)) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["threshold"])
def dropout_kernel(
    x, out, seed, tokens, columns, x_stride, threshold, scale,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[t, k] = x[t, k] * scale`` where column k of token t is kept, else 0.

    float64 has its scale worked out here: a number passed to a kernel is a float32.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_column = tl.program_id(1) * BLOCK_K
    column = first_column + tl.arange(0, BLOCK_K)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    # [BLOCK_T, BLOCK_K]
    tile = tl.load(x + token[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    key = tl.load(seed)  # []
    keep = keep_mask(key, token, first_column, threshold, BLOCK_T, BLOCK_K)
    if x.dtype.element_ty == tl.float64:
        scaled = tile * (tl.full((), 256, tl.float64) / (256 - threshold).to(tl.float64))
    else:
        scaled = tile.to(tl.float32) * scale
    kept = tl.where(keep, scaled, 0.0).to(out.dtype.element_ty)
    tl.store(out + token[:, None] * columns + column[None, :], kept, mask=inside)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``reference.dropout`` of x [T, K], bit for bit: scaled in float32, rounded once.

    float64 is scaled in float64. ``p`` in [0, 1), ``seed`` a 0-dim int64 tensor on x's device; a
    new contiguous [T, K] tensor of x's dtype.

    Raises:
        ValueError: ``p`` is outside [0, 1).
    """
    threshold, scale = reference.dropout_threshold(p), reference.dropout_scale(p)
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, columns = x.shape
    out = x.new_empty((tokens, columns))
    blocks = tuning.dropout_blocks(device_of(x))
    grid = (
        triton.cdiv(tokens, blocks.constants["BLOCK_T"]),
        triton.cdiv(columns, blocks.constants["BLOCK_K"]),
    )
    arguments = {
        "x": x,
        "out": out,
        "seed": seed,
        "tokens": tokens,
        "columns": columns,
        "x_stride": x.stride(0),
        "threshold": threshold,
        "scale": scale,
    }
    launch(dropout_kernel, grid, arguments, {}, blocks)
    return out
