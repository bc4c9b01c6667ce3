"""Inputs of the MoE-LoRA ops, and one call forward and backward."""

import pytest
import torch
from floe_triton import moe_lora, moe_lora_add

SEED = torch.tensor(2**61 + 12345)


def draw(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def case(leading=(7,), columns=12, features=10, rank=3, experts=4, bias=True, seed=0):
    """float64 inputs of one call: x, weight, bias, shrink_weight, expand_weight, gradient of y."""
    return (
        draw(*leading, columns, seed=seed),
        draw(features, columns, seed=seed + 1, scale=columns**-0.5),
        draw(features, seed=seed + 2) if bias else None,
        draw(rank + experts, columns, seed=seed + 3, scale=columns**-0.5),
        draw(features, experts, rank, seed=seed + 4, scale=rank**-0.5),
        draw(*leading, features, seed=seed + 5),
    )


def run(function, inputs, dtype=torch.float64, adapter=None, leaf=True, **settings):
    """y and the gradients of x, shrink_weight and expand_weight, everything cast to ``dtype``."""
    x, weight, bias, shrink, expand, grad = inputs
    x, shrink, expand = x.to(dtype), shrink.to(adapter or dtype), expand.to(adapter or dtype)
    x, shrink, expand = (
        t.detach().clone().requires_grad_() if leaf else t for t in (x, shrink, expand)
    )
    bias = None if bias is None else bias.to(dtype)
    y = function(x, weight.to(dtype), bias, shrink, expand, **settings)
    torch.autograd.backward(y, grad.to(y.dtype))
    return [y.detach(), x.grad, shrink.grad, expand.grad]


def added(x, weight, bias, shrink, expand, **settings):
    """The same through moe_lora_add, the base output computed outside."""
    return moe_lora_add(torch.nn.functional.linear(x, weight, bias), x, shrink, expand, **settings)


OPS = pytest.mark.parametrize("op", [moe_lora, added], ids=["moe_lora", "moe_lora_add"])
NAMES = ("y", "grad x", "grad shrink_weight", "grad expand_weight")


def assert_equal_runs(actual, expected, tolerance=1e-10):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.shape == e.shape, name
        scale = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(
            a, e, rtol=0, atol=tolerance * (1 + scale), msg=lambda m, n=name: f"{n}: {m}"
        )
