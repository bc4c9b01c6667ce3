"""Real-valued masks by least squares, layer by layer (FLoE Eq. 16-21).

In order of layers, attention before FFN: the teacher is the unmasked adapted model on its own
stream, the student the masked one with the masks tuned so far. ``min || A m - b ||`` is solved
around m = 1, with ``b = x + l(x; 1) - x'`` less what the masks do not touch, and column u of A the
output of unit u on the student's input x'. (The paper prints b with the opposite sign, whose
solution is -m.) Masks act on the inputs of the frozen weights (base scope), so the student's
adapter output and the bias are what is subtracted. Where a norm follows the sublayer (Gemma 2 and
3), the norm's input is reconstructed, and ``x - x'``, which is outside the norm, is left out.
Attention gets an intercept that is fitted and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from floe.adapters.linear import MoELoRALinear, separate_base
from floe.artifacts.selection import Tuned
from floe.data.loss import evaluating, on_device, token_mask
from floe.decoder_blocks import Block, base_of, find_blocks, geometry, linear_at
from floe.errors import require
from floe.importance.adapter_gradients import adapter_output
from floe.importance.block_replay import Call, call_block, device_of_block, record_calls
from floe.importance.taylor import is_quantised
from floe.types import Batch, Floats, Integers, Progress

_BY_ROW = ("input_ids", "attention_mask", "position_ids", "labels")
_ADDITIVE = 0.05  # relative error below which a block counts as residual + attention + FFN


class NotTunable(ValueError):
    """The masks of this model cannot be tuned, for what it is; its layers can be chosen still."""


@dataclass(frozen=True, eq=False)
class TuningResult:
    """Tuned masks, [L, H] and [L, I] float64, and one record per solve.

    A record holds layer, component ("attention" or "ffn"), accepted, and residual_before and
    residual_after: ``|| A m - b ||`` over tokens and channels (Eq. 18) relative to the norm of the
    sublayer's unmasked output.
    """

    head_mask: Floats
    neuron_mask: Floats
    records: list[Tuned]


def tune_masks(
    model: nn.Module,
    batches: Iterable[Batch],
    head_mask: Floats,
    neuron_mask: Floats,
    *,
    ridge: float = 1e-3,
    bound: float = 10.0,
    max_tokens: int = 4096,
    progress: Progress | None = None,
) -> TuningResult:
    """Scale the retained units so that each masked sublayer comes closest to the unmasked one.

    Zeros stay zero; nothing of the model changes. See the module's text for what is solved.

    Args:
        model: plain or adapted causal language model with unquantised weights.
        batches: calibration rows; whole rows are used up to ``max_tokens`` real tokens (at least
            one row).
        head_mask, neuron_mask: [L, H] (or [L, KV groups]) and [L, I]; nonzero = retained. Kept
            times the scale.
        ridge: >= 0, times the mean of the Gram matrix's diagonal. bound: a scale beyond +-bound is
            rejected.
        progress: called as progress(layers done, layers, "tune").

    Raises:
        NotTunable: a ValueError; see check_tunable.
        TypeError, ValueError: a mask that is no array or of a wrong shape or value, an option out
            of range, or no rows.
    """
    require(0 <= ridge < float("inf"), "ridge must be a number >= 0", ridge)
    require(bound > 0, "bound must be > 0", bound)
    require(max_tokens >= 1, "max_tokens must be >= 1", max_tokens)
    blocks = find_blocks(model)
    head_mask, neuron_mask = _checked(model, head_mask, neuron_mask, blocks)
    _check_weights(model, blocks)
    records: list[Tuned] = []
    with evaluating(model), separate_base(model):
        streams = _streams(model, blocks, leading_rows(batches, max_tokens))
        for block in blocks:
            layer = _Layer(model, block, streams, head_mask[block.index], neuron_mask[block.index])
            layer.run_teacher()
            for component in ("attention", "ffn"):
                records.append(layer.tune(component, ridge, bound))
            layer.advance()
            if progress is not None:
                progress(block.index + 1, len(blocks), "tune")
    return TuningResult(head_mask, neuron_mask, records)


def check_tunable(model: nn.Module, batches: Iterable[Batch]) -> None:
    """See whether the masks of this model can be tuned, by one row's way through its blocks.

    Raises:
        NotTunable: weights that are quantised or not in memory, or a block whose output is not its
            input plus attention plus FFN (a residual multiplier, norms behind under other names).
    """
    blocks = find_blocks(model)
    _check_weights(model, blocks)
    sizes = geometry(model, blocks)
    masks = np.ones(sizes.heads), np.ones(sizes.neurons)
    with evaluating(model), separate_base(model):
        streams = _streams(model, blocks, leading_rows(batches, 1))
        for block in blocks:
            layer = _Layer(model, block, streams, *masks)
            layer.run_teacher()
            for stream, trace in zip(streams, layer.traces, strict=True):
                stream.teacher = trace.hidden


def _check_weights(model: nn.Module, blocks: list[Block]) -> None:
    if is_quantised(model):
        raise NotTunable("model must have floating-point weights to tune masks, got quantised ones")
    for block in blocks:
        for path in (block.o_proj, block.down_proj):
            if linear_at(model, path).weight.is_meta:
                raise NotTunable(f"model must be in memory to tune masks, got {path} elsewhere")


def leading_rows(batches: Iterable[Batch], max_tokens: int) -> list[Batch]:
    """The first rows that together hold at most ``max_tokens`` real tokens; at least one row."""
    taken: list[Batch] = []
    total = 0
    for batch in batches:
        counts = token_mask(batch).sum(1).cumsum(0) + total
        rows = int((counts <= max_tokens).sum()) or int(not taken)
        size = len(counts)
        if rows:
            taken.append({k: v[:rows] if k in _BY_ROW else v for k, v in batch.items()})
            total = int(counts[rows - 1])
        if rows < size:
            break
    if not taken:
        raise ValueError("batches must hold at least one row, got none")
    return taken


class UnitSystem:
    """Normal equations of ``min_m || A m - b ||`` where column u of A is the output of unit u.

    Unit u puts out ``x[:, u] W[:, u]^T`` from its ``width`` channels, flattened over tokens and
    output channels. Then ``A^T A = blocksum((x^T x) * (W^T W))`` and ``A^T b = blocksum(sum_t x *
    (b W))``: [tokens x channels, units] is never formed.

    Args:
        weight: [d, U * width], float32 or float64. width: channels per unit.
        intercept: add a column of ones to A, whose coefficient is fitted and dropped.
    """

    def __init__(self, weight: Tensor, width: int, intercept: bool = False) -> None:
        self.weight, self.width, self.intercept = weight, width, intercept
        channels = weight.shape[1]
        self._inputs = weight.new_zeros(channels, channels)
        self._products = weight.new_zeros(channels, dtype=torch.float64)
        self._sums = weight.new_zeros(channels, dtype=torch.float64)
        self._target_sum = self._target_squares = 0.0
        self._equations = 0
        self.gram = self.rhs = self.column_sums = weight.new_zeros(0, dtype=torch.float64)

    def add(self, inputs: Tensor, target: Tensor) -> None:
        """More equations: ``inputs`` [n, U * width] and outputs ``target`` [n, d]."""
        self._inputs.addmm_(inputs.T, inputs)
        self._products += (inputs * (target @ self.weight)).sum(0, dtype=torch.float64)
        self._sums += inputs.sum(0, dtype=torch.float64)
        self._target_sum += float(target.sum(dtype=torch.float64))
        self._target_squares += float(target.double().square().sum())
        self._equations += target.numel()

    def finish(self) -> UnitSystem:
        """Once all equations are in: float64 ``gram`` [U, U], ``rhs`` and ``column_sums`` [U]."""
        products = self._inputs.mul_(self.weight.T @ self.weight)
        del self._inputs  # as large as half the Gram matrix
        blocks = products.unflatten(1, (-1, self.width)).unflatten(0, (-1, self.width))
        self.gram = blocks.sum((1, 3), dtype=torch.float64)
        self.rhs = self._products.unflatten(0, (-1, self.width)).sum(1)
        sums = self._sums * self.weight.sum(0, dtype=torch.float64)
        self.column_sums = sums.unflatten(0, (-1, self.width)).sum(1)
        return self

    def residual(self, scale: Tensor) -> float:
        """``|| A scale - b ||`` without the intercept, which is not part of the model."""
        square = scale @ self.gram @ scale - 2 * (scale @ self.rhs) + self._target_squares
        return float(square.clamp_min(0).sqrt())

    def solve(self, ridge: float) -> Tensor:
        """Scales m around 1, float64 [U]; NaN when the system cannot be solved.

        ``m = 1 + (G + ridge mean(diag G) I)^-1 (r - G 1)``; the intercept is eliminated first and
        not damped.
        """
        gram, rhs = self.gram, self.rhs
        if self.intercept:
            gram = gram - torch.outer(self.column_sums, self.column_sums) / self._equations
            rhs = rhs - self.column_sums * (self._target_sum / self._equations)
        return solve_ridge(gram, rhs, ridge * float(self.gram.diagonal().mean()))


def solve_ridge(gram: Tensor, rhs: Tensor, damping: float) -> Tensor:
    """``1 + (G + damping I)^-1 (r - G 1)`` by Cholesky, float64 [U]; NaN where that is singular.

    The damping is added to ``gram`` and taken out again: a copy of 14,336 units is 1.5 GiB.
    """
    right, diagonal = rhs - gram.sum(1), gram.diagonal().clone()
    gram.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(gram)
    gram.diagonal().copy_(diagonal)
    if int(failed):
        return torch.full_like(right, float("nan"))
    return 1 + torch.cholesky_solve(right[:, None], factor)[:, 0]


@dataclass
class _Stream:
    """One batch on its way through the model, as the teacher and the student see it; [S, T, d]."""

    calls: list[Call]
    real: Tensor
    teacher: Tensor
    student: Tensor


@dataclass
class _Trace:
    """What passed o_proj ("attention") and down_proj ("ffn") in one call of a block."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))


class _Stop(Exception):
    """Leaves a block once the wanted input was seen."""


class _Layer:
    """One block's turn: the teacher's outputs, the student's masks, the step to the next."""

    def __init__(
        self,
        model: nn.Module,
        block: Block,
        streams: list[_Stream],
        head: Floats,
        neuron: Floats,
    ) -> None:
        self.block, self.streams = block, streams
        self.masks = {"attention": head, "ffn": neuron}  # views: tuning writes into the result
        paths = {"attention": block.o_proj, "ffn": block.down_proj}
        self.linears = {name: linear_at(model, path) for name, path in paths.items()}
        self.modules = {name: base_of(model).get_submodule(path) for name, path in paths.items()}
        self.normed = hasattr(block.module, "post_feedforward_layernorm")
        self.traces: list[_Trace] = []

    def run_teacher(self) -> None:
        """The unmasked block on the teacher's stream; a block without post-norms must add up."""
        for stream in self.streams:
            trace = self._call(stream, stream.teacher, masked=())
            total, real = trace.hidden, stream.real
            added = (trace.outputs["attention"] + trace.outputs["ffn"])[real].float()
            error = ((total - stream.teacher)[real].float() - added).norm()
            # a stream with huge entries rounds by more than a small sublayer adds
            allowed = _ADDITIVE * added.norm() + torch.finfo(total.dtype).eps * total[real].norm()
            if not self.normed and error > allowed:
                raise NotTunable(
                    f"block {self.block.path} must output its input plus o_proj's and down_proj's "
                    "outputs for its masks to be tuned, got something else"
                )
            self.traces.append(trace)

    def tune(self, component: str, ridge: float, bound: float) -> Tuned:
        """Solve one component's scales, write the tuned mask if acceptable, return the record."""
        mask = self.masks[component]
        kept = np.flatnonzero(mask)
        system = self._system(component, kept)
        before = self._relative(component, system.residual(torch.ones_like(system.rhs)))
        accepted, after = True, before
        if len(kept):
            scale = system.solve(ridge)
            accepted = bool((scale.abs() <= bound).all())  # NaN is not
            if accepted:
                mask[kept] *= scale.cpu().numpy()
                after = self._relative(component, system.residual(scale))
        return {
            "layer": self.block.index,
            "component": component,
            "accepted": accepted,
            "residual_before": before,
            "residual_after": after,
        }

    def advance(self) -> None:
        """Both streams past this block."""
        for stream, trace in zip(self.streams, self.traces, strict=True):
            student = self._call(stream, stream.student, masked=("attention", "ffn"))
            stream.teacher, stream.student = trace.hidden, student.hidden

    def _system(self, component: str, kept: Integers) -> UnitSystem:
        """The normal equations of the retained units over all streams."""
        linear, mask = self.linears[component], self.masks[component]
        width = linear.in_features // len(mask)
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        columns = (torch.as_tensor(kept)[:, None] * width + torch.arange(width)).flatten()
        columns = columns.to(linear.weight.device)
        weight = linear.weight[:, columns].to(wide)
        weight *= torch.as_tensor(np.repeat(mask[kept], width)).to(weight)
        system = UnitSystem(weight, width, intercept=component == "attention")
        before = () if component == "attention" else ("attention",)
        for stream, teacher in zip(self.streams, self.traces, strict=True):
            trace = self._call(stream, stream.student, masked=before, stop=component)
            inputs = trace.inputs[component][stream.real].to(wide)
            target = self._target(component, stream, teacher, trace)[stream.real].to(wide)
            if linear.bias is not None:
                target -= linear.bias.to(wide)
            module = self.modules[component]
            if isinstance(module, MoELoRALinear):
                target -= adapter_output(module, inputs)
            system.add(inputs[:, columns], target)
        return system.finish()

    def _relative(self, component: str, residual: float) -> float:
        """The residual over the norm of the unmasked output; as it is where that output is zero."""
        squares = [
            trace.outputs[component][stream.real].double().square().sum()
            for stream, trace in zip(self.streams, self.traces, strict=True)
        ]
        norm = float(torch.stack(squares).sum().sqrt())
        return residual / norm if norm > 0 else residual

    def _target(self, component: str, stream: _Stream, teacher: _Trace, student: _Trace) -> Tensor:
        """What the sublayer should put out, bias and adapter included."""
        if self.normed:  # the norm's input; streams differ outside the norm
            return teacher.outputs[component]
        if component == "attention":
            return stream.teacher + teacher.outputs[component] - stream.student
        return teacher.hidden - (stream.student + student.outputs["attention"])

    def _call(
        self, stream: _Stream, hidden: Tensor, masked: tuple[str, ...], stop: str | None = None
    ) -> _Trace:
        """The block on ``hidden`` with the masks of ``masked``, up to the input of ``stop``."""
        trace = _Trace()

        def enter(name: str, mask: Tensor | None, _module: nn.Module, args: tuple[Any, ...]) -> Any:
            trace.inputs[name] = args[0]
            if stop == name:
                raise _Stop
            return None if mask is None else (args[0] * mask, *args[1:])

        def leave(name: str, _module: nn.Module, _args: object, output: Tensor) -> None:
            trace.outputs[name] = output

        with suppress(_Stop), ExitStack() as hooks:
            for name, linear in self.linears.items():
                into, module = (
                    partial(enter, name, self._wide_mask(name, masked)),
                    self.modules[name],
                )
                hooks.callback(linear.register_forward_pre_hook(into).remove)
                hooks.callback(module.register_forward_hook(partial(leave, name)).remove)
            trace.hidden = call_block(self.block, stream.calls[self.block.index], hidden)
        return trace

    def _wide_mask(self, name: str, masked: tuple[str, ...]) -> Tensor | None:
        """The mask over the projection's input channels, in its dtype; None unless ``masked``."""
        linear, mask = self.linears[name], self.masks[name]
        channels = np.repeat(mask, linear.in_features // len(mask))
        return torch.as_tensor(channels).to(linear.weight) if name in masked else None


def _streams(model: nn.Module, blocks: list[Block], batches: list[Batch]) -> list[_Stream]:
    """Run the model once per batch to learn how its blocks are called."""
    streams, device = [], device_of_block(blocks[0])
    for batch in batches:
        calls, first = record_calls(model, blocks, batch)
        hidden, real = first.to(device), token_mask(on_device(batch, model))
        streams.append(_Stream(calls, real, hidden, hidden))
    return streams


def _checked(
    model: nn.Module, head_mask: Floats, neuron_mask: Floats, blocks: list[Block]
) -> tuple[Floats, Floats]:
    """Float64 copies of the masks, checked against the model's sizes."""
    sizes = geometry(model, blocks)
    result = []
    for name, mask, units in (
        ("head_mask", head_mask, {sizes.heads, sizes.kv_heads}),
        ("neuron_mask", neuron_mask, {sizes.neurons}),
    ):
        if not isinstance(mask, np.ndarray):
            raise TypeError(f"{name} must be a numpy array, got {type(mask).__name__}")
        if mask.ndim != 2 or len(mask) != sizes.layers or mask.shape[1] not in units:
            raise ValueError(f"{name} must be [{sizes.layers}, {sorted(units)}], got {mask.shape}")
        if not np.isfinite(mask).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
        result.append(mask.astype(np.float64, copy=True))
    return result[0], result[1]
