"""The adapted linear layer: a frozen one as child ``base_layer`` plus routed low-rank experts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from floe import ops
from floe.adapters.shared_input import Part, SharedInput


@dataclass
class AdapterSettings:
    """What one adapter of one layer computes, and how; ``scaling`` multiplies its output."""

    rank: int
    num_experts: int
    scaling: float
    dropout: float = 0.0
    backend: str = "auto"
    share_input: bool = True
    top_k: int = 0
    temperature: float = 1.0
    shared_a: bool = True

    def function(self) -> tuple[Any, ...]:
        """Of the settings those that decide what a trained adapter computes."""
        router = self.top_k, self.temperature, self.shared_a
        return self.rank, self.num_experts, self.scaling, *router

    @property
    def hidden_size(self) -> int:
        """Rows of A: r, or M r where every expert has its own."""
        return self.rank * (1 if self.shared_a else self.num_experts)

    def shapes(self, linear: nn.Linear) -> dict[str, tuple[int, ...]]:
        """Those of the adapter's tensors beside this linear, [K] to [N] features, by name."""
        return {
            "floe_shrink": (self.hidden_size + self.num_experts, linear.in_features),
            "floe_expand": (linear.out_features, self.num_experts, self.rank),
        }


class AdapterWeight(nn.Module):
    """One tensor of one adapter, as a module: what wraps modules can wrap it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """A copy: what a wrapper gathers for a call is gone after it."""
        return self.weight.clone()


class MoELoRALinear(nn.Module, BaseTunerLayer):
    """One shared A, M experts B_i and a softmax router, beside a frozen linear (FLoE Eq. 1).

    Per adapter name: ``floe_shrink[name].weight`` [r + M, K] holds A's rows, then the router's
    ([M r + M, K] where every expert has an A of its own);
    ``floe_expand[name].weight`` [N, M, r] holds the experts; ``settings[name]`` says the rest.
    """

    adapter_layer_names = ("floe_shrink", "floe_expand")
    other_param_names = ("settings",)

    # Annotations only; assigning would register them.
    base_layer: nn.Linear
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]
    get_base_layer: Callable[[], nn.Linear]

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.settings: dict[str, AdapterSettings] = {}
        self.floe_shrink = nn.ModuleDict()
        self.floe_expand = nn.ModuleDict()
        self.shared: SharedInput | None = None  # set by link_shared_inputs
        self.calls_base = False  # set by separate_base
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(
        self,
        name: str,
        settings: AdapterSettings,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Add (or replace) adapter ``name`` on ``device``, or where the base layer is."""
        self.settings[name] = settings
        for kind, shape in settings.shapes(self.base_layer).items():
            weight = torch.empty(shape, dtype=dtype, device=device or self._base_device())
            getattr(self, kind)[name] = AdapterWeight(weight)
        self.draw(name, generator)
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def draw(self, name: str, generator: torch.Generator) -> None:
        """Fresh values: A and the router from U(-1/sqrt(K), 1/sqrt(K)), B zero.

        A router of zeros would leave all experts identical for ever. The values are drawn on the
        CPU in float32, so they depend on neither device nor dtype.
        """
        shrink, expand = self.weights(name)
        if not shrink.is_meta:
            bound = 1.0 / math.sqrt(self.in_features)
            shrink.copy_(torch.empty(shrink.shape).uniform_(-bound, bound, generator=generator))
            expand.zero_()

    def forward(
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """Base output plus every active adapter's; [..., K] -> [..., N].

        ``adapter_names`` name an adapter for each row of x, or none ("__base__"), as in PEFT's
        mixed batches: a row gets that one alone.
        """
        if adapter_names is not None:
            return self._mixed(self.base_layer(x, *args, **kwargs), x, adapter_names)
        names = self.active_names()
        y: Tensor | None = None
        if names and self.shared is not None:  # one op for all linears of this input
            y = self.shared.output(self, x, names[0])
        if names and y is None and (base := self.readable_base()) is not None:
            settings = self.call_settings(x, names[0])
            y = ops.moe_lora(x, *base, *self.adapter(names[0]), **settings)
        if y is None:
            y = self.base_layer(x, *args, **kwargs)
        else:  # the base and the first adapter are in it
            names = names[1:]
        for name in names:
            y = ops.moe_lora_add(y, x, *self.adapter(name), **self.call_settings(x, name))
        return y

    def active_names(self) -> list[str]:
        """Names of the adapters that take part in the forward."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.settings]

    def readable_base(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias, where the op may read them itself: of a plain, frozen, unhooked linear.

        Hot path: reads ``__dict__`` directly, because ``nn.Module.__getattr__`` is slow.
        """
        base = self._modules["base_layer"]
        if self.calls_base or not _is_plain(base, nn.Linear):
            return None
        parameters = vars(base)["_parameters"]
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if type(weight) is not nn.Parameter or weight.requires_grad:
            return None  # sharded or quantised as a tensor subclass, or trained
        if bias is not None and (type(bias) is not nn.Parameter or bias.requires_grad):
            return None
        return weight, bias

    def _base_device(self) -> torch.device:
        return next((p.device for p in self.base_layer.parameters()), torch.device("cpu"))

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Follow the base layer's device; unlike PEFT's, the adapter keeps its own dtype."""
        device = device or self._base_device()
        for weight in self.weights(adapter_name):
            if "meta" not in (weight.device.type, device.type):
                weight.data = weight.data.to(device)

    def adapter(self, name: str) -> tuple[Tensor, Tensor]:
        """The values of ``floe_shrink`` and ``floe_expand`` of an adapter."""
        shrink, expand = self._leaves(name)
        return _value(shrink), _value(expand)

    def weights(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters ``floe_shrink`` and ``floe_expand`` of an adapter."""
        shrink, expand = self._leaves(name)
        return shrink.weight, expand.weight

    def _leaves(self, name: str) -> tuple[Any, Any]:
        modules: Any = self._modules  # hot path, as readable_base
        return modules["floe_shrink"]._modules[name], modules["floe_expand"]._modules[name]

    def tensors(self, name: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor] | None:
        """Weight, bias, shrink and expand where all may be read themselves: nothing wraps them.

        What a wrapper gathers is there only while its own module runs.
        """
        base, leaves = self.readable_base(), self._leaves(name)
        if base is None or not all(_is_plain(leaf, AdapterWeight) for leaf in leaves):
            return None
        shrink, expand = (leaf._parameters.get("weight") for leaf in leaves)
        if type(shrink) is not nn.Parameter or type(expand) is not nn.Parameter:
            return None
        return *base, shrink, expand

    def part(self, name: str) -> Part | None:
        """What the layer brings to one op of all that share its input; None if it runs alone."""
        settings, tensors = self.settings[name], self.tensors(name)
        if tensors is None or not settings.share_input or self.active_names() != [name]:
            return None
        traced = torch.compiler.is_compiling()  # it knows no inference mode
        if not traced and any(t is not None and t.is_inference() for t in tensors):
            return None
        _, _, shrink, expand = tensors
        return Part((settings, shrink.dtype, shrink.device, expand.dtype, self.training), tensors)

    def _mixed(self, y: Tensor, x: Tensor, names: list[str]) -> Tensor:
        if len(names) != len(x):
            raise ValueError(
                f"adapter_names must hold one name for each of the input's {len(x)} rows, "
                f"got {len(names)}"
            )
        known = set() if self.disable_adapters else self.settings.keys() & set(names)
        for name in sorted(known):
            places = [place for place, other in enumerate(names) if other == name]
            rows = torch.tensor(places, device=x.device)
            settings = self.call_settings(x, name)
            added = ops.moe_lora_add(y[rows], x[rows], *self.adapter(name), **settings)
            y = y.index_copy(0, rows, added)
        return y

    def call_settings(self, x: Tensor, name: str) -> dict[str, Any]:
        """Keyword arguments of the op for adapter ``name``, with a fresh dropout seed."""
        settings = self.settings[name]
        p = settings.dropout if self.training else 0.0
        seed = ops.draw_seed(x.device) if p > 0.0 else None
        return {
            "scaling": settings.scaling,
            "dropout_p": p,
            "seed": seed,
            "backend": settings.backend,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
        }

    def router_weight(self, name: str) -> Tensor:
        """Rows of ``floe_shrink`` that are the router's, [M, K]."""
        return self.adapter(name)[0][self.settings[name].hidden_size :]

    def gates(self, name: str, x: Tensor) -> Tensor:
        """The experts' weights for inputs x [T, K], float32 [T, M]; each row adds up to 1."""
        settings, router = self.settings[name], self.router_weight(name).float()
        return ops.gate(x.float(), router, None, settings.temperature, settings.top_k)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the experts' weights depend on the token, so no single matrix equals them."""
        raise ValueError(
            "a routed adapter cannot be merged into the base weights: its experts' weights depend "
            "on the token; floe.export_lora writes the plain LoRA nearest to it and reports the "
            "error"
        )

    def __repr__(self) -> str:
        return f"floe.{super().__repr__()}"


def _is_plain(module: Any, kind: type) -> bool:
    """Whether a call of ``module`` is ``kind``'s forward and nothing else."""
    if type(module) is not kind:
        return False
    state = module.__dict__
    return not (
        "forward" in state  # replaced on the instance, as offloading hooks do, too
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


def _value(leaf: Any) -> Tensor:
    """Value of an :class:`AdapterWeight`, past a module's slow look-ups where nothing wraps it."""
    if not _is_plain(leaf, AdapterWeight):
        return leaf()  # type: ignore[no-any-return]
    value: Tensor | None = leaf._parameters.get("weight")
    # a replica of nn.DataParallel holds its tensors as attributes
    return leaf.weight if value is None else value  # type: ignore[no-any-return]


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
