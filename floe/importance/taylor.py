"""First-order Taylor cost of heads and neurons on the base model (FLoE Eq. 4-5).

The gradient of a projection's weight is ``dY^T X``, a product of what the backward pass holds
already. Where the inputs and output gradients of all rows are smaller than the product they are
kept, and |W * dY^T X| is reduced tile by tile, the product never being stored; else the product of
one projection is accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from floe.data.batches import Collator, TokenRow, fingerprint
from floe.data.loss import base_only, evaluating, for_loss
from floe.decoder_blocks import Block, Geometry, find_blocks, geometry, linear_at
from floe.errors import require
from floe.importance.adapter_gradients import wide
from floe.importance.block_replay import BackwardRecord, record_backward, replay_backward
from floe.importance.chunk_store import Arrays, Workbook, chunks, passes
from floe.importance.fisher import added
from floe.importance.gradients import Capture, tap_output
from floe.types import Floats, Progress

KINDS = ("element", "vector")
AGGREGATES = ("abs_of_mean", "mean_of_abs")
TILE_ROWS = 256
_COLUMNS = ("o", "down")  # projections whose columns, not rows, belong to a unit


@dataclass(frozen=True, eq=False)
class Taylor:
    """Costs in nats, float64: ``head`` [L, H] and ``neuron`` [L, I].

    ``kind`` and ``quantised`` say what was measured: with quantised base weights only "vector" is
    possible.
    """

    head: Floats
    neuron: Floats
    rows: int
    tokens: int
    kind: str
    quantised: bool


@dataclass(frozen=True)
class TaylorPlan:
    """``T_u = sum over u's weights of |w dL/dw|`` on the base model, L the rows' mean loss.

    A neuron's weights are its gate and up rows and its down column; a head's its q rows, its o
    columns and an equal share of its key/value head's k and v rows. Blocks are replayed from last
    to first, each given the gradient of its output: at most one block's weight gradients exist at a
    time, none where the rows take less room. Every block's input is kept for all rows, on the CPU.
    A PeftModel's adapters are off. One piece of work, done by the last worker.

    Attributes:
        kind: "element" sums |w g| over a unit's weights; "vector" = |sum of w g| over a unit, which
            is its mask gradient (chosen by itself when base weights are quantised and have no
            gradient).
        aggregate: "abs_of_mean" = |w * mean_n g_n|; "mean_of_abs" = the mean over rows of |w g_n|.
        tokens: loss over "all" tokens or the "response".
    """

    model: nn.Module
    rows: Sequence[TokenRow]
    kind: str = "element"
    aggregate: str = "abs_of_mean"
    tokens: str = "all"

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"kind must be one of {KINDS}", self.kind)
        rule = f"aggregate must be one of {AGGREGATES}"
        require(self.aggregate in AGGREGATES, rule, self.aggregate)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers, the model aside."""
        options = {k: v for k, v in vars(self).items() if k not in ("model", "rows")}
        return options | {"data": fingerprint(self.rows)}

    def work(self, book: Workbook, progress: Progress | None) -> None:
        """Measure, if this worker is the one to do it; ValueError for a cost that is not finite."""

        def announce(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total, "taylor")

        def build(_place: int) -> Arrays:
            groups = [g for chunk in chunks(self.rows) for g in passes(self.rows, chunk)]
            measure = _vector if self._kind() == "vector" else _element
            head, neuron, tokens = measure(self, groups, announce)
            for kind, values in (("head", head), ("neuron", neuron)):
                if not np.isfinite(values).all():
                    layer, unit = np.argwhere(~np.isfinite(values))[0].tolist()
                    raise ValueError(
                        f"Taylor cost of {kind} {unit} in layer {layer} must be finite, "
                        f"got {values[layer, unit]}"
                    )
            return {"head": head, "neuron": neuron, "tokens": np.array(tokens)}

        book.work(["taylor"], build, first_worker=book.count - 1)

    def result(self, book: Workbook) -> Taylor:
        """The finished measurement."""
        arrays, quantised = book.take("taylor"), is_quantised(self.model)
        head, neuron, tokens = arrays["head"], arrays["neuron"], int(arrays["tokens"])
        return Taylor(head, neuron, len(self.rows), tokens, self._kind(), quantised)

    def _kind(self) -> str:
        return "vector" if is_quantised(self.model) else self.kind


def is_quantised(model: nn.Module) -> bool:
    """True when a projection's weight is no plain floating-point matrix, so has no gradient."""
    for block in find_blocks(model):
        for path in block.linears.values():
            weight: Any = getattr(linear_at(model, path), "weight", None)
            if not isinstance(weight, Tensor) or type(weight.data) is not Tensor:
                return True
            if not weight.is_floating_point() or weight.dim() != 2:
                return True
    return False


_Costs = tuple[Floats, Floats, int]  # heads', neurons', how many tokens the loss had
_Announce = Callable[[int, int], None]


def _vector(plan: TaylorPlan, groups: list[list[int]], announce: _Announce) -> _Costs:
    """|mean over rows of the base model's mask gradients|, or the mean of their absolute values."""
    capture = Capture(plan.model, tokens=plan.tokens)
    with evaluating(plan.model), base_only(plan.model), capture:
        gradients = capture.run(plan.rows, groups, announce)
    costs = []
    for rows in (gradients.head, gradients.neuron):
        assert rows is not None
        rows = np.abs(rows) if plan.aggregate == "mean_of_abs" else rows
        costs.append(np.abs(added(rows)) / len(rows))
    return costs[0], costs[1], int(gradients.tokens.sum())


def _element(plan: TaylorPlan, groups: list[list[int]], announce: _Announce) -> _Costs:
    model, blocks = plan.model, find_blocks(plan.model)
    sizes, collate = geometry(model, blocks), Collator.for_model(model)
    head, neuron = np.zeros((sizes.layers, sizes.heads)), np.zeros((sizes.layers, sizes.neurons))
    steps = len(groups) + len(blocks)
    with evaluating(model), base_only(model):
        records = []
        for group in groups:
            batch = for_loss(collate([plan.rows[n] for n in group]), plan.tokens)
            records.append(record_backward(model, blocks, batch, group))
            announce(len(records), steps)
        for block in reversed(blocks):
            parts = _block_costs(model, block, records, plan.aggregate == "mean_of_abs")
            parts = {name: cost / len(plan.rows) for name, cost in parts.items()}
            head[block.index], neuron[block.index] = unit_costs(parts, sizes)
            announce(steps - block.index, steps)
    return head, neuron, sum(record.tokens for record in records)


def unit_costs(parts: dict[str, Floats], sizes: Geometry) -> tuple[Floats, Floats]:
    """Heads' and neurons' costs of one block, ([H], [I]) float64, from its projections' sums.

    ``parts`` holds per projection the sum of |w g| of each row (q, k, v or qkv; gate, up or
    gate_up) or column (o, down).
    """
    width, kv_width = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    parts = dict(parts)
    if "qkv" in parts:
        parts["q"], parts["k"], parts["v"] = np.split(parts["qkv"], [width, width + kv_width])
    if "gate_up" in parts:
        parts["gate"], parts["up"] = np.split(parts["gate_up"], 2)
    heads = {name: parts[name].reshape(-1, sizes.head_dim).sum(1) for name in ("q", "k", "v", "o")}
    group = sizes.heads // sizes.kv_heads
    # Every head of a group bears an equal share of what they have in common.
    head = heads["q"] + heads["o"] + np.repeat(heads["k"] + heads["v"], group) / group
    return head, parts["gate"] + parts["up"] + parts["down"]


def _block_costs(
    model: nn.Module, block: Block, records: Iterable[BackwardRecord], per_row: bool
) -> dict[str, Floats]:
    """``sum |w g|`` per row of the block's q, k, v (or qkv), gate, up; per column of o and down.

    ``g`` is the gradient of the sum of the row losses.
    """
    paths = {**block.attention, "o": block.o_proj, **block.mlp, "down": block.down_proj}
    linears = {name: linear_at(model, path) for name, path in paths.items()}
    costs = {n: WeightCost(lin.weight, n in _COLUMNS, per_row) for n, lin in linears.items()}
    for record in records:
        with ExitStack() as hooks:
            for name, linear in linears.items():
                sink = _sink(costs[name], record.real)
                hooks.callback(linear.register_forward_hook(tap_output(sink)).remove)
            replay_backward(block, record)
    return {name: cost.cost().cpu().numpy() for name, cost in costs.items()}


def _sink(cost: WeightCost, real: Tensor) -> Callable[[Tensor, Tensor], None]:
    """Hands on the real tokens, all at once or row by row."""

    def sink(x: Tensor, grad_y: Tensor) -> None:
        rows, tokens = real.to(x.device).nonzero(as_tuple=True)
        parts = [rows == row for row in range(len(real))] if cost.per_row else [slice(None)]
        for part in parts:
            cost.add(x[rows[part], tokens[part]], grad_y[rows[part], tokens[part]])

    return sink


@dataclass
class WeightCost:
    """``sum |w g|`` of each row of one projection's weight [N, K], or of each column.

    Rows arrive as pairs of inputs [n, K] and output gradients [n, N] whose gradient is their
    product, and are kept while that takes less room than the product does. ``per_row``: mean of
    every calibration row's |w g| instead of |w * sum of g|: rows are then reduced as they arrive.
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
            self._product = grad_y.new_zeros(self.weight.shape, dtype=wide(x))
        self._product.addmm_(grad_y.to(wide(x)).T, x.to(wide(x)))
        self._inputs.clear()
        self._gradients.clear()

    def _reduce(self, x: Tensor, grad_y: Tensor) -> None:
        """Add |W * grad_y^T x|, a tile of rows at a time."""
        x = x.to(wide(x))
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
