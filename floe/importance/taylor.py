"""First-order Taylor cost of heads and neurons on the base model (FLoE Eq. 4-5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from floe.data.batches import Collator, TokenRow, fingerprint, rows_of
from floe.data.loss import base_only, evaluating, for_loss
from floe.decoder_blocks import Geometry, find_blocks, geometry, linear_at
from floe.importance.block_replay import record_backward
from floe.importance.chunk_store import Arrays, Workbook, chunks, passes
from floe.importance.fisher import added
from floe.importance.gradients import HEAD_UNITS, Capture, RowGradients
from floe.importance.weight_costs import block_costs
from floe.types import Batch, Floats, Progress

Announce = Callable[[int, int], None]
KINDS = ("element", "vector")
AGGREGATES = ("abs_of_mean", "mean_of_abs")


@dataclass(frozen=True, eq=False)
class Taylor:
    """Costs in nats, float64: ``head`` [L, H] (or KV groups) and ``neuron`` [L, I].

    ``kind`` and ``quantised`` say what was measured: with quantised base weights only "vector" is
    possible.
    """

    head: Floats
    neuron: Floats
    rows: int
    tokens: int
    kind: str
    quantised: bool


def measure_taylor(
    model: nn.Module,
    batches: Iterable[Batch | TokenRow],
    *,
    kind: str = "element",
    aggregate: str = "abs_of_mean",
    tokens: str = "all",
    head_unit: str = "head",
    progress: Progress | None = None,
) -> Taylor:
    """``T_u = sum over u's weights of |w dL/dw|`` on the base model, L the rows' mean loss.

    A neuron's weights are its gate and up rows and its down column; a head's its q rows, its o
    columns and an equal share of its key/value head's k and v rows. Blocks are replayed from last
    to first, each given the gradient of its output, and |w g| is reduced from the inputs and output
    gradients of its projections in float32 (floe.importance.weight_costs): at most one block's
    weight gradients exist at a time, none where the rows take less room.

    Args:
        model: plain, or a PeftModel, whose adapters are then off.
        batches: dicts passed to the model; every block's input is kept for all of them, on the CPU.
        kind: "element" as above; "vector" = |sum of w g| over a unit, which is its mask gradient
            (chosen by itself when base weights are quantised and have no gradient).
        aggregate: "abs_of_mean" = |w * mean_n g_n|; "mean_of_abs" = the mean over rows of |w g_n|.
        tokens: loss over "all" tokens or the "response". head_unit: "head" or "kv_group".
        progress: called as progress(done, in all, "taylor").

    Raises:
        ValueError: an unknown option, no rows, or a value that is not finite.
    """
    plan = TaylorPlan(model, rows_of(batches), kind, aggregate, tokens, head_unit)
    book = Workbook(None, {})
    plan.work(book, progress)
    return plan.result(book)


@dataclass(frozen=True)
class TaylorPlan:
    """What ``measure_taylor`` was asked for; one piece of work, done by the last worker."""

    model: nn.Module
    rows: Sequence[TokenRow]
    kind: str = "element"
    aggregate: str = "abs_of_mean"
    tokens: str = "all"
    head_unit: str = "head"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("aggregate", self.aggregate, AGGREGATES),
            ("head_unit", self.head_unit, HEAD_UNITS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers, the model aside."""
        options = {k: v for k, v in vars(self).items() if k not in ("model", "rows")}
        return options | {"data": fingerprint(self.rows)}

    def batch(self, group: Sequence[int]) -> Batch:
        """One batch of the rows of these numbers."""
        collate = Collator.for_model(self.model)
        return collate([self.rows[n] for n in group])

    def work(self, book: Workbook, progress: Progress | None) -> None:
        """Measure, if this worker is the one to do it."""

        def announce(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total, "taylor")

        def build(_place: int) -> Arrays:
            groups = [g for chunk in chunks(self.rows) for g in passes(self.rows, chunk)]
            measure = _vector if self._kind() == "vector" else _element
            head, neuron, tokens = measure(self, groups, announce)
            _check_finite(head, neuron)
            return {"head": head, "neuron": neuron, "tokens": np.array(tokens)}

        book.work(["taylor"], build, first_worker=book.count - 1)

    def result(self, book: Workbook) -> Taylor:
        """The finished measurement."""
        found = book.take("taylor")
        return Taylor(
            found["head"], found["neuron"], len(self.rows), int(found["tokens"]),
            self._kind(), is_quantised(self.model),
        )  # fmt: skip

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


def unit_costs(
    parts: dict[str, Floats], sizes: Geometry, head_unit: str = "head"
) -> tuple[Floats, Floats]:
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


def _vector(plan: TaylorPlan, groups: list[list[int]], announce: Announce) -> tuple[Any, ...]:
    """|mean over rows of the base model's mask gradients|, or the mean of their absolute values."""
    found: list[RowGradients] = []
    capture = Capture(plan.model, head_unit=plan.head_unit, tokens=plan.tokens)
    with evaluating(plan.model), base_only(plan.model), capture:
        for group in groups:
            found.append(capture.step(plan.batch(group), group))
            announce(len(found), len(groups))
    order = np.argsort([n for group in groups for n in group])
    pair = []
    for parts in ([part.head for part in found], [part.neuron for part in found]):
        rows = np.concatenate([part for part in parts if part is not None])[order]
        rows = np.abs(rows) if plan.aggregate == "mean_of_abs" else rows
        pair.append(np.abs(added(rows)) / len(rows))
    return *pair, int(sum(part.tokens.sum() for part in found))


def _element(plan: TaylorPlan, groups: list[list[int]], announce: Announce) -> tuple[Any, ...]:
    model, blocks = plan.model, find_blocks(plan.model)
    sizes = geometry(model, blocks)
    heads = sizes.heads if plan.head_unit == "head" else sizes.kv_heads
    head, neuron = np.zeros((sizes.layers, heads)), np.zeros((sizes.layers, sizes.neurons))
    steps = len(groups) + len(blocks)
    with evaluating(model), base_only(model):
        records = []
        for group in groups:
            batch = for_loss(plan.batch(group), plan.tokens)
            records.append(record_backward(model, blocks, batch, group))
            announce(len(records), steps)
        for block in reversed(blocks):
            parts = block_costs(model, block, records, plan.aggregate == "mean_of_abs")
            parts = {name: cost / len(plan.rows) for name, cost in parts.items()}
            head[block.index], neuron[block.index] = unit_costs(parts, sizes, plan.head_unit)
            announce(steps - block.index, steps)
    return head, neuron, sum(record.tokens for record in records)


def _check_finite(head: Floats, neuron: Floats) -> None:
    for kind, values in (("head", head), ("neuron", neuron)):
        if not np.isfinite(values).all():
            layer, unit = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(
                f"Taylor cost of {kind} {unit} in layer {layer} must be finite, "
                f"got {values[layer, unit]}"
            )
