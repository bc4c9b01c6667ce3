"""Ways to adapt some layers of a decoder, all with the same numbers, one module tree each.

An arm's adapter is about as strong as the frozen weights it stands beside, so that whatever is
wrong with it shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import floe
from benchmarks import impls
from benchmarks.harness import WrongResult
from benchmarks.impls import SCALING
from benchmarks.models import share
from floe.adapters import adapted_modules
from floe.decoder_blocks import find_blocks, linear_at

FROZEN = "frozen"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Joined = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Setting:
    """Size of the adapter, and which projections of a block get one."""

    rank: int
    experts: int
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    targets: tuple[str, ...] = TARGETS


@dataclass(frozen=True)
class Site:
    """An adapted linear: its formula in `impls`, its parameters, how they join to the formula's.

    The formula's are shrink [r + M, K] and expand [N, M, r] (``routed``) or A and B (``lora``).
    """

    formula: str
    parameters: tuple[Tensor, ...]
    joined: Joined = tuple


@dataclass(frozen=True)
class Arm:
    """A model adapted in one way on ``layers``; ``sites`` by path in the base model."""

    name: str
    way: str
    layers: tuple[int, ...]
    model: nn.Module
    sites: dict[str, Site]

    @property
    def parameters(self) -> list[Tensor]:
        """What an optimiser trains."""
        return [value for site in self.sites.values() for value in site.parameters]


Way = Callable[[nn.Module, dict[str, int], Setting], tuple[nn.Module, dict[str, Site]]]


def build(name: str, way: str, adapt: Way, base: nn.Module, layers: Sequence[int],
          setting: Setting) -> Arm:  # fmt: skip
    """Adapt a tree of its own around the weights of ``base``.

    Raises:
        WrongResult: the way adapted other linears than it was told to.
    """
    wanted = {
        path: block.index
        for block in find_blocks(base)
        if block.index in set(layers)
        for projection, path in block.linears.items()
        if projection in setting.targets
    }
    model, sites = adapt(share(base), wanted, setting)
    if sites.keys() != wanted.keys():
        odd = sorted(sites.keys() ^ wanted.keys())
        raise WrongResult(f"{name}: must adapt {len(wanted)} linears, differs in {odd}; not timed")
    return Arm(name, way, tuple(layers), model.eval(), sites)


def frozen(model: nn.Module, paths: dict[str, int], setting: Setting) -> Any:
    """No adapter: the time nobody can save."""
    return model, {}


def lora(rank: int) -> Way:
    """The peft package's LoRA of this rank."""

    def adapt(model: nn.Module, paths: dict[str, int], setting: Setting) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=rank, lora_alpha=SCALING * rank, lora_dropout=setting.dropout,
            target_modules=list(paths),
        )  # fmt: skip
        single = setting.dtype == torch.float32
        adapted = get_peft_model(model, config, autocast_adapter_dtype=single)
        sites = {}
        for path in paths:
            layer: Any = model.get_submodule(path)
            pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if pair[0].dtype != setting.dtype:
                raise ValueError(
                    "adapter dtype must be float32 or the weights' for PEFT, got "
                    f"{setting.dtype} beside {layer.base_layer.weight.dtype}"
                )
            _fill(pair, lora_numbers(path, layer.base_layer, rank))
            sites[path] = Site("lora", pair)
        return adapted, sites

    return adapt


def routed(backend: str | None = None) -> Way:
    """floe's own; ``backend`` as in FloeConfig, None for its default."""

    def adapt(model: nn.Module, paths: dict[str, int], setting: Setting) -> Any:
        chosen: dict[str, Any] = {} if backend is None else {"backend": backend}
        config = floe.FloeConfig(
            r=setting.rank, num_experts=setting.experts, alpha=SCALING * setting.rank,
            dropout=setting.dropout, target_modules=list(setting.targets),
            layers=sorted(set(paths.values())),
            adapter_dtype=str(setting.dtype).removeprefix("torch."), **chosen,
        )  # fmt: skip
        adapted = floe.get_model(model, config)
        sites = {}
        for path, layer in adapted_modules(adapted).items():
            pair = layer.floe_shrink["default"].weight, layer.floe_expand["default"].weight
            _fill(pair, routed_numbers(path, layer.base_layer, setting))
            sites[path] = Site("routed", pair)
        return adapted, sites

    return adapt


class Swapped(nn.Module):
    """A linear replaced by a function of `impls`: x [..., K] -> [..., N]; dropout in training."""

    def __init__(
        self,
        base_layer: nn.Linear,
        function: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        dropout: float,
    ) -> None:
        super().__init__()
        if base_layer.bias is not None:
            raise ValueError("base_layer must have no bias, got one")
        self.base_layer, self.function, self.dropout = base_layer, function, dropout
        self.adapter = nn.ParameterList(parameters)

    def forward(self, x: Tensor) -> Tensor:
        """The frozen product and the adapter's."""
        p = self.dropout if self.training else 0.0
        y = self.function(x.flatten(0, -2), self.base_layer.weight, p, *self.adapter)
        return y.view(*x.shape[:-1], -1)


def eager(model: nn.Module, paths: dict[str, int], setting: Setting) -> Any:
    """What a careful user writes: three products for all experts, one dropout mask, autograd."""
    return _swap(model, paths, setting, impls.eager_linear, lambda shrink, expand: (shrink, expand))


def hydra(model: nn.Module, paths: dict[str, int], setting: Setting) -> Any:
    """HydraLoRA's published loop: dropout and A again for every expert, the router rounded."""

    def parts(shrink: Tensor, expand: Tensor) -> tuple[Tensor, ...]:
        rank = setting.rank
        return shrink[:rank].clone(), shrink[rank:].clone(), *expand.permute(1, 0, 2).contiguous()

    return _swap(model, paths, setting, impls.hydra_linear, parts, impls.hydra_joined)


def compiled(model: nn.Module, paths: dict[str, int], setting: Setting) -> Any:
    """`eager`, each adapted linear through torch.compile; its compilation falls in the warm-up."""
    adapted, sites = eager(model, paths, setting)
    torch._dynamo.config.recompile_limit = 256  # layers share one code object
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or it would go on uncompiled
    for path in paths:
        adapted.get_submodule(path).compile()
    return adapted, sites


def registry(rank: int, experts: int, device: torch.device, compile_too: bool) -> dict[str, Way]:
    """Name -> way; ``peft`` at rank r, and at M r where it has as many parameters as M experts."""
    ways = {"floe": routed()}
    if device.type == "cuda":
        ways |= {f"floe {name}": routed(name) for name in ("gemm", "fused", "eager")}
    ways |= {f"peft r={r}": lora(r) for r in (rank, rank * experts)}
    ways |= {"eager": eager, "hydra": hydra}
    return {**ways, "compiled": compiled} if compile_too else ways


def numbers(path: str, linear: nn.Linear, site: Site, setting: Setting) -> tuple[Tensor, ...]:
    """What the formula's parameters of ``site`` are to be, on the linear's device."""
    values = (
        routed_numbers(path, linear, setting)
        if site.formula == "routed"
        else lora_numbers(path, linear, site.parameters[0].shape[0])
    )
    return tuple(value.to(linear.weight.device, setting.dtype) for value in values)


def routed_numbers(path: str, linear: nn.Linear, setting: Setting) -> tuple[Tensor, Tensor]:
    """Shrink [r + M, K] and expand [N, M, r] of the linear at ``path``: the same in every arm."""
    rows, sizes = setting.rank + setting.experts, (setting.experts, setting.rank)
    return _draw(path, linear, rows, sizes, setting.rank)


def lora_numbers(path: str, linear: nn.Linear, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] of the linear at ``path``."""
    return _draw(path, linear, rank, (rank,), rank)


def _draw(
    path: str, linear: nn.Linear, rows: int, sizes: tuple[int, ...], rank: int
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    features, columns = linear.weight.shape
    shrink = torch.randn(rows, columns, generator=generator) * columns**-0.5
    strength = float(linear.weight.float().std()) * (columns / rank) ** 0.5
    return shrink, torch.randn(features, *sizes, generator=generator) * strength


def _fill(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _swap(
    model: nn.Module,
    paths: dict[str, int],
    setting: Setting,
    function: Callable[..., Tensor],
    parts: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    joined: Joined = tuple,
) -> tuple[nn.Module, dict[str, Site]]:
    sites = {}
    for path in paths:
        linear = linear_at(model, path)
        values = parts(*routed_numbers(path, linear, setting))
        trained = [nn.Parameter(v.to(linear.weight.device, setting.dtype)) for v in values]
        model.set_submodule(path, Swapped(linear, function, trained, setting.dropout))
        sites[path] = Site("routed", tuple(trained), joined)
    return model, sites
