"""The adapted linear layer: a frozen one as child ``base_layer`` plus routed low-rank experts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from floe import ops
from floe.adapters.shared_input import SharedInput

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class MoELoRALinear(nn.Module, BaseTunerLayer):
    """One shared A, M experts B_i and a softmax router, beside a frozen linear (FLoE Eq. 1).

    Per adapter name: ``floe_shrink`` [r + M, K] holds A's rows, then the router's; ``floe_expand``
    [N, M, r] holds the experts. Both are drawn at :meth:`update_layer`: A and the router from
    U(-1/sqrt(K), 1/sqrt(K)), B zero. A router of zeros would leave all experts identical for ever.
    """

    adapter_layer_names = ("floe_shrink", "floe_expand")
    other_param_names = ("r", "num_experts", "scaling", "dropout", "backend", "share_input")

    # Types alone: nn.Module would claim a Tensor or a Module under each of these names.
    base_layer: nn.Linear
    in_features: int
    out_features: int
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]
    get_base_layer: Callable[[], nn.Linear]

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.num_experts: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.backend: dict[str, str] = {}
        self.share_input: dict[str, bool] = {}
        self.shared: SharedInput | None = None  # set by link_shared_inputs
        self.floe_shrink = nn.ParameterDict()
        self.floe_expand = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.calls_base = False  # set by separate_base
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    def update_layer(
        self,
        name: str,
        rank: int,
        num_experts: int,
        scaling: float,
        dropout: float,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        share_input: bool = True,
    ) -> None:
        """Add (or replace) adapter ``name``, drawn from ``generator``.

        The values are drawn on the CPU, so they do not depend on the base's device.
        """
        self.r[name], self.num_experts[name] = rank, num_experts
        self.scaling[name], self.dropout[name] = scaling, dropout
        self.backend[name], self.share_input[name] = backend, share_input
        bound = 1.0 / math.sqrt(self.in_features)
        meta = any(p.device.type == "meta" for p in self.base_layer.parameters())
        device = torch.device("meta" if meta else "cpu")
        shrink = torch.empty(rank + num_experts, self.in_features, device=device)
        if not meta:
            shrink.uniform_(-bound, bound, generator=generator)
        expand = torch.zeros(self.out_features, num_experts, rank, device=device, dtype=dtype)
        self.floe_shrink[name] = nn.Parameter(shrink.to(dtype))
        self.floe_expand[name] = nn.Parameter(expand)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus every active adapter's; [..., K] -> [..., N]."""
        active = self.active_names()
        fused = self._fused(x, active[0]) if active else None
        y: Tensor = self.base_layer(x, *args, **kwargs) if fused is None else fused
        if fused is not None:
            active = active[1:]
        for name in active:
            y = self._added(y, x, name)
        return y

    def active_names(self) -> list[str]:
        """Names of the adapters that take part in the forward."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.r]

    def readable_base(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias, where the op may read them itself: of a plain, frozen, unhooked linear.

        Every forward asks: what is read here is in dictionaries, past a module's slow look-ups.
        """
        base = self._modules["base_layer"]
        state = vars(base)
        if type(base) is not nn.Linear or self.calls_base or "_hf_hook" in state:
            return None
        if any(state[hooks] for hooks in _HOOKS):
            return None
        weight, bias = state["_parameters"].get("weight"), state["_parameters"].get("bias")
        if weight is None or weight.requires_grad or (bias is not None and bias.requires_grad):
            return None
        return weight, bias

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Follow the base layer's device; the adapter keeps its own dtype."""
        if device is None:
            device = next((p.device for p in self.base_layer.parameters()), torch.device("cpu"))
        for parameters in (self.floe_shrink, self.floe_expand):
            parameter = parameters[adapter_name]
            if (
                parameter.device != device
                and device.type != "meta"
                and parameter.device.type != "meta"
            ):
                parameter.data = parameter.data.to(device)

    def adapter(self, name: str) -> tuple[Tensor, Tensor]:
        """``floe_shrink`` and ``floe_expand`` of an adapter, past a module's slow look-ups."""
        modules: dict[str, Any] = self._modules
        return modules["floe_shrink"]._parameters[name], modules["floe_expand"]._parameters[name]

    def _fused(self, x: Tensor, name: str) -> Tensor | None:
        """Base and adapter in one op, or one for all that share x; None if the base is its own."""
        if self.shared is not None:
            ready = self.shared.output(self, x, name)
            if ready is not None:
                return ready
        base = self.readable_base()
        if base is None:
            return None
        return ops.moe_lora(x, *base, *self.adapter(name), **self.call_settings(x, name))

    def _added(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        return ops.moe_lora_add(y, x, *self.adapter(name), **self.call_settings(x, name))

    def call_settings(self, x: Tensor, name: str) -> dict[str, Any]:
        """Keyword arguments of the op for adapter ``name``, with a fresh dropout seed."""
        p = self.dropout[name] if self.training else 0.0
        seed = ops.draw_seed(x.device) if p > 0.0 else None
        return {
            "scaling": self.scaling[name],
            "dropout_p": p,
            "seed": seed,
            "backend": self.backend[name],
        }

    def router_weight(self, name: str) -> Tensor:
        """Rows of ``floe_shrink`` that are the router's, [M, K]."""
        shrink: Tensor = self.floe_shrink[name]
        return shrink[self.r[name] :]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the experts' weights depend on the token, so no single matrix equals them."""
        raise ValueError(
            "a routed adapter cannot be merged into the base weights: its experts' weights depend "
            "on the token; floe.export_lora writes the plain LoRA nearest to it and reports the "
            "error"
        )

    def __repr__(self) -> str:
        return f"floe.{super().__repr__()}"


def module_generator(seed: int, path: str) -> torch.Generator:
    """A generator that depends on the seed and the module's path alone.

    So a layer starts from the same adapter whichever other layers are adapted, in whatever order.
    """
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def separate_base(model: nn.Module) -> Iterator[None]:
    """Within it, every adapted layer calls its base layer as a module, then adds the adapter.

    Hooks on ``base_layer`` then fire, and its input's gradient is that of the frozen path alone.
    """
    layers = [m for m in model.modules() if isinstance(m, MoELoRALinear)]
    before = [layer.calls_base for layer in layers]
    for layer in layers:
        layer.calls_base = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.calls_base = value
