"""Sums of |w g| per row or column of a block's projections, without keeping weight gradients.

The gradient of a projection's weight is ``dY^T X``, a product of what the backward pass holds
already. Where the inputs and output gradients of all rows are smaller than the product they are
kept, and |W * dY^T X| is reduced tile by tile, the product never being stored; else the product of
one projection is accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from floe.decoder_blocks import Block, linear_at
from floe.importance.block_replay import BackwardRecord, call_block, device_of_block
from floe.importance.gradients import tap_output
from floe.types import Floats

TILE_ROWS = 256
_COLUMNS = ("o", "down")  # projections whose columns, not rows, belong to a unit


@dataclass
class WeightCost:
    """``sum |w g|`` of each row of one projection's weight [N, K], or of each column.

    Rows arrive as pairs of inputs [n, K] and output gradients [n, N] whose gradient is their
    product, and are kept while that takes less room than the product does.

    Attributes:
        by_column: sum over columns' entries instead of rows'.
        per_row: mean of every calibration row's |w g| instead of |w * sum of g|: rows are then
            reduced as they arrive.
    """

    weight: Tensor
    by_column: bool
    per_row: bool
    _inputs: list[Tensor] = field(default_factory=list)
    _gradients: list[Tensor] = field(default_factory=list)
    _product: Tensor | None = None
    _cost: Tensor | None = None

    def add(self, x: Tensor, grad_y: Tensor) -> None:
        """Take the tokens of one calibration row, or of several unless ``per_row``."""
        if self.per_row:
            self._reduce(x, grad_y)
            return
        self._inputs.append(x)
        self._gradients.append(grad_y)
        held = sum(t.nbytes for t in (*self._inputs, *self._gradients))
        if self._product is not None or held > self.weight.numel() * 4:
            self._multiply()

    def cost(self) -> Tensor:
        """[N], or [K] by column, float64."""
        if self._product is not None:
            self._sum(0, self._product)
        elif self._inputs:
            self._reduce(torch.cat(self._inputs), torch.cat(self._gradients))
        assert self._cost is not None, "a projection's cost needs at least one row"
        return self._cost

    def _multiply(self) -> None:
        x, grad_y = torch.cat(self._inputs), torch.cat(self._gradients)
        if self._product is None:
            self._product = grad_y.new_zeros(self.weight.shape, dtype=_wide(x))
        self._product.addmm_(grad_y.to(_wide(x)).T, x.to(_wide(x)))
        self._inputs.clear()
        self._gradients.clear()

    def _reduce(self, x: Tensor, grad_y: Tensor) -> None:
        """Add |W * grad_y^T x|, a tile of rows at a time."""
        x = x.to(_wide(x))
        for start in range(0, len(self.weight), TILE_ROWS):
            self._sum(start, grad_y[:, start : start + TILE_ROWS].to(x.dtype).T @ x)

    def _sum(self, start: int, product: Tensor) -> None:
        rows = slice(start, start + len(product))
        weight = self.weight[rows].detach().to(product.dtype)
        tile = product.mul_(weight).abs_().sum(dim=0 if self.by_column else 1, dtype=torch.float64)
        if self._cost is None:
            length = self.weight.shape[1] if self.by_column else len(self.weight)
            self._cost = tile.new_zeros(length)
        self._cost[slice(None) if self.by_column else rows] += tile


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def block_costs(
    model: nn.Module, block: Block, records: Iterable[BackwardRecord], per_row: bool
) -> dict[str, Floats]:
    """``sum |w g|`` per row of the block's q, k, v (or qkv), gate, up; per column of o and down.

    ``g`` is the gradient of the sum of the row losses. Leaves in every record the gradient of the
    block's input, which is that of the block before's output.
    """
    paths = {**block.attention, "o": block.o_proj, **block.mlp, "down": block.down_proj}
    linears = {name: linear_at(model, path) for name, path in paths.items()}
    costs = {
        name: WeightCost(linear.weight, name in _COLUMNS, per_row)
        for name, linear in linears.items()
    }
    for record in records:
        with ExitStack() as hooks:
            for name, linear in linears.items():
                sink = _sink(costs[name], record.real)
                hooks.callback(linear.register_forward_hook(tap_output(sink)).remove)
            _replay(block, record)
    return {name: cost.cost().cpu().numpy() for name, cost in costs.items()}


def _sink(cost: WeightCost, real: Tensor) -> Callable[[Tensor, Tensor], None]:
    def sink(x: Tensor, grad_y: Tensor) -> None:
        for keep in _kept(real.to(x.device), cost.per_row):
            rows, tokens = keep
            cost.add(x[rows, tokens], grad_y[rows, tokens])

    return sink


def _kept(real: Tensor, per_row: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Places of the real tokens, all at once or row by row."""
    rows, tokens = real.nonzero(as_tuple=True)
    if not per_row:
        yield rows, tokens
        return
    for row in range(len(real)):
        yield rows[rows == row], tokens[rows == row]


def _replay(block: Block, record: BackwardRecord) -> None:
    """The block on one pass, forward and back; no parameter gets a gradient."""
    device = device_of_block(block)
    call = record.calls[block.index]
    assert call.hidden is not None
    hidden = call.hidden.to(device).requires_grad_()
    call.hidden = None  # not needed again: memory falls as the replay goes back
    with torch.enable_grad():
        output = call_block(block, call, hidden)
        (gradient,) = torch.autograd.grad(output, [hidden], record.gradient.to(device))
    record.gradient = gradient.cpu()
