"""floe as a PEFT method: everything a user of PEFT, transformers and the Trainer does with an adapter."""

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from importance_models import plain
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from floe.adapters import (
    FloeConfig,
    MoELoRALinear,
    adapted_layers,
    adapted_modules,
    get_model,
    separate_base,
)
from floe.adapters.files import save_adapter
from floe.adapters.moe_lora import module_generator

KINDS = ["llama", "qwen2", "gemma2"]
IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings(
    "ignore:Could not find a config file in .* will assume that the vocabulary was not modified",
    "ignore:`gradient_checkpointing.*` is deprecated and will be removed in v6:FutureWarning",
)


def trained(model, name="default", seed=5):
    """Give the experts values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for module in adapted_modules(model).values():
        if name in module.floe_expand:
            expand = module.floe_expand[name]
            expand.data.copy_(torch.randn(expand.shape, generator=generator) * 0.1)
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def adapted(kind="llama", **settings):
    return trained(get_model(plain(kind), FloeConfig(**dict(r=3, num_experts=2) | settings)))


@pytest.fixture(scope="module", params=KINDS)
def base_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    plain(request.param).save_pretrained(folder)
    return request.param, str(folder)


def test_a_fresh_adapter_changes_no_output():
    base = plain()
    expected = logits(base.eval())
    model = peft.get_peft_model(base, FloeConfig(r=3, num_experts=2))
    assert torch.equal(logits(model.eval()), expected)
    assert not torch.equal(logits(trained(model)), expected)


def test_saved_and_loaded_by_every_way_gives_the_same_logits(base_folder, tmp_path):
    kind, folder = base_folder
    model = trained(get_model(AutoModelForCausalLM.from_pretrained(folder), FloeConfig(r=3, num_experts=2, layers=[0, 2])))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    ways = {
        "PeftModel": lambda: peft.PeftModel.from_pretrained(plain(kind), tmp_path),
        "low memory": lambda: peft.PeftModel.from_pretrained(plain(kind), tmp_path, low_cpu_mem_usage=True),
        "AutoPeftModel": lambda: peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
        "transformers": lambda: _loaded_by_transformers(plain(kind), tmp_path),
    }
    for name, load in ways.items():
        assert torch.equal(logits(load().eval()), expected), name


def _loaded_by_transformers(model, folder):
    model.load_adapter(str(folder))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_trains_the_adapter_alone(kind, tmp_path):
    model = get_model(plain(kind), FloeConfig(r=2, num_experts=2, layers=[1, 2], dropout=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in torch.cat([IDS, IDS + 1])]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.01,
        gradient_checkpointing=True, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert changed == trainable
    assert all(".floe_shrink." in n or ".floe_expand." in n for n in trainable)
    assert len(trainable) == 2 * 2 * 3
    assert not any("layers.0." in n for n in trainable)


def test_gradient_checkpointing_with_dropout_changes_no_gradient():
    def gradients(mode):
        torch.manual_seed(11)
        model = adapted(dropout=0.3).train()
        if mode is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    expected = gradients(None)
    for mode in (True, False):
        for actual, wanted in zip(gradients(mode), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-7)
    assert all(grad.abs().max() > 0 for grad in expected)


def test_a_resumed_training_ends_at_the_same_bytes(tmp_path):
    def train(folder, steps, resume=None):
        torch.manual_seed(0)
        model = get_model(plain(), FloeConfig(r=2, num_experts=2, dropout=0.2))
        rows = [{"input_ids": row, "labels": row} for row in torch.cat([IDS, IDS + 1])]
        arguments = TrainingArguments(
            str(folder), max_steps=4, per_device_train_batch_size=1, learning_rate=0.01, report_to=[],
            save_steps=2, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return [p for p in model.parameters() if p.requires_grad]

    whole = train(tmp_path / "a", 4)
    resumed = train(tmp_path / "b", 4, resume=str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_adapters_are_added_chosen_switched_off_and_deleted():
    base = logits(plain().eval())
    model = adapted(layers=[0])
    first = logits(model)
    model.add_adapter("second", FloeConfig(r=2, num_experts=3, layers=[0, 1]))
    trained(model, "second", seed=6)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "second"])
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any("second" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model.unload()), base)


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


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_naming_the_way_out(how):
    model = adapted()
    expected = logits(model)
    with pytest.raises(ValueError, match=r"cannot be merged .*floe\.export_lora"):
        getattr(model, how)()
    assert torch.equal(logits(model), expected)


def test_generate_continues_as_step_by_step_argmax_does():
    model = adapted()
    generated = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(IDS))
    ids = IDS
    for _ in range(generated.shape[1] - IDS.shape[1]):
        ids = torch.cat([ids, logits(model, ids)[:, -1].argmax(-1, keepdim=True)], 1)
    ended = (generated[:, IDS.shape[1] :] == 2).any(1)  # eos: padded from there
    assert torch.equal(generated[~ended], ids[~ended])
    assert not ended.all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_means_the_same_alone_and_in_a_padded_batch(kind):
    model = adapted(kind)
    short = IDS[1:, 3:]
    batch = torch.cat([IDS[:1], torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(input_ids=batch, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(together[:1], logits(model, IDS[:1]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[1:, 3:], logits(model, short), rtol=0, atol=1e-5)


def test_only_the_chosen_layers_carry_adapters_of_their_own_size():
    model = adapted(
        layers=[2, 0], rank_pattern={"2": 5, "model.layers.0.mlp.down_proj": 1}, expert_pattern={"0": 4},
        target_modules=["up_proj", "down_proj", "q_proj"], alpha=8.0,
    )  # fmt: skip
    found = {
        (index, name): (m.r["default"], m.num_experts["default"], m.scaling["default"])
        for index, modules in adapted_layers(model).items()
        for name, m in modules.items()
    }
    assert found == {
        (0, "q_proj"): (3, 4, 8 / 3), (0, "up_proj"): (3, 4, 8 / 3), (0, "down_proj"): (1, 4, 8.0),
        (2, "q_proj"): (5, 2, 8 / 5), (2, "up_proj"): (5, 2, 8 / 5), (2, "down_proj"): (5, 2, 8 / 5),
    }  # fmt: skip
    for module in adapted_modules(model).values():
        rank, experts = module.r["default"], module.num_experts["default"]
        assert module.floe_shrink["default"].shape == (rank + experts, module.in_features)
        assert module.floe_expand["default"].shape == (module.out_features, experts, rank)
    assert model.peft_config["default"].layers == [0, 2]


def test_scaling_by_the_root_of_the_rank():
    module = next(iter(adapted_modules(adapted(r=4, alpha=8.0, scaling="alpha/sqrt(r)")).values()))
    assert module.scaling["default"] == 4.0


def test_a_layer_s_first_values_depend_on_the_seed_and_its_path_alone():
    some, every = adapted(layers=[1]), adapted()
    paths = adapted_modules(some)
    for path, module in paths.items():
        assert torch.equal(module.floe_shrink["default"], adapted_modules(every)[path].floe_shrink["default"])
    shrinks = [m.floe_shrink["default"] for m in adapted_modules(every).values()]
    assert not torch.equal(shrinks[0], shrinks[1])
    other = get_model(plain(), FloeConfig(r=3, num_experts=2), seed=42)
    assert other.peft_config["default"].seed == 42
    assert not torch.equal(next(iter(adapted_modules(other).values())).floe_shrink["default"], shrinks[0])
    assert module_generator(1, "a").initial_seed() != module_generator(1, "b").initial_seed()


def test_first_values_are_uniform_within_one_over_the_root_of_the_width():
    layer = MoELoRALinear(nn.Linear(64, 8))
    layer.update_layer("default", 40, 24, 1.0, 0.0, torch.Generator().manual_seed(0))
    shrink = layer.floe_shrink["default"]
    assert 0.99 / 8 < shrink.max() <= 1 / 8
    assert -1 / 8 <= shrink.min() < -0.99 / 8
    assert abs(shrink.mean()) < 0.01
    assert (layer.floe_expand["default"] == 0).all()
    assert layer.router_weight("default").shape == (24, 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_adapter_keeps_its_own_dtype(dtype, tmp_path):
    model = get_model(plain(dtype=torch.bfloat16), FloeConfig(r=2, num_experts=2, adapter_dtype=dtype))
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    assert kinds == {getattr(torch, dtype)}
    assert logits(trained(model)).dtype == torch.bfloat16


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
    layer.base_layer.bias = nn.Parameter(torch.zeros(layer.out_features))  # trainable: torch must see it
    model(IDS).logits.sum().backward()
    assert layer.base_layer.bias.grad is not None


def test_separate_base_is_undone_after_an_error():
    model = adapted(layers=[0])
    with pytest.raises(RuntimeError, match="stop"), separate_base(model):
        raise RuntimeError("stop")
    assert not any(m.calls_base for m in adapted_modules(model).values())


SAVE = """
import sys
sys.path.insert(0, sys.argv[2])
from test_peft_tuner import save_unsorted
save_unsorted(sys.argv[1])
"""


def save_unsorted(folder):
    """Save an adapter whose config was given in no particular order."""
    config = FloeConfig(
        r=2, num_experts=2, layers=[2, 0], rank_pattern={"2": 3, "0": 1},
        target_modules=["up_proj", "q_proj", "gate_proj", "down_proj"],
    )  # fmt: skip
    save_adapter(get_model(plain(), config), folder)


def test_the_same_adapter_is_the_same_bytes_in_any_process(tmp_path):
    """Sets and safetensors' own metadata change their order from process to process."""
    here, there = tmp_path / "here", tmp_path / "there"
    save_unsorted(here)
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command = [sys.executable, "-c", SAVE, str(there), os.path.dirname(__file__)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    config = json.loads((here / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert config["layers"] == [0, 2]


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
    "rank 0": (dict(r=0), ValueError, "r must be a whole number >= 1, got 0"),
    "rank 1.5": (dict(r=1.5), TypeError, "r must be a whole number >= 1, got 1.5"),
    "rank True": (dict(r=True), TypeError, "r must be a whole number >= 1, got True"),
    "no experts": (dict(num_experts=-1), ValueError, "num_experts must be a whole number >= 1, got -1"),
    "alpha nan": (dict(alpha=float("nan")), ValueError, "alpha must be a finite number > 0, got nan"),
    "alpha 0": (dict(alpha=0), ValueError, "alpha must be a finite number > 0, got 0"),
    "alpha text": (dict(alpha="32"), TypeError, "alpha must be a number, got '32'"),
    "dropout 1": (dict(dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    "dropout None": (dict(dropout=None), TypeError, "dropout must be a number, got None"),
    "scaling": (dict(scaling="alpha"), ValueError, "scaling must be 'alpha/r' or 'alpha/sqrt\\(r\\)', got 'alpha'"),
    "dtype": (dict(adapter_dtype="int8"), ValueError, "adapter_dtype must be one of .*, got 'int8'"),
    "pattern as target": (dict(target_modules=".*proj"), ValueError, "target_modules must be a list of projection names .*got '.*proj'"),
    "no layers": (dict(layers=[]), ValueError, "layers must name at least one block, got an empty list"),
    "layer -1": (dict(layers=[-1]), ValueError, "layers must be block indices >= 0, got -1"),
    "layer 0.5": (dict(layers=[0.5]), ValueError, "layers must be block indices >= 0, got 0.5"),
    "pattern rank": (dict(rank_pattern={"0": 0}), ValueError, "rank_pattern must be a whole number >= 1, got 0"),
    "pattern list": (dict(expert_pattern=[1]), TypeError, r"expert_pattern must map layer indices .*got \[1\]"),
    "newer format": (dict(floe_format=2), ValueError, r"floe_format must be in \[1, 1\] .*got 2: .*newer floe; upgrade"),
    "format 0": (dict(floe_format=0), ValueError, r"floe_format must be in \[1, 1\] .*got 0"),
    "seed": (dict(seed="x"), TypeError, "seed must be a whole number, got 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_named(name):
    settings, error, text = BAD[name]
    with pytest.raises(error, match=text):
        FloeConfig(**settings)


UNFIT = {
    "layer out of range": (dict(layers=[0, 3, 7]), r"layers must be in \[0, 2\] for this model, got \[3, 7\]"),
    "unknown module": (dict(target_modules=["up_proj", "up"]), r"target_modules must be among this model's projections .*got \['up'\]"),
    "pattern of no layer": (dict(layers=[0], rank_pattern={"1": 2}), "rank_pattern keys must be adapted layers or module paths, got '1'"),
    "pattern of no path": (dict(expert_pattern={"mlp": 2}), "expert_pattern keys must be adapted layers or module paths, got 'mlp'"),
}  # fmt: skip


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
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.up_proj must be a linear layer .*got Conv1d"):
        get_model(base, FloeConfig())
    assert not any(isinstance(m, MoELoRALinear) for m in base.modules())


def test_a_config_serves_two_models():
    config = FloeConfig(r=2, num_experts=2, layers=[0], rank_pattern={"0": 1})
    first = get_model(plain(), config)
    second = get_model(plain("qwen2"), config)
    assert config.rank_pattern == {"0": 1}
    assert len(adapted_modules(first)) == len(adapted_modules(second)) == 3


def test_registration_is_idempotent_and_an_enum_member():
    import importlib

    import floe.adapters.peft_tuner as tuner

    assert peft.PeftType("FLOE") is peft.PeftType["FLOE"] is peft.PeftType.FLOE
    assert peft.PeftType.FLOE.value == "FLOE"
    assert tuner._peft_type() is peft.PeftType.FLOE
    assert sum(str(k.value) == "FLOE" for k in peft.PeftType) == 1
    assert importlib.import_module("floe.adapters.peft_tuner") is tuner
