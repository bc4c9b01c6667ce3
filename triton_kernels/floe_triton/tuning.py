"""Block sizes per architecture and shape class: tables and rules, never a search inside a step.

A GPU that no table names gets the entry of the nearest older architecture, so no GPU is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from floe_triton.launch import Blocks, Device

# The kernels that keep every row of A and of the routers in registers serve up to so many; beyond
# them the products are large enough for the BLAS library.
MAX_ROWS = 128  # G (r + M)
MAX_WIDTH = 128  # M r


def kernels_serve(rows: int, width: int) -> bool:
    """Whether the fused kernels take this group: G (r + M) rows and M r columns of z."""
    return rows <= MAX_ROWS and width <= MAX_WIDTH


# Architectures on which the Triton product came within 5 % of the BLAS library's, and from how
# many tokens on: `python -m benchmarks.kernels --device cuda` measures it. Empty until it did.
FUSED_FROM_TOKENS: dict[int, int] = {}


def prefers_fused(device: Device, tokens: int, features: int, columns: int) -> bool:
    """Whether the frozen product [tokens, columns] x [columns, features] is fused by default."""
    least = FUSED_FROM_TOKENS.get(device.capability)
    return least is not None and tokens >= least and min(features, columns) >= 1024


def nearest(table: dict[int, Blocks], device: Device) -> Blocks:
    """The entry of the newest architecture that is not newer than ``device``'s; else the oldest."""
    known = [capability for capability in table if capability <= device.capability]
    return table[max(known) if known else min(table)]


def precision() -> str:
    """How float32 tiles are multiplied, by torch's own switch. 16-bit tiles do not care."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << max(0, count - 1).bit_length()


# Forward


def route_pads(hidden: int, experts: int, groups: int) -> dict[str, int]:
    """Padded sizes of `shrink_kernel`'s accumulators: either is at least 16 columns wide."""
    slots = power_of_two(groups)
    return {
        "SLOTS": slots,
        "PAD_EXPERTS": max(power_of_two(experts), 16 // slots),
        "PAD_HIDDEN": max(power_of_two(hidden), 16 // slots),
    }


def shrink_blocks(
    device: Device, tokens: int, pads: dict[str, int], itemsize: int, row_itemsize: int
) -> Blocks:
    """Tile of `shrink_kernel`: as many stages as the smallest shared memory takes."""
    if not device.capability:
        return Blocks({"BLOCK_T": 16, "BLOCK_K": 64}, 1, 1)
    width, many = _shrink_width(pads), routes_apart(pads)
    roomy = device.capability in (80, 90, 100)  # elsewhere a block has 99 KB of shared memory
    # from 9.0 on operands and, later, sums stay out of the registers
    deep = device.capability in (90, 100)
    tall = 128 if many and width <= 192 and (deep or row_itemsize == itemsize) else 64
    block_t = max(16, min(tall if itemsize == 2 else 32, power_of_two(tokens)))
    block_k = 64 if itemsize == 2 and (deep or not many) else 16 if width > 192 else 32
    stage = block_k * (block_t * itemsize + width * row_itemsize)
    room = (140 if roomy else 90) << 10
    stages = max(2, min(4 if itemsize == 2 else 3, room // stage - (row_itemsize != itemsize)))
    if device.capability == 90 and width > 32 and not many and row_itemsize == itemsize == 2:
        block_k, stages = 128, 3  # the addresses of several linears' rows, half as often
    return Blocks({"BLOCK_T": block_t, "BLOCK_K": block_k}, 8 if many else 4, stages)


def routes_apart(pads: dict[str, int]) -> bool:
    """Whether so wide accumulators leave no registers for routing, which is then a launch."""
    return _shrink_width(pads) > 96


def _shrink_width(pads: dict[str, int]) -> int:
    return pads["SLOTS"] * (pads["PAD_HIDDEN"] + pads["PAD_EXPERTS"])


def shrink_span(device: Device, tokens: int, columns: int, blocks: Blocks) -> int:
    """Columns of one program, a multiple of its tile's: all, unless programs are too few then."""
    block_t, block_k = blocks.constants["BLOCK_T"], blocks.constants["BLOCK_K"]
    tiles, steps = -(-tokens // block_t), -(-columns // block_k)
    wanted = device.multiprocessors // max(1, tiles)
    splits = max(1, min(wanted, steps // 2))
    return -(-steps // splits) * block_k


def route_blocks(device: Device, tokens: int, pads: dict[str, int]) -> Blocks:
    """Tokens of a tile of `route_kernel`, few enough for hidden and logits to stay in registers."""
    width = max(pads["PAD_HIDDEN"], pads["PAD_EXPERTS"])
    block_t = max(8, min(64, 2048 // width, power_of_two(tokens)))
    return Blocks({"BLOCK_T": block_t}, 4, 1)


def expand_blocks(device: Device, tokens: int, width: int, itemsize: int) -> Blocks:
    """Tile of `expand_kernel`; TILES tiles of tokens share a stripe of expand_weight."""
    if not device.capability:
        return Blocks({"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_C": 16, "TILES": 2}, 1, 1)
    block_t = max(16, min(64 if itemsize == 2 else 32, power_of_two(tokens)))
    block_c = max(16, min(64 if itemsize == 2 else 16, power_of_two(width)))
    sizes = {"BLOCK_T": block_t, "BLOCK_N": 128 if itemsize == 2 else 64, "BLOCK_C": block_c}
    return Blocks({**sizes, "TILES": 1}, 4, 2)


def fused_blocks(
    device: Device, tokens: int, itemsize: int, aligned: bool, dropping: bool = False
) -> Blocks:
    """Tile of the products that the frozen weight is part of.

    ``aligned``: `rows_aligned` of what is read. ``dropping``: the tile draws a mask.
    """
    if not device.capability:
        sizes = {"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_C": 16, "TILES": 2}
        return Blocks(sizes, 1, 1)
    if itemsize == 4:
        return _product_tile(64, 64, 16, 4, 3)
    if not aligned:  # element by element, with an address each
        return _product_tile(64, 64, 32, 4, 2)
    if tokens <= 64:
        return _product_tile(64, 128, 64, 4, 3)
    return nearest(_DROPPING_TILES if dropping else _PRODUCT_TILES, device)


def rows_aligned(*matrices: Tensor) -> bool:
    """Whether every row of the matrices starts at a multiple of 16 bytes, in elements of theirs."""
    return all(matrix.stride(0) * matrix.element_size() % 16 == 0 for matrix in matrices)


def _product_tile(t: int, n: int, k: int, warps: int, stages: int) -> Blocks:
    sizes = {"BLOCK_T": t, "BLOCK_N": n, "BLOCK_K": k, "BLOCK_C": 16, "TILES": 8}
    return Blocks(sizes, warps, stages)


# 8.6, 8.9 and 12.0 have 99 KB of shared memory to a block, the others at least 163
_PRODUCT_TILES = {
    80: _product_tile(128, 256, 32, 8, 3),
    86: _product_tile(128, 128, 32, 8, 4),
    90: _product_tile(128, 256, 64, 8, 3),
    100: _product_tile(128, 256, 64, 8, 3),
    120: _product_tile(128, 128, 64, 8, 3),
}
_DROPPING_TILES = {**_PRODUCT_TILES, 80: _product_tile(128, 128, 64, 8, 3)}


def decode_pads(rank: int, experts: int) -> dict[str, int]:
    """Padded sizes of `decode_expand_kernel`: their product is at least a tensor core's 16."""
    pad_r = max(4, power_of_two(rank))
    return {"PAD_RANK": pad_r, "PAD_EXPERTS": max(power_of_two(experts), 16 // pad_r)}


def decode_expands_apart(pads: dict[str, int], itemsize: int) -> bool:
    """Whether the experts' product is too deep for `decode_expand_kernel`'s registers."""
    return itemsize == 4 and pads["PAD_RANK"] * pads["PAD_EXPERTS"] > 64


def decode_shrink_blocks(device: Device, rows: int, itemsize: int) -> Blocks:
    """Columns of one step of `decode_shrink_kernel`."""
    if not device.capability:
        return Blocks({"BLOCK_T": 16, "BLOCK_K": 64}, 1, 1)
    block_k = (128 if itemsize == 2 else 64) if rows <= 32 else (64 if itemsize == 2 else 32)
    return Blocks({"BLOCK_T": 16, "BLOCK_K": block_k}, 4, 3 if itemsize == 2 else 2)


def decode_span(columns: int, rows: int, blocks: Blocks) -> int:
    """Columns of one program. Every program of the next kernel sums all parts, so not too many."""
    steps = -(-columns // blocks.constants["BLOCK_K"])
    return -(-steps // min(steps, 32)) * blocks.constants["BLOCK_K"]


def decode_expand_blocks(
    device: Device, features: list[int], pads: dict[str, int], itemsize: int, shared: bool = True
) -> Blocks:
    """Features of a tile of `decode_expand_kernel`: narrower where programs were too few.

    AT_ONCE parts are loaded together, to wait for memory once. ``shared``: one A for all experts.
    """
    if not device.capability:
        return Blocks({"BLOCK_T": 16, "BLOCK_N": 64, "AT_ONCE": 4}, 1, 1)
    width = pads["PAD_RANK"] * pads["PAD_EXPERTS"]
    summed = max(pads["PAD_RANK"], pads["PAD_EXPERTS"]) if shared else width
    at_once = max(1, min(32, 256 // summed))
    wide = sum(-(-count // 64) for count in features) >= device.multiprocessors
    block_n = 64 if wide and width * itemsize <= 256 else 32
    sizes = {"BLOCK_T": 16, "BLOCK_N": block_n, "AT_ONCE": at_once}
    return Blocks(sizes, 4, 1, registers=128)


# Backward


def dropout_blocks(device: Device) -> Blocks:
    """Tile of `dropout_kernel`."""
    if not device.capability:
        return Blocks({"BLOCK_T": 16, "BLOCK_K": 32}, 1, 1)
    return Blocks({"BLOCK_T": 32, "BLOCK_K": 128}, 4, 1)


def stripe(device: Device, tokens: int, columns: int, blocks: Blocks, warps: int) -> int:
    """Tokens that one program sums over, a multiple of its tile's.

    ``columns`` programs stand side by side; so many stripes of them that every multiprocessor gets
    ``warps`` warps, and as few as leave each enough tokens: every stripe costs a float32 part.
    """
    tile = blocks.constants["BLOCK_T"]
    programs = warps * device.multiprocessors // blocks.num_warps
    least = max(2 * tile, 128) if device.capability else 2 * tile
    stripes = max(1, min(programs // columns, tokens // least))
    return -(-tokens // (stripes * tile)) * tile


def sum_blocks(device: Device) -> Blocks:
    """Elements of a tile of `sum_parts_kernel`, and how many parts it loads at once."""
    if not device.capability:
        return Blocks({"BLOCK": 256, "BLOCK_S": 2}, 1, 1)
    return Blocks({"BLOCK": 256, "BLOCK_S": 8}, 2, 1)


def tiles_aligned(matrix: Tensor) -> bool:
    """Whether Triton can move a [T, N] matrix in 16-byte pieces; else its addresses take room."""
    return matrix.shape[1] % 16 == 0 and matrix.stride(0) % 16 == 0


def grad_x_blocks(
    device: Device,
    padded: int,
    dropping: bool,
    itemsize: int,
    aligned: bool = True,
    writes_x: bool = True,
) -> Blocks:
    """Tile of `grad_x_kernel`, whose sums over ``padded`` rows stay in registers.

    Its mask is sealed where only a product takes it: where grad_x does too, or every element has
    an address of its own, most of the code is longer for it.
    """
    if not device.capability:
        return Blocks({"BLOCK_T": 16, "BLOCK_K": 32, "SEALED": int(not writes_x)}, 1, 1)
    if itemsize == 2 and not aligned:
        tiles = {256: (32, 64, 8, 1)}
    elif itemsize == 2:
        # tokens, columns, warps, stages
        narrow = (32, 128, 4, 2 if device.capability == 90 else 3)
        middle = narrow if writes_x or device.capability == 100 else (32, 256, 8, 2)
        tiles = {32: narrow, 48: middle, 128: (32, 64, 4, 3), 256: (32, 64, 8, 2)}
        if not dropping:
            tiles = {32: (32, 128, 4, 3), 64: (64, 64, 4, 3), 256: (32, 64, 4, 3)}
    elif precision() == "tf32":
        tiles = {48: (32, 64, 4, 2), 256: (16, 32, 8, 1)}
        if not dropping:
            tiles = {64: (32, 64, 4, 2), 256: (32, 32, 4, 2)}
    else:  # no tensor cores: the products themselves fill the registers
        tiles = {48: (32, 32, 8, 1), 256: (16, 32, 8, 1)}
        if not dropping:
            tiles = {256: (32, 32, 8, 2)}
    tokens, columns, warps, stages = next(tiles[most] for most in tiles if padded <= most)
    bounded = dropping and itemsize == 2 and aligned and padded <= 32 and not writes_x
    sizes = {"BLOCK_T": tokens, "BLOCK_K": columns, "SEALED": int(aligned and not writes_x)}
    return Blocks(sizes, warps, stages, registers=128 if bounded else None)


def grad_y_blocks(device: Device, width: int, itemsize: int, aligned: bool = True) -> Blocks:
    """Tile of `grad_y_kernel`: the wider, the fewer parts of grad_z [T, ``width``]."""
    if not device.capability:
        return Blocks({"BLOCK_T": 16, "BLOCK_N": 32, "TRANSPOSED": False}, 1, 1)
    aligned = aligned and width % (4 if width <= 32 else 8) == 0
    wgmma = device.capability == 90 and itemsize == 2 and aligned
    if itemsize == 2 and not aligned:
        tiles = {64: (16, 128, 8, 2), 128: (16, 64, 8, 2)}
    elif itemsize == 2:
        # tokens, columns, warps, stages
        tiles = {32: (16, 512, 4, 3), 64: (32, 256, 4, 3), 128: (16, 64, 8, 2)}
        if wgmma:
            tiles = {64: (64, 512, 8, 2), 128: (64, 256, 8, 2)}
    elif precision() == "tf32":
        tiles = {64: (16, 128, 4, 2), 128: (16, 32, 4, 1)}
    else:  # no tensor cores: the products themselves fill the registers
        tiles = {64: (32, 64, 8, 1), 128: (16, 32, 4, 1)}
    tokens, columns, warps, stages = next(tiles[most] for most in tiles if width <= most)
    sizes = {"BLOCK_T": tokens, "BLOCK_N": columns, "TRANSPOSED": int(not wgmma)}
    return Blocks(sizes, warps, stages)


def reads_grad_y_once(device: Device, width: int, itemsize: int) -> bool:
    """Whether `grad_y_kernel`'s parts of grad_z are fewer bytes than a second read of grad_y.

    That is what two products of the BLAS library take instead.
    """
    if not device.capability:
        return True
    columns = grad_y_blocks(device, width, itemsize).constants["BLOCK_N"]
    return 2 * 4 * width <= 0.75 * itemsize * columns  # written and read; a quarter for expand's


def route_backward_blocks(device: Device, pads: dict[str, int]) -> Blocks:
    """Tokens of a tile of `route_backward_kernel`, so few that their grad_z stays in registers."""
    width = pads["PAD_EXPERTS"] * pads["PAD_RANK"]
    most = 64 if device.capability else 16
    return Blocks({"BLOCK_T": max(1, min(most, 4096 // width))}, 4, 1)
