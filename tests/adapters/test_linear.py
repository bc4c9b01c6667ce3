"""The adapted linear layer by itself: first values, base layer, several adapters at once."""

import pytest
import torch
from helpers.small_adapters import IDS, adapted, logits, trained
from torch import nn

from floe.adapters import FloeConfig, MoELoRALinear, adapted_modules, separate_base
from floe.adapters.linear import AdapterSettings


def test_two_active_adapters_add_up():
    model = adapted(layers=[0], dropout=0.0)
    model.add_adapter("second", FloeConfig(r=2, num_experts=3, layers=[0], dropout=0.0))
    module = next(iter(adapted_modules(trained(model, "second", seed=6)).values()))
    x, base = torch.randn(4, 32), 0
    parts = {}
    for names in (["default"], ["second"], ["default", "second"]):
        module.set_adapter(names)
        parts[len(parts)] = module(x)
    base = module.base_layer(x)
    torch.testing.assert_close(parts[2] - base, parts[0] + parts[1] - 2 * base)


def test_first_values_are_uniform_within_one_over_the_root_of_the_width():
    layer = MoELoRALinear(nn.Linear(64, 8))
    settings = AdapterSettings(40, 24, scaling=1.0)
    layer.update_layer("default", settings, torch.Generator().manual_seed(0))
    router = layer.router_weight("default")
    for rows in (
        layer.floe_shrink["default"].weight[:40],
        router,
    ):  # zero routers never tell experts apart
        assert 0.99 / 8 < rows.max() <= 1 / 8
        assert -1 / 8 <= rows.min() < -0.99 / 8
        assert abs(rows.mean()) < 0.01
    assert (layer.floe_expand["default"].weight == 0).all()
    assert router.shape == (24, 64)


def test_the_base_layer_is_called_as_a_module_where_that_can_be_seen():
    model = adapted(layers=[0], dropout=0.0)
    expected = logits(model)
    layer = adapted_modules(model)["model.layers.0.mlp.down_proj"]
    with separate_base(model):
        torch.testing.assert_close(logits(model), expected)
        assert all(m.calls_base for m in adapted_modules(model).values())
    assert not any(m.calls_base for m in adapted_modules(model).values())
    calls = []
    handle = layer.base_layer.register_forward_hook(lambda *a: calls.append(1))
    torch.testing.assert_close(logits(model), expected)
    assert calls == [1]
    handle.remove()
    layer.base_layer.bias = nn.Parameter(
        torch.zeros(layer.out_features)
    )  # trainable: torch must see it
    model(IDS).logits.sum().backward()
    assert layer.base_layer.bias.grad is not None


def test_separate_base_is_undone_after_an_error():
    model = adapted(layers=[0])
    with pytest.raises(RuntimeError, match="stop"), separate_base(model):
        raise RuntimeError("stop")
    assert not any(m.calls_base for m in adapted_modules(model).values())
