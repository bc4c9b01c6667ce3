"""Adapters that route by top-k, at a temperature, or with an A for every expert."""

import peft
import pytest
import torch
from floe_triton import reference
from helpers.importance_models import batches, plain
from helpers.small_adapters import IDS, adapted, logits

import floe
from floe import FileError
from floe.adapters import FloeConfig, adapted_modules

ROUTERS = [
    {"top_k": 2, "num_experts": 4},
    {"temperature": 0.3},
    {"shared_a": False},
    {"shared_a": False, "r": 1, "num_experts": 8, "top_k": 3, "temperature": 2.0},
]


def by_definition(model):
    """Every adapted layer replaced by the definition of what it computes."""

    def forward(layer):
        settings = layer.settings["default"]

        def run(x):
            shrink, expand = layer.adapter("default")
            y = layer.base_layer(x)
            return y + reference.moe_lora_delta(
                x,
                shrink,
                expand,
                scaling=settings.scaling,
                temperature=settings.temperature,
                top_k=settings.top_k,
            )

        return run

    for module in adapted_modules(model).values():
        module.forward = forward(module)
    return model


@pytest.mark.parametrize("settings", ROUTERS, ids=str)
@pytest.mark.parametrize("targets", [None, ["q_proj", "k_proj", "v_proj"]], ids=str)
def test_a_model_computes_what_its_settings_say(settings, targets):
    settings = settings | {"target_modules": targets}
    model = adapted(**settings)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(loss, by_definition(model)(IDS, labels=IDS).loss)
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    assert len(grads) == 2 * len(adapted_modules(model))
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(grads[name], parameter.grad)


@pytest.mark.parametrize("settings", ROUTERS, ids=str)
def test_it_is_saved_and_loaded_with_its_router(settings, tmp_path):
    model = adapted(**settings)
    floe.save_adapter(model, tmp_path / "adapter")
    for loaded in (
        floe.load_adapter(plain("llama"), tmp_path / "adapter"),
        peft.PeftModel.from_pretrained(plain("llama"), tmp_path / "adapter"),
    ):
        assert torch.equal(logits(loaded.eval()), logits(model))
        config = loaded.peft_config["default"]
        assert {name: getattr(config, name) for name in settings} == settings


def test_another_layout_of_a_is_refused(tmp_path):
    floe.save_adapter(adapted(shared_a=False), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace('"shared_a": false', '"shared_a": true'))
    with pytest.raises(FileError):
        floe.load_adapter(plain("llama"), tmp_path / "adapter")


def test_gates_say_which_experts_a_token_uses():
    model = adapted(top_k=2, num_experts=4)
    layer = next(iter(adapted_modules(model).values()))
    gates = layer.gates("default", torch.randn(50, layer.in_features))
    assert ((gates > 0).sum(1) == 2).all()
    torch.testing.assert_close(gates.sum(1), torch.ones(50))


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_experts_with_an_a_each_are_exported_as_one_lora_of_all_ranks(scaling, tmp_path):
    model = adapted(shared_a=False, rank_pattern={"1": 2}, scaling=scaling)
    for module in adapted_modules(model).values():
        module.router_weight("default").data.zero_()
    report = floe.export_lora(model, tmp_path / "lora", batches(size=2))
    assert report.worst < 1e-6
    lora = peft.PeftModel.from_pretrained(plain("llama"), report.path).eval()
    torch.testing.assert_close(logits(lora), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 3, "num_experts": 2}, r"top_k must be 0 \(all\) or in \[1, 2\].*got 3"),
        ({"top_k": 2, "expert_pattern": {"1": 1}}, r"in \[1, 1\], the fewest experts"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"temperature": 0.0}, "temperature must be a finite number >= 1e-06, got 0.0"),
    ],
    ids=str,
)
def test_what_makes_no_router_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FloeConfig(**settings)


@pytest.mark.parametrize("settings", [{"top_k": 1.0}, {"shared_a": 1}, {"temperature": True}])
def test_other_types_are_refused(settings):
    with pytest.raises(TypeError, match=f"{next(iter(settings))} must be"):
        FloeConfig(**settings)
