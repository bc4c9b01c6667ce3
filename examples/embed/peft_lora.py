"""PEFT's LoRA layers on floe_triton's op: one expert, whose softmax is always 1.

The layers keep their parameters, so PEFT saves, loads, merges and trains them as before.

    python examples/embed/peft_lora.py [--time]
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from floe_triton import draw_seed, moe_lora
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from side_by_side import options, show
from torch import Tensor, nn


def embed(model: nn.Module) -> int:
    """Let every LoRA layer of ``model`` compute through the op; returns how many there are.

    Raises:
        ValueError: a layer is none of the plain ones: DoRA and other variants, or a bias of B.
    """
    layers = {path: m for path, m in model.named_modules() if type(m) is Linear}
    for path, layer in layers.items():
        odd = [*layer.lora_variant, *(name for name, bias in layer.lora_bias.items() if bias)]
        if odd:
            raise ValueError(f"{path} must be plain LoRA, got a variant or a bias in {odd}")
    for layer in layers.values():
        layer.forward = partial(_forward, layer, layer.forward)
    return len(layers)


def _forward(
    layer: Any, own: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.get_base_layer()
    usual = len(names) == 1 and type(base) is nn.Linear and not (args or kwargs)
    if layer.disable_adapters or layer.merged or not usual:
        return own(x, *args, **kwargs)  # PEFT knows what to do, with mixed batches for example
    (name,) = names
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropout = layer.lora_dropout[name]
    p = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
    return moe_lora(
        x,
        base.weight,
        base.bias,
        torch.cat([a, a.new_zeros(1, a.shape[1])]),  # a router for one expert: any row will do
        b[:, None, :],  # [N, 1, r]
        scaling=layer.scaling[name],
        dropout_p=p,
        seed=draw_seed(x.device) if p > 0.0 else None,
    )


def model_of(size: int, dropout: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen linear [size, size] with PEFT's LoRA of rank 8, B not zero."""
    base = nn.Sequential(nn.Linear(size, size, dtype=dtype))
    config = LoraConfig(r=8, lora_alpha=32, lora_dropout=dropout, target_modules=["0"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight, std=0.1)
    return model


def main(arguments: list[str] | None = None) -> None:
    """Compare the two models; with ``--time``, time them."""
    given = options(__doc__).parse_args(arguments)
    torch.manual_seed(0)
    before = model_of(given.size, given.dropout)
    after = copy.deepcopy(before)
    print(f"{embed(after)} layer on the op")
    show(before, after, given)


if __name__ == "__main__":
    main()
