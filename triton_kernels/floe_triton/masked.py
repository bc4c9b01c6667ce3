"""Keyed dropout on its own, as one Triton kernel."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments are no Python types)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from floe_triton import reference, tuning
from floe_triton.launch import device_of, launch
from floe_triton.philox import keep_mask


@triton.jit(do_not_specialize=["threshold"])
def masked_kernel(
    x, out, seed, T, K, x_stride, threshold, scale, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """``out[t, c] = x[t, c] * scale`` where column c of row t is kept, else 0.

    float64 has its scale worked out here: a number passed to a kernel is a float32.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_column = tl.program_id(1) * BLOCK_K
    columns = first_column + tl.arange(0, BLOCK_K)
    inside = (rows < T)[:, None] & (columns < K)[None, :]
    tile = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
    keep = keep_mask(tl.load(seed), rows, first_column, threshold, BLOCK_T, BLOCK_K)
    if x.dtype.element_ty == tl.float64:
        scaled = tile * (tl.full((), 256, tl.float64) / (256 - threshold).to(tl.float64))
    else:
        scaled = tile.to(tl.float32) * scale
    kept = tl.where(keep, scaled, 0.0).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * K + columns[None, :], kept, mask=inside)


def masked(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """``reference.dropout`` of x [T, K], bit for bit: scaled in float32, rounded once.

    Args:
        x: [T, K] in bfloat16, float16, float32 or float64 (scaled in its own width).
        p: Rate of dropped elements, in [0, 1).
        seed: 0-dimensional int64 tensor on x's device.

    Returns:
        A new contiguous [T, K] tensor of x's dtype.

    Raises:
        ValueError: ``p`` is outside [0, 1).
    """
    threshold, scale = reference.dropout_threshold(p), reference.dropout_scale(p)
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, columns = x.shape
    out = x.new_empty((tokens, columns))
    blocks = tuning.masked_blocks(device_of(x))
    grid = (
        triton.cdiv(tokens, blocks.constants["BLOCK_T"]),
        triton.cdiv(columns, blocks.constants["BLOCK_K"]),
    )
    arguments = {
        "x": x,
        "out": out,
        "seed": seed,
        "T": tokens,
        "K": columns,
        "x_stride": x.stride(0),
        "threshold": threshold,
        "scale": scale,
    }
    launch(masked_kernel, grid, arguments, {}, blocks)
    return out
