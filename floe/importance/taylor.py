"""First-order Taylor cost of heads and neurons on the base model (FLoE Eq. 4-5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from floe.blocks import Block, Geometry, find_blocks, geometry, linear_at
from floe.importance.capture import HEAD_UNITS, Capture
from floe.importance.fisher import Progress
from floe.importance.frozen import (
    Batch,
    base_only,
    device_of,
    for_loss,
    frozen,
    losses,
    on_device,
)
from floe.importance.replay import Call, CallRecorder, call_block, device_of_block, hidden_of

FloatArray = NDArray[np.float64]
KINDS = ("element", "vector")
AGGREGATES = ("abs_of_mean", "mean_of_abs")
_COLUMNS = ("o", "down")  # projections whose columns, not rows, belong to a unit


@dataclass(frozen=True, eq=False)
class Taylor:
    """Costs in nats, float64: ``head`` [L, H] (or KV groups) and ``neuron`` [L, I].

    ``kind`` and ``quantised`` say what was measured: with quantised base weights only "vector" is
    possible.
    """

    head: FloatArray
    neuron: FloatArray
    rows: int
    tokens: int
    kind: str
    quantised: bool


def measure_taylor(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    kind: str = "element",
    aggregate: str = "abs_of_mean",
    tokens: str = "all",
    head_unit: str = "head",
    progress: Progress | None = None,
) -> Taylor:
    """``T_u = sum over u's weights of |w dL/dw|`` on the base model, L the rows' mean loss.

    A neuron's weights are its gate and up rows and its down column; a head's its q rows, its o
    columns and an equal share of its key/value head's k and v rows. Weight gradients of one block
    exist at a time: blocks are replayed from last to first, each given the gradient of its output,
    and its gradients are summed in float32.

    Args:
        model: plain, or a PeftModel, whose adapters are then off.
        batches: dicts passed to the model; every block's input is kept for all of them, on the CPU.
        kind: "element" as above; "vector" = |sum of w g| over a unit, which is its mask gradient
            (chosen by itself when base weights are quantised and have no gradient).
        aggregate: "abs_of_mean" = |w * mean_n g_n|; "mean_of_abs" = mean of |w g| over batches
            weighted by their rows (element) or over rows (vector).
        tokens: loss over "all" tokens or the "response". head_unit: "head" or "kv_group".
        progress: called as progress(done, in all, "taylor").

    Raises:
        ValueError: an unknown option, no rows, or a value that is not finite.
    """
    for name, value, known in (
        ("kind", kind, KINDS),
        ("aggregate", aggregate, AGGREGATES),
        ("head_unit", head_unit, HEAD_UNITS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    batches = list(batches)
    if not batches:
        raise ValueError("batches must hold at least one row, got none")
    quantised = is_quantised(model)
    measure = _vector if kind == "vector" or quantised else _element
    result = measure(model, batches, aggregate, tokens, head_unit, quantised, progress)
    _check_finite(result)
    return result


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


def unit_costs(
    parts: dict[str, FloatArray], sizes: Geometry, head_unit: str = "head"
) -> tuple[FloatArray, FloatArray]:
    """Heads' and neurons' costs of one block, ([H], [I]) float64, from its projections' sums.

    Args:
        parts: per projection the sum of |w g| of each row (q, k, v or qkv; gate, up or gate_up) or
            column (o, down).
        sizes: the model's. head_unit: "kv_group" adds up the heads of a key/value head.
    """
    width, kv_width = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    parts = dict(parts)
    if "qkv" in parts:
        parts["q"], parts["k"], parts["v"] = np.split(parts["qkv"], [width, width + kv_width])
    if "gate_up" in parts:
        parts["gate"], parts["up"] = np.split(parts["gate_up"], 2)
    heads = {name: parts[name].reshape(-1, sizes.head_dim).sum(1) for name in ("q", "k", "v", "o")}
    group = sizes.heads // sizes.kv_heads
    shared = (
        np.repeat(heads["k"] + heads["v"], group) / group
    )  # every head of a group bears an equal share
    head = heads["q"] + heads["o"] + shared
    if head_unit == "kv_group":
        head = head.reshape(-1, group).sum(1)
    return head, parts["gate"] + parts["up"] + parts["down"]


def projection_cost(name: str, weight: Tensor, gradient: Tensor) -> Tensor:
    """``sum |w g|`` of every row of a projection, or every column of o and down; float64."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = (weight.detach().to(wide) * gradient.to(wide)).abs_()
    return product.sum(dim=0 if name in _COLUMNS else 1, dtype=torch.float64)


def _vector(
    model: nn.Module,
    batches: list[Batch],
    aggregate: str,
    tokens: str,
    head_unit: str,
    quantised: bool,
    progress: Progress | None,
) -> Taylor:
    """|mean over rows of the base model's mask gradients|, or the mean of their absolute values."""
    total: list[FloatArray] = []
    rows = labels = 0
    capture = Capture(model, head_unit=head_unit, tokens=tokens)
    with frozen(model), base_only(model), capture:
        for done, batch in enumerate(batches, 1):
            found = capture.step(batch)
            assert found.head is not None
            assert found.neuron is not None
            pair = [found.head, found.neuron]
            total = total or [np.zeros(v.shape[1:]) for v in pair]
            for sums, values in zip(total, pair, strict=True):
                for row in values:  # one after the other: independent of the batch size
                    sums += np.abs(row) if aggregate == "mean_of_abs" else row
            rows += len(found.tokens)
            labels += int(found.tokens.sum())
            if progress is not None:
                progress(done, len(batches), "taylor")
    head, neuron = (np.abs(sums) / rows for sums in total)
    return Taylor(head, neuron, rows, labels, "vector", quantised)


@dataclass
class BackwardRecord:
    """One batch on its way back: its calls, and the gradient of the next block's output."""

    calls: list[Call]
    gradient: Tensor
    rows: int
    tokens: int


def _element(
    model: nn.Module,
    batches: list[Batch],
    aggregate: str,
    tokens: str,
    head_unit: str,
    quantised: bool,
    progress: Progress | None,
) -> Taylor:
    blocks = find_blocks(model)
    sizes = geometry(model, blocks)
    heads = sizes.heads if head_unit == "head" else sizes.kv_heads
    head, neuron = np.zeros((sizes.layers, heads)), np.zeros((sizes.layers, sizes.neurons))
    steps = len(batches) + len(blocks)
    with frozen(model), base_only(model):
        records: list[BackwardRecord] = []
        for batch in batches:
            rows = sum(record.rows for record in records)
            records.append(record_backward(model, blocks, for_loss(batch, tokens), rows))
            if progress is not None:
                progress(len(records), steps, "taylor")
        rows = sum(record.rows for record in records)
        for block in reversed(blocks):
            parts = _block_costs(model, block, records, aggregate == "mean_of_abs")
            parts = {name: cost / rows for name, cost in parts.items()}
            head[block.index], neuron[block.index] = unit_costs(parts, sizes, head_unit)
            if progress is not None:
                progress(steps - block.index, steps, "taylor")
    labels = sum(record.tokens for record in records)
    return Taylor(head, neuron, rows, labels, "element", quantised)


def record_backward(
    model: nn.Module, blocks: list[Block], batch: Batch, first_row: int
) -> BackwardRecord:
    """One forward; only what follows the last block (norm, head, loss) is differentiated."""
    batch = on_device(batch, device_of(model))
    leaf: list[Tensor] = []

    def cut(_module: nn.Module, _args: object, output: object) -> object:
        leaf.append(hidden_of(output).detach().requires_grad_())
        return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

    hook = blocks[-1].module.register_forward_hook(cut)
    try:
        with CallRecorder(blocks) as recorder, torch.enable_grad():
            loss, tokens = losses(model, batch, first_row)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            return BackwardRecord(recorder.take(), gradient.cpu(), len(loss), int(tokens.sum()))
    finally:
        hook.remove()


def _block_costs(
    model: nn.Module, block: Block, records: list[BackwardRecord], absolute_per_batch: bool
) -> dict[str, FloatArray]:
    """Sums of |w g| per row or column of the block's projections, for the sum of row losses.

    Leaves in every record the gradient of the block's input, which is that of the block before's
    output.
    """
    paths = {**block.attention, "o": block.o_proj, **block.mlp, "down": block.down_proj}
    weights = {name: linear_at(model, path).weight for name, path in paths.items()}
    sums: dict[str, Tensor] = {}
    costs: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        cost = projection_cost(name, weights[name], gradient)
        costs[name] = costs[name] + cost if name in costs else cost

    with _trainable(weights.values()):
        for record in records:
            for name, gradient in _replayed(block, record, weights):
                if absolute_per_batch:
                    add(name, gradient)
                elif name in sums:
                    sums[name] += gradient
                else:
                    sums[name] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    for name in list(sums):
        add(name, sums.pop(name))
    return {name: cost.cpu().numpy() for name, cost in costs.items()}


def _replayed(
    block: Block, record: BackwardRecord, weights: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Gradients of the block's weights on one batch, by name, each let go once it has been used."""
    device = device_of_block(block)
    call = record.calls[block.index]
    assert call.hidden is not None
    hidden = call.hidden.to(device).requires_grad_()
    call.hidden = None  # not needed again: memory falls as the replay goes back
    with torch.enable_grad():
        output = call_block(block, call, hidden)
        inputs = [*weights.values(), hidden]
        gradients = list(torch.autograd.grad(output, inputs, record.gradient.to(device)))
    record.gradient = gradients.pop().cpu()
    for name in reversed(list(weights)):
        yield name, gradients.pop()


@contextmanager
def _trainable(parameters: Iterable[Tensor]) -> Iterator[None]:
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _check_finite(result: Taylor) -> None:
    for kind, values in (("head", result.head), ("neuron", result.neuron)):
        if not np.isfinite(values).all():
            layer, unit = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(
                f"Taylor cost of {kind} {unit} in layer {layer} must be finite, "
                f"got {values[layer, unit]}"
            )
