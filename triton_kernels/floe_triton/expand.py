"""The way out: every expert's columns as one product of rank M r, and the frozen product with it.

With z [T, M r] and Bcat [N, M r], the free view of expand_weight [N, M, r]::

    y = base + z Bcat^T          or        y = z Bcat^T + bias
    y = z Bcat^T + x W^T + bias                            the fused form, one accumulator
    grad_x = mask (grad_hidden A) + grad_logits R + grad_y W

The fused forms take the small product as the first steps of the big one: no pass over y or grad_x
of its own. Every result is summed in float32 and rounded once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (a kernel's arguments are no Python types)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from floe_triton import tuning
from floe_triton.launch import Blocks, device_of, launch
from floe_triton.philox import keep_mask
from floe_triton.reference import dropout_scale, dropout_threshold


@triton.jit
def add_product(
    total, left, right, t, n, first, last, tokens, features, left_stride, right_stride,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``total + left[t, first:last] right[first:last, n]``, where ``right`` lies as [N, C] if
    TRANSPOSED and as [C, N] if not.

    Rows past the last token repeat it: their sums are not stored, and need no mask.
    """
    rows = left + tl.minimum(t, tokens - 1)[:, None] * left_stride
    for start in range(first, last, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < last
        left_tile = tl.load(rows + c[None, :], mask=inside[None, :], other=0.0)
        if TRANSPOSED:
            columns = tl.minimum(n, features - 1)[None, :].to(tl.int64) * right_stride
            right_tile = tl.load(right + columns + c[:, None], mask=inside[:, None], other=0.0)
        else:
            right_tile = tl.load(
                right + c[:, None].to(tl.int64) * right_stride + n[None, :],
                mask=inside[:, None] & (n < features)[None, :], other=0.0,
            )  # fmt: skip
        right_tile = right_tile.to(left_tile.dtype)
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
    t_tile = band * TILES + within % height
    return t_tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T), within // height * BLOCK_N


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    z, weight, bias, base, y, tokens, features, base_stride,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A tile of ``z Bcat^T + bias + base``."""
    t, first = tile_of(tl.program_id(0), tokens, features, BLOCK_T, BLOCK_N, TILES)
    n = first + tl.arange(0, BLOCK_N)
    inside = (t < tokens)[:, None] & (n < features)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    total = add_product(
        total, z, weight, t, n, 0, WIDTH, tokens, features, WIDTH, WIDTH, True, PRECISION, BLOCK_C
    )
    if bias is not None:
        total += tl.load(bias + n, mask=n < features, other=0.0).to(tl.float32)[None, :]
    if base is not None:
        added = tl.load(base + t[:, None] * base_stride + n[None, :], mask=inside, other=0.0)
        total += added.to(tl.float32)
    out = y + t[:, None] * features + n[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def fused_linear_kernel(
    x, weight, bias, z, expand, y, tokens, features, columns, x_stride, weight_stride,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A tile of ``z Bcat^T + x W^T + bias``."""
    t, first = tile_of(tl.program_id(0), tokens, features, BLOCK_T, BLOCK_N, TILES)
    n = first + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    total = add_product(
        total, z, expand, t, n, 0, WIDTH, tokens, features, WIDTH, WIDTH, True, PRECISION, BLOCK_C
    )
    total = add_product(
        total, x, weight, t, n, 0, columns, tokens, features, x_stride, weight_stride,
        True, PRECISION, BLOCK_K,
    )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + n, mask=n < features, other=0.0).to(tl.float32)[None, :]
    out = y + t[:, None] * features + n[None, :]
    inside = (t < tokens)[:, None] & (n < features)[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "threshold"])
def fused_grad_x_kernel(
    grad_y, weight, grads, rows, seed, into, grad_x, tokens, columns, features, grad_stride,
    weight_stride, grads_stride, threshold, keep_scale,
    HIDDEN: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A tile of ``mask (grads[:, :HIDDEN] rows[:HIDDEN]) + grads[:, HIDDEN:] rows[HIDDEN:] +
    grad_y W + into``. Here BLOCK_N cuts x's columns and BLOCK_K what is summed over, y's.
    """
    t, first = tile_of(tl.program_id(0), tokens, columns, BLOCK_T, BLOCK_N, TILES)
    k = first + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if grads is not None:
        total = add_product(
            total, grads, rows, t, k, 0, HIDDEN, tokens, columns, grads_stride, columns,
            False, PRECISION, BLOCK_C,
        )  # fmt: skip
        if seed is not None:
            keep = keep_mask(tl.load(seed), t, first, threshold, BLOCK_T, BLOCK_N)
            total = tl.where(keep, total * keep_scale, 0.0)
        total = add_product(
            total, grads, rows, t, k, HIDDEN, P, tokens, columns, grads_stride, columns,
            False, PRECISION, BLOCK_C,
        )  # fmt: skip
    total = add_product(
        total, grad_y, weight, t, k, 0, features, tokens, columns, grad_stride, weight_stride,
        False, PRECISION, BLOCK_K,
    )  # fmt: skip
    inside = (t < tokens)[:, None] & (k < columns)[None, :]
    out = grad_x + t[:, None] * columns + k[None, :]
    if into is not None:
        total += tl.load(into + t[:, None] * columns + k[None, :], mask=inside).to(tl.float32)
    tl.store(out, total.to(grad_x.dtype.element_ty), mask=inside)


def expand(z: Tensor, expand_weight: Tensor, bias: Tensor | None, base: Tensor | None) -> Tensor:
    """The experts' part of y, alone or on top of ``base``.

    Args:
        z: [T, M r], contiguous, bfloat16, float16 or float32.
        expand_weight: [N, M, r], any of the dtypes.
        bias: [N] or None.
        base: [T, N] or None, left as it is.

    Returns:
        ``z Bcat^T + bias + base`` [T, N], new, in z's dtype.
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
    launch(
        expand_kernel, _tiles(tokens, features, blocks), arguments, constants, blocks,
        2 * tokens * features * width,
    )  # fmt: skip
    return y


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, expand_weight: Tensor
) -> Tensor:
    """The frozen linear with the experts' part in the same accumulator.

    Args:
        x: [T, K], bfloat16, float16 or float32.
        weight: [N, K], x's dtype.
        bias: [N] or None.
        z: [T, M r], x's dtype.
        expand_weight: [N, M, r], any of the dtypes.

    Returns:
        ``z Bcat^T + x W^T + bias`` [T, N] in x's dtype.
    """
    x, weight = _dense_rows(x), _dense_rows(weight)
    (tokens, columns), (features, _), (_, width) = x.shape, weight.shape, z.shape
    y = x.new_empty(tokens, features)
    aligned = _aligned(x) and _aligned(weight)
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
    launch(
        fused_linear_kernel, _tiles(tokens, features, blocks), arguments, constants, blocks,
        2 * tokens * features * (columns + width),
    )  # fmt: skip
    return y


def fused_grad_x(
    grad_y: Tensor,
    weight: Tensor,
    grads: Tensor | None,
    rows: Tensor | None,
    hidden_rows: int,
    dropout_p: float,
    seed: Tensor | None,
    into: Tensor | None = None,
) -> Tensor:
    """The gradient of x through the frozen linear and, where ``grads`` is given, its adapters.

    Args:
        grad_y: [T, N], bfloat16, float16 or float32.
        weight: [N, K], grad_y's dtype, read as it lies.
        grads: [T, P], grad_y's dtype: gradients of the products with ``rows``; None for none.
        rows: [P, K], any of the dtypes; None with ``grads``.
        hidden_rows: How many of ``rows`` are A's: they met x after dropout.
        dropout_p: The forward's.
        seed: The forward's, needed where ``dropout_p`` > 0.
        into: [T, K] contiguous, in grad_y's dtype, to add to in place: a group's second linear
            adds to its first one's result.

    Returns:
        [T, K] in grad_y's dtype; ``into`` itself where given.
    """
    grad_y, weight = _dense_rows(grad_y), _dense_rows(weight)
    (tokens, features), (_, columns) = grad_y.shape, weight.shape
    grad_x = grad_y.new_empty(tokens, columns) if into is None else into
    dropping = dropout_p > 0.0 and grads is not None
    aligned = _aligned(grad_y) and _aligned(weight)
    blocks = tuning.fused_blocks(
        device_of(grad_y), tokens, grad_y.element_size(), aligned, dropping
    )
    count = 0 if grads is None else grads.shape[1]
    arguments = {
        "grad_y": grad_y,
        "weight": weight,
        "grads": None if grads is None else _dense_rows(grads),
        "rows": None if rows is None else rows.contiguous(),
        "seed": seed if dropping else None,
        "into": into,
        "grad_x": grad_x,
        "tokens": tokens,
        "columns": columns,
        "features": features,
        "grad_stride": grad_y.stride(0),
        "weight_stride": weight.stride(0),
        "grads_stride": 0 if grads is None else grads.stride(0),
        "threshold": dropout_threshold(dropout_p),
        "keep_scale": dropout_scale(dropout_p),
    }
    hidden = hidden_rows if dropping else count
    constants = {"HIDDEN": hidden, "P": count, "PRECISION": tuning.precision()}
    launch(
        fused_grad_x_kernel, _tiles(tokens, columns, blocks), arguments, constants, blocks,
        2 * tokens * columns * (features + count),
    )  # fmt: skip
    return grad_x


def _tiles(tokens: int, features: int, blocks: Blocks) -> tuple[int]:
    across = triton.cdiv(features, blocks.constants["BLOCK_N"])
    return (triton.cdiv(tokens, blocks.constants["BLOCK_T"]) * across,)


def _dense_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _aligned(matrix: Tensor) -> bool:
    return matrix.stride(0) * matrix.element_size() % 16 == 0
