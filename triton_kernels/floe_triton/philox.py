# mypy: allow-untyped-defs, allow-incomplete-defs
"""The dropout mask in Triton: the twin of ``reference.dropout_keep`` (csrc/philox.h of floe)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_mask(
    seed, rows, first_column, threshold,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, SEALED: tl.constexpr = False,
):  # fmt: skip
    """Keep-decisions [BLOCK_T, BLOCK_K] of ``rows`` (int64 [BLOCK_T]) from ``first_column`` on.

    One Philox-4x32-7 call gives the sixteen bytes of sixteen columns, so ``first_column`` and
    BLOCK_K are multiples of 16. A column is kept iff its byte is at least ``threshold``.

    SEALED hides the joins. Triton before 3.8 lays a product's operands out for a type of half the
    width if one comes from a join, and then moves them about in registers in every step.
    """
    blocks = first_column // 16 + tl.arange(0, BLOCK_K // 16)
    c0 = tl.broadcast_to(blocks[None, :], (BLOCK_T, BLOCK_K // 16)).to(tl.uint32)
    low = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (rows >> 32).to(tl.uint32)[:, None]
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
