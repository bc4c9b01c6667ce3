"""Ways to adapt some layers of a decoder, all with the same numbers, one module tree each.

An adapter is about as strong as the frozen weights it stands beside, so that whatever is wrong with
it shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import floe
from benchmarks import harness, implementations
from benchmarks.harness import Row, Seconds, WrongResult
from benchmarks.implementations import SCALING, Adapter, Joined
from benchmarks.models import share
from floe.adapters import adapted_modules
from floe.decoder_blocks import find_blocks, linear_at

FROZEN = "frozen"


@dataclass(frozen=True)
class AdaptedLinear:
    """Its formula, its parameters, and how they join to the formula's (see `Built`)."""

    formula: str
    parameters: tuple[Tensor, ...]
    joined: Joined = tuple

    def numbers(self, path: str, linear: nn.Linear, adapter: Adapter) -> tuple[Tensor, ...]:
        """What the formula's parameters are to be, on the linear's device."""
        routed = self.formula == "routed"
        rank = adapter.rank if routed else self.parameters[0].shape[0]
        values = numbers(path, linear, rank, adapter.experts if routed else None)
        return tuple(value.to(linear.weight.device, adapter.dtype) for value in values)


def numbers(
    path: str, linear: nn.Linear, rank: int, experts: int | None = None
) -> tuple[Tensor, Tensor]:
    """Shrink [r + M, K] and expand [N, M, r] of the linear at ``path``, the same in every model.

    Without experts A [r, K] and B [N, r].
    """
    sizes = (rank,) if experts is None else (experts, rank)
    generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    features, columns = linear.weight.shape
    shrink = torch.randn(rank + (experts or 0), columns, generator=generator) * columns**-0.5
    strength = float(linear.weight.float().std()) * (columns / rank) ** 0.5
    return shrink, torch.randn(features, *sizes, generator=generator) * strength


@dataclass(frozen=True)
class AdaptedModel:
    """A model adapted in one way on ``layers``; ``linears`` by path in the base model."""

    name: str
    way: str
    layers: tuple[int, ...]
    model: nn.Module
    linears: dict[str, AdaptedLinear]

    @property
    def parameters(self) -> list[Tensor]:
        """What an optimiser trains."""
        return [value for linear in self.linears.values() for value in linear.parameters]


Adapted = tuple[nn.Module, dict[str, AdaptedLinear]]
Way = Callable[[nn.Module, dict[str, int], Adapter], Adapted]  # the model, layers by path


def build(
    name: str, way: str, adapt: Way, base: nn.Module, layers: Sequence[int], adapter: Adapter
) -> AdaptedModel:
    """Adapt a tree of its own around the weights of ``base``."""
    wanted = {
        path: block.index
        for block in find_blocks(base)
        if block.index in set(layers)
        for projection, path in block.linears.items()
        if projection in adapter.targets
    }
    model, linears = adapt(share(base), wanted, adapter)
    if linears.keys() != wanted.keys():
        odd = sorted(linears.keys() ^ wanted.keys())
        raise WrongResult(f"{name}: must adapt {len(wanted)} linears, differs in {odd}; not timed")
    return AdaptedModel(name, way, tuple(layers), model.eval(), linears)


def build_all(
    base: nn.Module,
    ways: dict[str, Way],
    layer_sets: Mapping[str, Sequence[int]],
    adapter: Adapter,
) -> list[AdaptedModel]:
    """The frozen model, then every way on every set of layers, named ``way, set``."""
    models = [build(FROZEN, FROZEN, frozen, base, (), adapter)]
    for label, layers in layer_sets.items():
        models += [
            build(f"{name}, {label}", name, way, base, layers, adapter)
            for name, way in ways.items()
        ]
    return models


def describe(rows: Iterable[Row], models: Sequence[AdaptedModel], seconds: Seconds) -> None:
    """Add to each row its way, its layers, and its ratios to the other ways on the same layers."""
    for row, model in zip(rows, models, strict=True):
        layers = list(model.layers)
        row["case"] |= {"way": model.way, "layers": layers, "adapted": len(layers)}
        row["trained_parameters"] = sum(value.numel() for value in model.parameters)
        row["ratio_to_way"] = {
            other.way: harness.ratios(seconds[model.name], seconds[other.name])
            for other in models
            if other.layers == model.layers and other.way != model.way
        }


def registry(rank: int, experts: int, device: torch.device, compile_too: bool) -> dict[str, Way]:
    """Name -> way; ``peft`` at rank r, and at M r where it has as many parameters as M experts."""
    ways: dict[str, Way] = {"floe": routed}
    if device.type == "cuda":
        ways |= {f"floe {b}": partial(routed, backend=b) for b in ("gemm", "fused", "eager")}
    ways |= {f"peft r={r}": partial(lora, rank=r) for r in (rank, rank * experts)}
    ways |= {"eager": eager, "hydra": hydra}
    return {**ways, "compiled": compiled} if compile_too else ways


def frozen(model: nn.Module, paths: dict[str, int], adapter: Adapter) -> Adapted:
    """No adapter: the time nobody can save."""
    return model, {}


def lora(model: nn.Module, paths: dict[str, int], adapter: Adapter, rank: int) -> Adapted:
    """The peft package's LoRA of this rank."""
    from peft import LoraConfig, get_peft_model

    alpha, p = SCALING * rank, adapter.dropout
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=p, target_modules=list(paths))
    single = adapter.dtype == torch.float32
    adapted = get_peft_model(model, config, autocast_adapter_dtype=single)  # type: ignore[arg-type]
    linears = {}
    for path in paths:
        layer: Any = model.get_submodule(path)
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if pair[0].dtype != adapter.dtype:
            raise ValueError(
                "adapter dtype must be float32 or the weights' for PEFT, got "
                f"{adapter.dtype} beside {layer.base_layer.weight.dtype}"
            )
        _fill(pair, numbers(path, layer.base_layer, rank))
        linears[path] = AdaptedLinear("lora", pair)
    return adapted, linears


def routed(
    model: nn.Module, paths: dict[str, int], adapter: Adapter, backend: str | None = None
) -> Adapted:
    """floe's own; ``backend`` as in FloeConfig, None for its default."""
    config = floe.FloeConfig(
        r=adapter.rank,
        num_experts=adapter.experts,
        alpha=SCALING * adapter.rank,
        dropout=adapter.dropout,
        target_modules=list(adapter.targets),
        layers=sorted(set(paths.values())),
        adapter_dtype=str(adapter.dtype).removeprefix("torch."),
        **({} if backend is None else {"backend": backend}),
    )
    adapted = floe.get_model(model, config)
    linears = {}
    for path, layer in adapted_modules(adapted).items():
        pair = layer.floe_shrink["default"].weight, layer.floe_expand["default"].weight
        _fill(pair, numbers(path, layer.base_layer, adapter.rank, adapter.experts))
        linears[path] = AdaptedLinear("routed", pair)
    return adapted, linears


class Swapped(nn.Module):
    """A linear replaced by a function of `implementations`: x [..., K] -> [..., N].

    Dropout in training alone.
    """

    def __init__(
        self, base_layer: nn.Linear, function: Any, parameters: Sequence[Tensor], dropout: float
    ) -> None:
        super().__init__()
        if base_layer.bias is not None:
            raise ValueError("base_layer must have no bias, got one")
        self.base_layer, self.function, self.dropout = base_layer, function, dropout
        self.adapter = nn.ParameterList(parameters)

    def forward(self, x: Tensor) -> Tensor:
        """The frozen product and the adapter's."""
        p = self.dropout if self.training else 0.0
        y: Tensor = self.function(x.flatten(0, -2), self.base_layer.weight, p, *self.adapter)
        return y.view(*x.shape[:-1], -1)


def eager(model: nn.Module, paths: dict[str, int], adapter: Adapter) -> Adapted:
    """What a careful user writes: three products for all experts, one dropout mask, autograd."""
    return _swap(model, paths, adapter, implementations.eager_linear, lambda *pair: pair)


def hydra(model: nn.Module, paths: dict[str, int], adapter: Adapter) -> Adapted:
    """HydraLoRA's published loop: dropout and A again for every expert, the router rounded."""
    parts, joined = implementations.hydra_parts, implementations.hydra_joined
    return _swap(model, paths, adapter, implementations.hydra_linear, parts, joined)


def compiled(model: nn.Module, paths: dict[str, int], adapter: Adapter) -> Adapted:
    """`eager`, each adapted linear through torch.compile; its compilation falls in the warm-up."""
    adapted, linears = eager(model, paths, adapter)
    torch._dynamo.config.recompile_limit = 256  # layers share one code object
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or it would go on uncompiled
    for path in paths:
        adapted.get_submodule(path).compile()
    return adapted, linears


def _fill(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _swap(
    model: nn.Module,
    paths: dict[str, int],
    adapter: Adapter,
    function: Callable[..., Tensor],
    parts: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    joined: Joined = tuple,
) -> Adapted:
    linears = {}
    for path in paths:
        linear = linear_at(model, path)
        values = parts(*numbers(path, linear, adapter.rank, adapter.experts))
        where = {"device": linear.weight.device, "dtype": adapter.dtype}
        trained = tuple(nn.Parameter(value.to(**where, copy=True)) for value in values)
        model.set_submodule(path, Swapped(linear, function, trained, adapter.dropout))
        linears[path] = AdaptedLinear("routed", trained, joined)
    return model, linears
