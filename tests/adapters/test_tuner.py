"""floe as a PEFT method: what a user of PEFT, transformers and the Trainer does with an adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from helpers.importance_models import plain
from helpers.small_adapters import IDS, adapted, logits, trained
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from floe import FileError
from floe.adapters import (
    FloeConfig,
    adapted_layers,
    adapted_modules,
    get_model,
)
from floe.adapters.files import save_adapter
from floe.adapters.linear import module_generator

KINDS = ["llama", "qwen2", "gemma2"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Could not find a config file in .* will assume that the vocabulary was not modified",
    "ignore:`gradient_checkpointing.*` is deprecated and will be removed in v6:FutureWarning",
)


@pytest.fixture(scope="module", params=KINDS)
def base_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    plain(request.param).save_pretrained(folder)
    return request.param, str(folder)


def test_layers_may_adapt_different_projections(tmp_path):
    """What floe.selection.modules chooses: its dict goes into the config as it is."""
    chosen = {2: ("up_proj", "gate_proj"), 0: ("down_proj",)}
    model = trained(get_model(plain(), FloeConfig(r=2, num_experts=2, layer_modules=chosen)))
    adapted_now = {layer: sorted(modules) for layer, modules in adapted_layers(model).items()}
    assert adapted_now == {0: ["down_proj"], 2: ["gate_proj", "up_proj"]}
    save_adapter(model, tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(plain(), tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    config = again.peft_config["default"]
    assert config.layer_modules == {"0": ["down_proj"], "2": ["gate_proj", "up_proj"]}
    assert (config.layers, config.target_modules) == (
        [0, 2],
        ["down_proj", "gate_proj", "up_proj"],
    )


def test_a_fresh_adapter_changes_no_output():
    base = plain()
    expected = logits(base.eval())
    model = peft.get_peft_model(base, FloeConfig(r=3, num_experts=2))
    assert torch.equal(logits(model.eval()), expected)
    assert not torch.equal(logits(trained(model)), expected)


def test_saved_and_loaded_by_every_way_gives_the_same_logits(base_folder, tmp_path):
    kind, folder = base_folder
    model = trained(
        get_model(
            AutoModelForCausalLM.from_pretrained(folder),
            FloeConfig(r=3, num_experts=2, layers=[0, 2]),
        )
    )
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    ways = {
        "PeftModel": lambda: peft.PeftModel.from_pretrained(plain(kind), tmp_path),
        "low memory": lambda: peft.PeftModel.from_pretrained(
            plain(kind), tmp_path, low_cpu_mem_usage=True
        ),
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
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        gradient_checkpointing=True,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
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
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": mode}
            )
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
            str(folder),
            max_steps=4,
            per_device_train_batch_size=1,
            learning_rate=0.01,
            report_to=[],
            save_steps=2,
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return [p for p in model.parameters() if p.requires_grad]

    whole = train(tmp_path / "a", 4)
    resumed = train(tmp_path / "b", 4, resume=str(tmp_path / "a" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    file = tmp_path / "a" / "checkpoint-2" / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(FileError, match="is not what was saved"):
        train(tmp_path / "c", 4, resume=str(file.parent))


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


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_naming_the_way_out(how):
    model = adapted()
    expected = logits(model)
    with pytest.raises(ValueError, match=r"cannot be merged .*floe\.export_lora"):
        getattr(model, how)()
    assert torch.equal(logits(model), expected)


def test_generate_continues_as_step_by_step_argmax_does():
    model = adapted()
    generated = model.generate(
        input_ids=IDS, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(IDS)
    )
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
        layers=[2, 0],
        rank_pattern={"2": 5, "model.layers.0.mlp.down_proj": 1},
        expert_pattern={"0": 4},
        target_modules=["up_proj", "down_proj", "q_proj"],
        alpha=8.0,
    )
    found = {
        (index, name): (s.rank, s.num_experts, s.scaling)
        for index, modules in adapted_layers(model).items()
        for name, s in ((name, m.settings["default"]) for name, m in modules.items())
    }
    assert found == {
        (0, "q_proj"): (3, 4, 8 / 3),
        (0, "up_proj"): (3, 4, 8 / 3),
        (0, "down_proj"): (1, 4, 8.0),
        (2, "q_proj"): (5, 2, 8 / 5),
        (2, "up_proj"): (5, 2, 8 / 5),
        (2, "down_proj"): (5, 2, 8 / 5),
    }
    for module in adapted_modules(model).values():
        rank, experts = module.settings["default"].rank, module.settings["default"].num_experts
        assert module.floe_shrink["default"].weight.shape == (rank + experts, module.in_features)
        assert module.floe_expand["default"].weight.shape == (module.out_features, experts, rank)
    assert model.peft_config["default"].layers == [0, 2]


def test_scaling_by_the_root_of_the_rank():
    module = next(iter(adapted_modules(adapted(r=4, alpha=8.0, scaling="alpha/sqrt(r)")).values()))
    assert module.settings["default"].scaling == 4.0


def test_a_layer_s_first_values_depend_on_the_seed_and_its_path_alone():
    some, every = adapted(layers=[1]), adapted()
    paths = adapted_modules(some)
    for path, module in paths.items():
        assert torch.equal(
            module.floe_shrink["default"].weight,
            adapted_modules(every)[path].floe_shrink["default"].weight,
        )
    shrinks = [m.floe_shrink["default"].weight for m in adapted_modules(every).values()]
    assert not torch.equal(shrinks[0], shrinks[1])
    other = get_model(plain(), FloeConfig(r=3, num_experts=2), seed=42)
    assert other.peft_config["default"].seed == 42
    assert not torch.equal(
        next(iter(adapted_modules(other).values())).floe_shrink["default"].weight, shrinks[0]
    )
    assert module_generator(1, "a").initial_seed() != module_generator(1, "b").initial_seed()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_adapter_keeps_its_own_dtype(dtype, tmp_path):
    model = get_model(
        plain(dtype=torch.bfloat16), FloeConfig(r=2, num_experts=2, adapter_dtype=dtype)
    )
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    assert kinds == {getattr(torch, dtype)}
    assert logits(trained(model)).dtype == torch.bfloat16


TESTS = Path(__file__).parents[1]
SAVE = """
import sys
sys.path[:0] = sys.argv[2:]
from test_tuner import save_unsorted
save_unsorted(sys.argv[1])
"""


def save_unsorted(folder):
    """Save an adapter whose config was given in no particular order."""
    config = FloeConfig(
        r=2,
        num_experts=2,
        layers=[2, 0],
        rank_pattern={"2": 3, "0": 1},
        target_modules=["up_proj", "q_proj", "gate_proj", "down_proj"],
    )
    save_adapter(get_model(plain(), config), folder)


def test_the_same_adapter_is_the_same_bytes_in_any_process(tmp_path):
    """Sets and safetensors' own metadata change their order from process to process."""
    here, there = tmp_path / "here", tmp_path / "there"
    save_unsorted(here)
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    command = [sys.executable, "-c", SAVE, str(there), str(Path(__file__).parent), str(TESTS)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    config = json.loads((here / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert config["layers"] == [0, 2]


def test_registration_is_idempotent_and_an_enum_member():
    import importlib

    import floe.adapters.tuner as tuner

    assert peft.PeftType("FLOE") is peft.PeftType["FLOE"] is peft.PeftType.FLOE
    assert peft.PeftType.FLOE.value == "FLOE"
    assert tuner.peft_type() is peft.PeftType.FLOE
    assert sum(str(k.value) == "FLOE" for k in peft.PeftType) == 1
    assert importlib.import_module("floe.adapters.tuner") is tuner
