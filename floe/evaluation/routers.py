"""How the routers of an adapted model use their experts, measured on real tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from floe.adapters import MoELoRALinear, adapted_layers
from floe.artifacts.results import Router
from floe.data.loss import evaluating, on_device
from floe.types import Batch


def router_statistics(model: nn.Module, batches: Sequence[Batch]) -> list[Router]:
    """Use of the experts by each adapted module over all tokens that are not padding.

    With gates w[t, i] of token t and expert i: usage = mean_t w[t]; load entropy = H(usage) / ln M;
    token entropy = mean_t H(w[t]) / ln M; mutual information = their difference: 0 when every token
    is routed alike. With one expert both entropies are 1.

    Args:
        model: an adapted model; its active adapter is looked at.
        batches: as :func:`floe.data.batches.make_batches` makes them.

    Returns:
        One per module, by layer then module name.

    Raises:
        ValueError: if nothing is adapted or there is no batch.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model must have adapted layers, got none")
    if not batches:
        raise ValueError("batches must not be empty")
    watched = [
        _Watched(layer, name, module)
        for layer, modules in sorted(layers.items())
        for name, module in sorted(modules.items())
    ]
    mask: list[Tensor] = []
    with ExitStack() as hooks, evaluating(model):
        for each in watched:
            handle = each.linear.register_forward_pre_hook(partial(_observe, each, mask))
            hooks.callback(handle.remove)
        for batch in batches:
            inputs = on_device(batch, model)
            inputs.pop("labels", None)
            mask[:] = [inputs["attention_mask"].bool()]
            model(**inputs, use_cache=False)
    return [_router(w.layer, w.name, w.usage, w.entropy, w.tokens) for w in watched]


def gate_statistics(gates: Tensor, layer: int = 0, module: str = "") -> Router:
    """The statistics of :func:`router_statistics` for gates [T, M], any floating dtype."""
    gates = gates.double()
    return _router(layer, module, gates.sum(0), float(_entropy(gates).sum()), len(gates))


@dataclass
class _Watched:
    layer: int
    name: str
    linear: MoELoRALinear
    usage: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))  # [M]: sum
    entropy: float = 0.0
    tokens: int = 0


def _observe(
    watched: _Watched, mask: list[Tensor], module: nn.Module, args: tuple[Any, ...]
) -> None:
    x: Tensor = args[0][mask[0]]  # [P, K]: tokens that are not padding
    router = watched.linear.router_weight(watched.linear.active_adapters[0])
    gates = torch.softmax(x.float() @ router.float().T, dim=-1).double()
    watched.usage = watched.usage + gates.sum(0).cpu()
    watched.entropy += float(_entropy(gates).sum())
    watched.tokens += len(gates)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


def _router(layer: int, module: str, usage: Tensor, entropy: float, tokens: int) -> Router:
    usage = usage / tokens
    scale = math.log(len(usage))
    load = float(_entropy(usage)) / scale if scale else 1.0
    token = entropy / tokens / scale if scale else 1.0
    return Router(layer, module, tuple(usage.tolist()), load, token, load - token)
