import copy

import pytest
import torch
from helpers.importance_models import TARGETS, adapted, batches, mean_nll, measure_fisher

from floe.adapters import MoELoRALinear, adapted_layers
from floe.adapters.linear import AdapterSettings
from floe.importance import adapter_gradients as module_under_test
from floe.importance.adapter_gradients import adapter_gradients, adapter_output
from floe.importance.gradients import Capture


def loop(model, batch):
    """Sample by sample, autograd on the adapters' parameters."""
    model.eval()
    layers = adapted_layers(model)
    total = torch.zeros(3, dtype=torch.float64)
    for s in range(len(batch["input_ids"])):
        row = {k: v[s : s + 1] for k, v in batch.items()}
        for layer, modules in layers.items():
            weights = [
                w
                for m in modules.values()
                for w in (m.floe_shrink["default"].weight, m.floe_expand["default"].weight)
            ]
            for g in torch.autograd.grad(mean_nll(model, row), weights):
                total[layer] += g.double().square().sum()
    return total


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("llama", {"targets": ["q_proj", "o_proj", "up_proj"], "layers": [0, 2]}),
        ("llama", {"top_k": 1, "temperature": 0.4}),
        ("llama", {"shared_a": False, "temperature": 2.0}),
        ("gemma2", {}),
        ("phi3", {"targets": [*TARGETS["phi3"], "qkv_proj"]}),
    ],
)
def test_equals_the_sample_loop(kind, config):
    model = adapted(kind, **config)
    (batch,) = batches()
    found = torch.as_tensor(measure_fisher(model, [batch], adapters=True).adapter)
    expected = loop(model, batch)
    assert (found - expected).abs().max() < 1e-5 * expected.max()
    assert ((found == 0) == (expected == 0)).all()


def example(samples=3, tokens=5, inputs=7, outputs=6, rank=3, experts=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    module = MoELoRALinear(torch.nn.Linear(inputs, outputs).to(dtype))
    module.update_layer("default", AdapterSettings(rank, experts, 2.0, 0.5), generator, dtype)
    module.set_adapter("default")
    module.floe_expand["default"].weight.data.normal_(generator=generator)
    x = torch.randn(samples, tokens, inputs, generator=generator, dtype=dtype)
    return module.eval(), x, torch.randn(samples, tokens, outputs, generator=generator, dtype=dtype)


def test_one_module_in_float64():
    module, x, grad_y = example()
    found = adapter_gradients(module, x, grad_y, torch.ones(3, 5, dtype=torch.bool)).squared_norm
    weights = [module.floe_shrink["default"].weight, module.floe_expand["default"].weight]
    for s in range(3):
        grads = torch.autograd.grad(module(x[s]), weights, grad_y[s])
        expected = sum(g.square().sum() for g in grads)
        assert abs(found[s] - expected) < 1e-12 * expected


def test_gate_is_the_gradient_of_a_factor_on_what_is_added():
    module, x, grad_y = example()
    found = adapter_gradients(module, x, grad_y, torch.ones(3, 5, dtype=torch.bool)).gate
    added = module(x) - module.base_layer(x)
    assert torch.allclose(found, (added * grad_y).sum((1, 2)).detach(), rtol=1e-9, atol=0)


def test_gates_are_found_in_their_layer_and_projection():
    """Against central differences: a gate is a factor on an adapter's scaling."""
    model = adapted(dtype=torch.float64).eval()
    row = {k: v[:1] for k, v in batches()[0].items()}
    with Capture(model, adapters=True) as capture:
        found = capture.step(row).gate
    places = adapted_layers(model)
    assert found.shape == (1, 3, 3)
    for layer, modules in places.items():
        for place, module in enumerate(modules.values()):
            own, losses = module.settings["default"].scaling, []
            for factor in (1 + 1e-3, 1 - 1e-3):
                module.settings["default"].scaling = own * factor
                losses.append(mean_nll(model, row).item())
            module.settings["default"].scaling = own
            slope = (losses[0] - losses[1]) / 2e-3
            assert found[0, layer, place] == pytest.approx(
                slope, rel=1e-2, abs=1e-5
            )  # norms stay float32


def test_padding_is_left_out_whatever_it_holds():
    module, x, grad_y = example()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, :2] = False
    x[1, :2], grad_y[1, :2] = float("nan"), float("inf")
    found = adapter_gradients(module, x, grad_y, mask).squared_norm
    alone = adapter_gradients(module, x[1:2, 2:], grad_y[1:2, 2:], mask[1:2, 2:]).squared_norm
    assert found.isfinite().all()
    assert abs(found[1] - alone[0]) < 1e-12 * alone[0]


def test_chunks_change_nothing(monkeypatch):
    module, x, grad_y = example()
    mask = torch.ones(3, 5, dtype=torch.bool)
    whole = adapter_gradients(module, x, grad_y, mask).squared_norm
    monkeypatch.setattr(module_under_test, "_CHUNK_ELEMENTS", 1)
    assert torch.allclose(
        adapter_gradients(module, x, grad_y, mask).squared_norm, whole, rtol=1e-13, atol=0
    )


def test_a_large_module_is_cheap():
    module, x, grad_y = example(2, 8, 4096, 14336, 8, 4, torch.float32)
    norms = adapter_gradients(module, x, grad_y, torch.ones(2, 8, dtype=torch.bool)).squared_norm
    assert norms.dtype == torch.float64
    assert norms.isfinite().all()


def test_bfloat16_is_as_exact_as_autograd_in_bfloat16():
    module, x, grad_y = example(4, 40, 64, 48, 4, 3, torch.bfloat16)
    found = adapter_gradients(module, x, grad_y, torch.ones(4, 40, dtype=torch.bool)).squared_norm

    def loop(dtype):
        copied = copy.deepcopy(module).to(dtype)
        copied.settings["default"].backend = "eager"  # torch's own products
        weights = [copied.floe_shrink["default"].weight, copied.floe_expand["default"].weight]
        return torch.stack(
            [
                sum(
                    g.double().square().sum()
                    for g in torch.autograd.grad(
                        copied(x[s].to(dtype)), weights, grad_y[s].to(dtype)
                    )
                )
                for s in range(4)
            ]
        )

    exact = loop(torch.float64)
    assert (found - exact).abs().max() <= 2 * (loop(torch.bfloat16) - exact).abs().max()


def test_adapter_output_is_what_the_module_adds():
    module, x, _ = example()
    added = module(x) - module.base_layer(x)
    assert torch.allclose(adapter_output(module, x), added, rtol=1e-9, atol=1e-12)
    module.enable_adapters(False)
    assert not adapter_output(module, x).any()
    found = adapter_gradients(module, x, x[..., :6], torch.ones(3, 5, dtype=torch.bool))
    assert not found.squared_norm.any()
    assert not found.gate.any()
