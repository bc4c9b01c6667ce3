"""Gradients of unit masks and adapters per sample, taken while one backward pass goes by.

A mask m = 1 on the input of a linear has the gradient ``sum_tokens activation * gradient``. So it
suffices to see each site's input and the gradient of that input; both are reduced on the spot and
let go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from floe import ops
from floe.adapters.linear import MoELoRALinear, separate_base
from floe.adapters.targets import adapted_layers
from floe.data.loss import evaluating, for_loss, losses, on_device, token_mask
from floe.decoder_blocks import Geometry, base_of, find_blocks, geometry, linear_at
from floe.importance.adapter_gradients import AdapterGradients, adapter_gradients
from floe.types import Batch, Floats, Integers

SCOPES = ("base", "full")
HEAD_UNITS = ("head", "kv_group")
Sink = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class RowGradients:
    """One batch's gradients; S rows, L layers, H heads (or KV groups), I neurons, P projections.

    ``head`` [S, L, H] and ``neuron`` [S, L, I] float64: d L_n / d m of row n, or with ``per_token``
    the sum of the tokens' squares. ``adapter`` [S, L, P] float64: || d L_n / d phi ||^2 of the
    adapter of projection p in layer k, 0 where there is none; ``gate`` [S, L, P] float64: d L_n / d
    g of a factor g = 1 on what that adapter adds. ``tokens`` [S] int64: labels in the loss.
    """

    head: Floats | None
    neuron: Floats | None
    adapter: Floats | None
    gate: Floats | None
    tokens: Integers


class Capture:
    """Context manager that turns batches into :class:`RowGradients`; one forward and backward each.

    The loss of row n is its mean NLL, and the sum of the rows' losses is backpropagated, so each
    row's gradient is its own whatever batch it came in. Within the context the model is in eval
    mode and wholly frozen; on leaving, every flag and hook is as before. Gradient checkpointing
    keeps working: activations are kept through autograd.

    Args:
        model: causal language model, plain or a PeftModel with floe adapters.
        scope: "base" masks the input of the frozen weight alone (m * theta + phi, FLoE Eq. 2);
            "full" masks the input of the whole adapted projection.
        head_unit: "head" = query heads; "kv_group" = the query heads that share one key/value head,
            together.
        masks: capture mask gradients. adapters: capture adapter gradient norms.
        per_token: square every token's own product instead of summing tokens first (a diagnostic).
        tokens: loss over "response" tokens (the batch's labels) or over "all" tokens.

    Raises:
        ValueError: an unknown option, or nothing to capture.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scope: str = "base",
        head_unit: str = "head",
        masks: bool = True,
        adapters: bool = False,
        per_token: bool = False,
        tokens: str = "response",
    ) -> None:
        for name, value, known in (("scope", scope, SCOPES), ("head_unit", head_unit, HEAD_UNITS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if not masks and not adapters:
            raise ValueError("masks or adapters must be True, got False for both")
        self.model, self.scope, self.head_unit = model, scope, head_unit
        self.masks, self.adapters = masks, adapters
        self.per_token, self.tokens = per_token, tokens
        self.blocks = find_blocks(model)
        self.geometry = geometry(model, self.blocks)
        self.modules = adapted_layers(model) if adapters else {}
        if adapters and not self.modules:
            raise ValueError("model must carry floe adapters to measure their gradients, got none")
        self.projections = projections(self.modules)
        self._rows = 0
        self._mask = torch.empty(0, 0, dtype=torch.bool)
        self._found: dict[tuple[str, int], Tensor] = {}
        self._adapter: dict[tuple[int, str], AdapterGradients] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Capture:
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model, input_gradients=True))
            if self.scope == "base":
                stack.enter_context(separate_base(self.model))
            for hook in [*self._mask_hooks(), *self._adapter_hooks()]:
                stack.callback(hook.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._found.clear()
        self._adapter.clear()

    def step(self, batch: Batch, numbers: Sequence[int] | None = None) -> RowGradients:
        """Gradients of one batch's rows.

        ``numbers`` names the rows in errors; None counts on from the batch before.

        Raises:
            ValueError: a row without labels; a loss or gradient that is not finite, named by layer,
                unit and row.
        """
        batch = on_device(for_loss(batch, self.tokens), self.model)
        if numbers is None:
            numbers = range(self._rows, self._rows + len(batch["input_ids"]))
        self._mask = token_mask(batch)
        self._found.clear()
        self._adapter.clear()
        with torch.enable_grad():
            loss, tokens = losses(self.model, batch, numbers)
            loss.sum().backward()
        masks = {kind: self._stacked(kind) for kind in ("neuron", "head") if self.masks}
        found = {f"mask gradient of {kind}": values for kind, values in masks.items()}
        adapter = gate = None
        if self.adapters:
            adapter, gate = self._of_adapters()
            found |= {"squared gradient of adapter": adapter, "gate gradient of adapter": gate}
        self._check_finite(found, numbers)
        self._rows += len(loss)
        return RowGradients(
            masks.get("head"), masks.get("neuron"), adapter, gate, tokens.cpu().numpy()
        )

    def _mask_hooks(self) -> list[RemovableHandle]:
        if not self.masks:
            return []
        sizes = {"head": head_width(self.geometry, self.head_unit), "neuron": 1}
        hooks = []
        for block in self.blocks:
            for kind, path in (("head", block.o_proj), ("neuron", block.down_proj)):
                base = self.scope == "base"
                module = (
                    linear_at(self.model, path) if base else base_of(self.model).get_submodule(path)
                )
                sink = self._mask_sink(kind, block.index, sizes[kind])
                hooks.append(module.register_forward_pre_hook(_tap_input(sink)))
        return hooks

    def _adapter_hooks(self) -> list[RemovableHandle]:
        return [
            module.register_forward_hook(tap_output(self._adapter_sink(layer, name, module)))
            for layer, modules in self.modules.items()
            for name, module in modules.items()
        ]

    def _mask_sink(self, kind: str, layer: int, width: int) -> Sink:
        def sink(activation: Tensor, gradient: Tensor) -> None:
            mask = self._mask.to(gradient.device)
            if not self.per_token:
                values = ops.mask_gradients(activation, gradient, width, mask)
                self._found[kind, layer] = values.double()
                return
            each = [
                t.flatten(0, 1)[:, None] for t in (activation, gradient, mask)
            ]  # a token as a sample
            values = ops.mask_gradients(each[0], each[1], width, each[2]).double()
            self._found[kind, layer] = values.square().unflatten(0, mask.shape).sum(1)

        return sink

    def _adapter_sink(self, layer: int, name: str, module: MoELoRALinear) -> Sink:
        def sink(x: Tensor, grad_y: Tensor) -> None:
            mask = self._mask.to(x.device)
            self._adapter[layer, name] = adapter_gradients(module, x, grad_y, mask)

        return sink

    def _stacked(self, kind: str) -> Floats:
        missing = [block.index for block in self.blocks if (kind, block.index) not in self._found]
        if missing:
            raise RuntimeError(
                f"no gradient reached the {kind} masks of layers {missing}; the model's forward "
                "must call its projections as modules and keep its graph"
            )
        layers = [self._found.pop((kind, block.index)).cpu().numpy() for block in self.blocks]
        values: Floats = np.stack(layers, axis=1)
        return values

    def _of_adapters(self) -> tuple[Floats, Floats]:
        """Squared norms and gate gradients, [S, L, P] each; 0 where a layer has no adapter."""
        shape = (len(self._mask), len(self.blocks), len(self.projections))
        squared, gate = np.zeros(shape), np.zeros(shape)
        for layer, modules in self.modules.items():
            for name in modules:
                found, place = self._adapter.pop((layer, name)), self.projections.index(name)
                squared[:, layer, place] = found.squared_norm.cpu().numpy()
                gate[:, layer, place] = found.gate.cpu().numpy()
        return squared, gate

    def _check_finite(self, found: dict[str, Floats], numbers: Sequence[int]) -> None:
        """Name the last layer's first bad value: gradients come from behind, so it arose there."""
        for layer in reversed(range(len(self.blocks))):
            for what, values in found.items():
                bad = np.argwhere(~np.isfinite(values[:, layer]))
                if len(bad):
                    row, unit = (int(i) for i in bad[0])
                    raise ValueError(
                        f"{what} {unit} in layer {layer} must be finite, "
                        f"got {values[row, layer, unit]} for row {numbers[row]}"
                    )


def projections(layers: Mapping[int, Mapping[str, MoELoRALinear]]) -> tuple[str, ...]:
    """Names of the adapted projections, P of them, in the order of the blocks."""
    return tuple(dict.fromkeys(name for modules in layers.values() for name in modules))


def head_width(sizes: Geometry, head_unit: str) -> int:
    """Channels of one attention unit in o_proj's input."""
    group = sizes.heads // sizes.kv_heads if head_unit == "kv_group" else 1
    return sizes.head_dim * group


class _Tap(torch.autograd.Function):
    """Identity that hands (saved, gradient) to a sink in the backward pass.

    ``saved`` is kept by autograd itself, so checkpointing recomputes it instead of holding on to
    it.
    """

    @staticmethod
    def forward(ctx: Any, through: Tensor, saved: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.sink = sink
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (saved,) = ctx.saved_tensors
        ctx.sink(saved, gradient)
        return gradient, None, None


def _tap_input(sink: Sink) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        return (_Tap.apply(x, x.detach(), sink), *args[1:])

    return hook


def tap_output(sink: Sink) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook; the sink gets the module's input and the gradient of its output."""

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        tapped: Tensor = _Tap.apply(output, args[0].detach(), sink)
        return tapped

    return hook
