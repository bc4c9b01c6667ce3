"""Settings of an adapter that are wrong, or do not fit the model: named, and nothing is changed."""

import peft
import pytest
from helpers.importance_models import plain
from helpers.small_adapters import adapted
from torch import nn

from floe.adapters import FloeConfig, MoELoRALinear, adapted_modules, get_model


@pytest.mark.parametrize("name", ["../x", "/tmp/evil", "a/b", "a.b", "a\\b", "a b", "a\0"])
def test_adapter_names_are_never_paths(name):
    base = plain()
    with pytest.raises(ValueError, match="adapter_name must hold only letters, digits"):
        peft.get_peft_model(base, FloeConfig(r=2), adapter_name=name)
    model = adapted()
    with pytest.raises(ValueError, match="adapter_name must hold only letters, digits"):
        model.add_adapter(name, FloeConfig(r=2))
    assert list(model.peft_config) == ["default"]


BAD = {
    "rank 0": ({"r": 0}, ValueError, "r must be a whole number >= 1, got 0"),
    "rank 1.5": ({"r": 1.5}, TypeError, "r must be a whole number >= 1, got 1.5"),
    "rank True": ({"r": True}, TypeError, "r must be a whole number >= 1, got True"),
    "no experts": (
        {"num_experts": -1},
        ValueError,
        "num_experts must be a whole number >= 1, got -1",
    ),
    "alpha nan": (
        {"alpha": float("nan")},
        ValueError,
        "alpha must be a finite number > 0, got nan",
    ),
    "alpha 0": ({"alpha": 0}, ValueError, "alpha must be a finite number > 0, got 0"),
    "alpha text": ({"alpha": "32"}, TypeError, "alpha must be a number, got '32'"),
    "dropout 1": ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    "dropout None": ({"dropout": None}, TypeError, "dropout must be a number, got None"),
    "scaling": (
        {"scaling": "alpha"},
        ValueError,
        "scaling must be 'alpha/r' or 'alpha/sqrt\\(r\\)', got 'alpha'",
    ),
    "dtype": (
        {"adapter_dtype": "int8"},
        ValueError,
        "adapter_dtype must be one of .*, got 'int8'",
    ),
    "pattern as target": (
        {"target_modules": ".*proj"},
        ValueError,
        "target_modules must be a list of projection names .*got '.*proj'",
    ),
    "no layers": (
        {"layers": []},
        ValueError,
        "layers must name at least one block, got an empty list",
    ),
    "layer -1": ({"layers": [-1]}, ValueError, "layers must be block indices >= 0, got -1"),
    "layer 0.5": ({"layers": [0.5]}, ValueError, "layers must be block indices >= 0, got 0.5"),
    "pattern rank": (
        {"rank_pattern": {"0": 0}},
        ValueError,
        "rank_pattern must be a whole number >= 1, got 0",
    ),
    "pattern twice": (
        {"rank_pattern": {1: 2, "1": 3}},
        ValueError,
        "rank_pattern must name each key once",
    ),
    "pattern list": (
        {"expert_pattern": [1]},
        TypeError,
        r"expert_pattern must map layer indices .*got \[1\]",
    ),
    "module of no index": (
        {"layer_modules": {"a": ["up_proj"]}},
        ValueError,
        "layer_modules keys must be block indices >= 0, got 'a'",
    ),
    "layer without modules": (
        {"layer_modules": {"0": []}},
        ValueError,
        "layer_modules must map layer indices to projection names, at least one each",
    ),
    "modules and layers": (
        {"layer_modules": {1: ["up_proj"]}, "layers": [0, 1]},
        ValueError,
        r"layers must be left out or \[1\] with these layer_modules, got \[0, 1\]",
    ),
    "newer format": (
        {"floe_format": 3},
        ValueError,
        r"floe_format must be in \[1, 2\] .*got 3: .*newer floe; upgrade",
    ),
    "format 0": ({"floe_format": 0}, ValueError, r"floe_format must be in \[1, 2\] .*got 0"),
    "seed": ({"seed": "x"}, TypeError, "seed must be a whole number, got 'x'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_named(name):
    settings, error, text = BAD[name]
    with pytest.raises(error, match=text):
        FloeConfig(**settings)


UNFIT = {
    "layer out of range": (
        {"layers": [0, 3, 7]},
        r"layers must be in \[0, 2\] for this model, got \[3, 7\]",
    ),
    "unknown module": (
        {"target_modules": ["up_proj", "up"]},
        r"target_modules must be among this model's projections .*got \['up'\]",
    ),
    "pattern of no layer": (
        {"layers": [0], "rank_pattern": {"1": 2}},
        "rank_pattern keys must be adapted layers or module paths, got '1'",
    ),
    "pattern of no path": (
        {"expert_pattern": {"mlp": 2}},
        "expert_pattern keys must be adapted layers or module paths, got 'mlp'",
    ),
}


@pytest.mark.parametrize("make", [get_model, peft.get_peft_model])
@pytest.mark.parametrize("name", UNFIT)
def test_a_config_that_does_not_fit_leaves_the_model_as_it_was(name, make):
    settings, text = UNFIT[name]
    base = plain()
    before = {path: type(m) for path, m in base.named_modules()}
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    with pytest.raises(ValueError, match=text):
        make(base, FloeConfig(**settings))
    assert {path: type(m) for path, m in base.named_modules()} == before
    assert {n: p.requires_grad for n, p in base.named_parameters()} == flags


def test_a_projection_that_is_no_linear_is_refused_before_any_is_wrapped():
    base = plain()
    base.model.layers[2].mlp.up_proj = nn.Conv1d(4, 4, 1)
    with pytest.raises(
        ValueError, match=r"model.layers.2.mlp.up_proj must be a linear layer .*got Conv1d"
    ):
        get_model(base, FloeConfig())
    assert not any(isinstance(m, MoELoRALinear) for m in base.modules())


@pytest.mark.parametrize("reverse", [False, True])
def test_a_path_goes_before_its_layer_in_whatever_order_they_are_given(reverse):
    path = "model.layers.1.mlp.up_proj"
    pattern = dict(sorted({path: 3, "1": 5}.items(), reverse=reverse))
    layers = adapted_modules(get_model(plain(), FloeConfig(r=2, rank_pattern=pattern)))
    assert {p: m.settings["default"].rank for p, m in layers.items() if ".1." in p} == {
        path.replace("up_proj", name): 3 if name == "up_proj" else 5
        for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_a_config_serves_two_models():
    config = FloeConfig(r=2, num_experts=2, layers=[0], rank_pattern={"0": 1})
    first = get_model(plain(), config)
    second = get_model(plain("qwen2"), config)
    assert config.rank_pattern == {"0": 1}
    assert len(adapted_modules(first)) == len(adapted_modules(second)) == 3
