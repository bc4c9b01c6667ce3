import copy
import sys
from pathlib import Path

import pytest
import torch
from floe_triton import draw_seed, reference
from helpers.budget import assert_within_budget
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples" / "embed"))

import hydralora
import peft_lora
import side_by_side

CPU = torch.device("cpu")


def _hydra(dropout=0.0):
    layer = hydralora.HydraLinear(24, 40, rank=4, experts=3, alpha=8.0, dropout=dropout)
    return layer, hydralora.embed(copy.deepcopy(layer))


def _peft(dropout=0.0):
    model = peft_lora.model_of(24, dropout)
    after = copy.deepcopy(model)
    assert peft_lora.embed(after) == 1
    return model, after


@pytest.mark.parametrize("make", [_hydra, _peft])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_the_same(make, dtype):
    before, after = (layer.to(dtype) for layer in make())
    x = torch.randn(17, 24).to(dtype)
    grad = torch.randn_like(before(x))
    found = side_by_side.gradients(after, x, grad)
    torchs = side_by_side.gradients(before, x, grad)
    exact = side_by_side.gradients(before.double(), x.double(), grad.double())
    assert found.keys() == torchs.keys() == exact.keys()
    assert len(found) == (2 + 5 if make is _hydra else 2 + 2)
    for name, value in found.items():
        assert_within_budget(value, torchs[name], exact[name], name)
    assert side_by_side.difference(torchs, found) > 0.0  # two computations, not one twice


@pytest.mark.parametrize("make", [_hydra, _peft])
def test_they_are_the_same_function(make):
    before, after = (layer.double() for layer in make())
    x = torch.randn(3, 5, 24).double()
    grad = torch.randn_like(before(x))
    found = [side_by_side.gradients(layer, x, grad) for layer in (before, after)]
    assert side_by_side.difference(*found) < 1e-14


@pytest.mark.parametrize("make", [_hydra, _peft])
def test_names_and_parameters_stay(make):
    before, after = make()
    assert before.state_dict().keys() == after.state_dict().keys()
    after.load_state_dict(before.state_dict())
    for (name, a), (other, b) in zip(
        before.named_parameters(), after.named_parameters(), strict=True
    ):
        assert (name, a.requires_grad) == (other, b.requires_grad)


def test_hydras_dropout_is_one_mask_for_all_experts():
    layer, after = (found.double() for found in _hydra(dropout=0.25))
    x = torch.randn(9, 24, dtype=torch.float64)
    torch.manual_seed(3)
    y = after.train()(x)
    torch.manual_seed(3)
    experts = [layer.get_submodule(f"lora_B{i}").weight for i in range(3)]
    exact = reference.moe_lora(
        x,
        layer.weight,
        None,
        torch.cat([layer.lora_A.weight, layer.lora_route.weight]),
        torch.stack(experts, dim=1),
        scaling=2.0,
        dropout_p=0.25,
        seed=draw_seed(CPU),
    )
    assert torch.allclose(y, exact, rtol=1e-12)
    assert torch.equal(after.eval()(x), after(x))
    assert not torch.equal(after.train()(x), after(x))


def test_pefts_dropout_is_on_in_training_alone():
    before, after = (found.double() for found in _peft(dropout=0.25))
    x, layer = torch.randn(9, 24, dtype=torch.float64), before.base_model.model[0]
    torch.manual_seed(3)
    y = after.train()(x)
    torch.manual_seed(3)
    dropped = reference.dropout(x, 0.25, draw_seed(CPU))
    exact = layer.base_layer(x) + 4.0 * layer.lora_B["default"](layer.lora_A["default"](dropped))
    assert torch.allclose(y, exact, rtol=1e-12)
    assert torch.equal(after.eval()(x), after(x))
    assert not torch.equal(after.train()(x), after(x))


def test_pefts_own_ways_go_on_working():
    before, after = _peft()
    x = torch.randn(5, 24)
    with after.disable_adapter():
        assert torch.equal(after(x), after.base_model.model[0].base_layer(x))
    adapted = after(x)
    after.merge_adapter()
    assert torch.allclose(after(x), adapted, atol=1e-5)
    after.unmerge_adapter()
    assert torch.allclose(after(x), before(x), atol=1e-5)


def test_a_variant_of_lora_is_refused():
    config = peft_lora.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model = peft_lora.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    with pytest.raises(ValueError, match=r"must be plain LoRA, got a variant .*'default'"):
        peft_lora.embed(model)


@pytest.mark.parametrize("example", [hydralora, peft_lora])
def test_the_gain_is_printed(example, capsys):
    example.main(["--time", "--size", "32", "--tokens", "8", "--rounds", "3"])
    printed = capsys.readouterr().out
    assert "largest relative difference without dropout: " in printed
    assert "times as fast" in printed
    assert "of 3 rounds" in printed
    difference = float(printed.split("dropout: ")[1].split()[0])
    assert 0.0 < difference < 1e-5


def test_the_ratio_is_taken_in_every_round_whatever_the_order(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(side_by_side.time, "perf_counter", lambda: now[0])

    def call(seconds):
        now[0] += seconds
        order.append(seconds)

    assert side_by_side.ratio(lambda: call(3.0), lambda: call(2.0), 5) == [1.5] * 5
    rounds = list(zip(order[2::2], order[3::2], strict=True))  # without the warm-up
    assert set(rounds) == {(2.0, 3.0), (3.0, 2.0)}
