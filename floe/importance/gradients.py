"""Gradients of unit masks and adapters per sample, taken while one backward pass goes by.

A mask m = 1 on the input of a linear has the gradient ``sum_tokens activation * gradient``. So it
suffices to see each site's input and the gradient of that input; both are reduced on the spot and
let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from floe import ops
from floe.adapters.linear import MoELoRALinear, separate_base
from floe.adapters.targets import adapted_layers
from floe.data.batches import Collator, TokenRow
from floe.data.loss import evaluating, for_loss, losses, token_mask
from floe.decoder_blocks import base_of, find_blocks, geometry, linear_at
from floe.errors import require
from floe.importance.adapter_gradients import AdapterGradients, adapter_gradients
from floe.types import Batch, Floats, Integers

SCOPES = ("base", "full")
Sink = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class RowGradients:
    """S rows' gradients; L layers, H heads, I neurons, P projections; None where not asked.

    All float64: ``head`` [S, L, H] and ``neuron`` [S, L, I] d L_n / d m of row n, ``adapter``
    [S, L, P] its || d L_n / d phi ||^2, 0 where there is none, ``gate`` [S, L, P] d L_n / d g of a
    factor g = 1 on what an adapter adds. ``tokens`` [S] int64: labels in the loss.
    """

    head: Floats | None
    neuron: Floats | None
    adapter: Floats | None
    gate: Floats | None
    tokens: Integers


class Capture:
    """Context manager that turns batches into :class:`RowGradients`; one forward and backward each.

    The sum of the rows' mean NLLs is backpropagated, so no row's gradient depends on its batch.
    Within the context the model is in eval mode and frozen; on leaving, every flag and hook is as
    before. Gradient checkpointing keeps working: activations are kept through autograd.

    Args:
        model: causal language model, plain or a PeftModel with floe adapters.
        scope: "base" masks the input of the frozen weight alone (m * theta + phi, FLoE Eq. 2);
            "full" masks the input of the whole adapted projection.
        masks: capture mask gradients. adapters: capture adapter gradient norms.
        tokens: loss over "response" tokens (the batch's labels) or over "all" tokens.

    Raises:
        ValueError: an unknown option, or nothing to capture.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scope: str = "base",
        masks: bool = True,
        adapters: bool = False,
        tokens: str = "response",
    ) -> None:
        require(scope in SCOPES, f"scope must be one of {SCOPES}", scope)
        if not masks and not adapters:
            raise ValueError("masks or adapters must be True, got False for both")
        self.model, self.scope, self.masks, self.tokens = model, scope, masks, tokens
        self.blocks = find_blocks(model)
        self.head_width = geometry(model, self.blocks).head_dim
        self.modules = adapted_layers(model) if adapters else {}
        if adapters and not self.modules:
            raise ValueError("model must carry floe adapters to measure their gradients, got none")
        names = (name for modules in self.modules.values() for name in modules)
        self.projections = tuple(dict.fromkeys(names))
        self._mask = torch.empty(0, 0, dtype=torch.bool)
        self._gradients: dict[tuple[str, int], Tensor] = {}
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
        self._gradients.clear()
        self._adapter.clear()

    def run(
        self,
        rows: Sequence[TokenRow],
        groups: Sequence[Sequence[int]],
        announce: Callable[[int, int], None] | None = None,
    ) -> RowGradients:
        """Gradients of the rows of these numbers, one :meth:`step` a group, in the rows' order."""
        collate, parts = Collator.for_model(self.model), list[RowGradients]()
        for group in groups:
            parts.append(self.step(collate([rows[n] for n in group]), group))
            if announce is not None:
                announce(len(parts), len(groups))
        order = np.argsort([n for group in groups for n in group])

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else np.concatenate(values)[order]

        return RowGradients(*(joined(field.name) for field in fields(RowGradients)))

    def step(self, batch: Batch, numbers: Sequence[int] | None = None) -> RowGradients:
        """Gradients of one batch's rows; ``numbers`` names them in errors, None counts from 0.

        Raises:
            ValueError: a row without labels; a loss or gradient that is not finite, named by layer,
                unit and row.
        """
        numbers = range(len(batch["input_ids"])) if numbers is None else numbers
        self._mask = token_mask(batch)
        self._gradients.clear()
        self._adapter.clear()
        with torch.enable_grad():
            loss, tokens = losses(self.model, for_loss(batch, self.tokens), numbers)
            loss.sum().backward()
        masks = {kind: self._stacked(kind) for kind in ("neuron", "head") if self.masks}
        adapter, gate = self._of_adapters() if self.modules else (None, None)
        named = {
            "mask gradient of neuron": masks.get("neuron"),
            "mask gradient of head": masks.get("head"),
            "squared gradient of adapter": adapter,
            "gate gradient of adapter": gate,
        }
        self._check_finite(named, numbers)
        counts = tokens.cpu().numpy()
        return RowGradients(masks.get("head"), masks.get("neuron"), adapter, gate, counts)

    def _mask_hooks(self) -> Iterator[RemovableHandle]:
        for block in self.blocks if self.masks else []:
            sites = (("head", block.o_proj, self.head_width), ("neuron", block.down_proj, 1))
            for kind, path, width in sites:
                module = base_of(self.model).get_submodule(path)
                if self.scope == "base":
                    module = linear_at(self.model, path)
                sink = partial(self._take_mask, kind, block.index, width)
                yield module.register_forward_pre_hook(_tap_input(sink))

    def _adapter_hooks(self) -> Iterator[RemovableHandle]:
        for layer, modules in self.modules.items():
            for name, module in modules.items():
                sink = partial(self._take_adapter, layer, name, module)
                yield module.register_forward_hook(tap_output(sink))

    def _take_mask(
        self, kind: str, layer: int, width: int, activation: Tensor, gradient: Tensor
    ) -> None:
        mask = self._mask.to(gradient.device)
        values = ops.mask_gradients(activation, gradient, width, mask)
        self._gradients[kind, layer] = values.double()

    def _take_adapter(
        self, layer: int, name: str, module: MoELoRALinear, x: Tensor, grad_y: Tensor
    ) -> None:
        mask = self._mask.to(x.device)
        self._adapter[layer, name] = adapter_gradients(module, x, grad_y, mask)

    def _stacked(self, kind: str) -> Floats:
        missing = [b.index for b in self.blocks if (kind, b.index) not in self._gradients]
        if missing:
            raise RuntimeError(
                f"no gradient reached the {kind} masks of layers {missing}; the model's forward "
                "must call its projections as modules and keep its graph"
            )
        layers = [self._gradients.pop((kind, block.index)).cpu().numpy() for block in self.blocks]
        values: Floats = np.stack(layers, axis=1)
        return values

    def _of_adapters(self) -> tuple[Floats, Floats]:
        """Squared norms and gate gradients, [S, L, P] each; 0 where a layer has no adapter."""
        shape = (len(self._mask), len(self.blocks), len(self.projections))
        squared, gate = np.zeros(shape), np.zeros(shape)
        for layer, modules in self.modules.items():
            for name in modules:
                taken, place = self._adapter.pop((layer, name)), self.projections.index(name)
                squared[:, layer, place] = taken.squared_norm.cpu().numpy()
                gate[:, layer, place] = taken.gate.cpu().numpy()
        return squared, gate

    def _check_finite(self, named: Mapping[str, Floats | None], numbers: Sequence[int]) -> None:
        """Name the last layer's first bad value: gradients come from behind, so it arose there."""
        for layer in reversed(range(len(self.blocks))):
            for what, values in named.items():
                if values is not None and not np.isfinite(values[:, layer]).all():
                    row, unit = np.argwhere(~np.isfinite(values[:, layer]))[0].tolist()
                    raise ValueError(
                        f"{what} {unit} in layer {layer} must be finite, "
                        f"got {values[row, layer, unit]} for row {numbers[row]}"
                    )


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
