import math

import pytest
import torch
from helpers.tiny import tiny_model, tiny_rows

from floe.adapters import FloeConfig, adapted_modules, get_model
from floe.data.batches import make_batches
from floe.evaluation import GateUse, router_statistics


def model_of(experts=3, **config):
    return get_model(tiny_model(), FloeConfig(r=2, num_experts=experts, **config), seed=1)


def gate_statistics(gates):
    use = GateUse(0, "up_proj")
    use.add(gates)
    return use.router()


def test_the_worked_example():
    found = gate_statistics(torch.tensor([[0.9, 0.1], [0.8, 0.2]], dtype=torch.float64))
    assert found.usage == pytest.approx([0.85, 0.15])
    assert found.load_entropy == pytest.approx(0.60984, abs=5e-6)
    assert found.token_entropy == pytest.approx(0.59546, abs=5e-6)
    assert found.mutual_information == pytest.approx(0.01438, abs=5e-6)


def test_extremes():
    even = gate_statistics(torch.full((5, 4), 0.25))
    assert even.load_entropy == pytest.approx(1)
    assert even.mutual_information == pytest.approx(0, abs=1e-12)
    sharp = gate_statistics(torch.eye(4))
    assert sharp.token_entropy == 0
    assert sharp.mutual_information == pytest.approx(1)
    assert gate_statistics(torch.ones(3, 1)).load_entropy == 1


def test_equals_gates_computed_row_by_row_without_padding():
    model, rows = model_of(), tiny_rows(10)
    found = router_statistics(model, make_batches(rows, 4))
    assert [(f.layer, f.module) for f in found] == [
        (layer, name) for layer in (0, 1) for name in ("down_proj", "gate_proj", "up_proj")
    ]
    module = adapted_modules(model)["model.layers.1.mlp.down_proj"]
    inputs = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row.prompt + row.response]))
    handle.remove()
    router = module.floe_shrink["default"].weight[2:]
    gates = torch.softmax(torch.cat(inputs).double() @ router.double().T, -1).detach()
    assert len(gates) == sum(len(row) for row in rows)
    expected, got = gate_statistics(gates), next(f for f in found if f.layer == 1)
    assert got.usage == pytest.approx(expected.usage, abs=1e-6)
    for name in ("load_entropy", "token_entropy", "mutual_information"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), abs=1e-6)


def test_batching_does_not_matter_and_nothing_stays_behind():
    model, rows = model_of(layers=[1]), tiny_rows(9)
    model.train()
    one, many = (
        router_statistics(model, make_batches(rows, 1)),
        router_statistics(model, make_batches(rows, 9)),
    )
    assert len(one) == 3
    for a, b in zip(one, many, strict=True):
        assert a.usage == pytest.approx(b.usage, abs=1e-6)
        assert sum(a.usage) == pytest.approx(1)
    assert model.training
    assert not any(m._forward_pre_hooks for m in adapted_modules(model).values())


def test_a_collapsed_router_shows():
    model = model_of(experts=2)
    for module in adapted_modules(model).values():
        with torch.no_grad():
            module.floe_shrink["default"].weight[2:] = 0
    found = router_statistics(model, make_batches(tiny_rows(4), 4))
    assert all(f.usage == (0.5, 0.5) and abs(f.mutual_information) < 1e-12 for f in found)
    assert all(f.token_entropy == pytest.approx(1) for f in found)
    assert math.isclose(found[0].load_entropy, 1)


def test_refusals():
    with pytest.raises(ValueError, match="must have adapted layers, got none"):
        router_statistics(tiny_model(), make_batches(tiny_rows(2), 2))
    with pytest.raises(ValueError, match="batches must not be empty"):
        router_statistics(model_of(), [])
