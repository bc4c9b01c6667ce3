"""A routed adapter as plain LoRA: exact for a constant router, with an honest error elsewhere."""

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from helpers.importance_models import batches, plain
from helpers.small_adapters import IDS, adapted, logits

import floe
from floe import FileError, export_lora
from floe.adapters import FloeConfig, adapted_modules, get_model

BATCHES = batches(size=2)


def constant_routers(model):
    """The same gates for every token: logits of zero times x."""
    for module in adapted_modules(model).values():
        module.router_weight("default").data.zero_()
    return model


def as_lora(folder, kind="llama"):
    return peft.PeftModel.from_pretrained(plain(kind), folder).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_a_constant_router_is_exported_exactly(kind, tmp_path):
    model = constant_routers(adapted(kind, layers=[0, 2], rank_pattern={"2": 5}))
    report = export_lora(model, tmp_path / "lora", BATCHES)
    assert report.path == tmp_path / "lora"
    assert report.worst < 1e-6
    torch.testing.assert_close(logits(as_lora(report.path, kind)), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"scaling": "alpha/sqrt(r)", "alpha": 3.0, "rank_pattern": {"1": 2}}], ids=str
)
def test_the_reported_error_is_the_one_found_by_hand(settings, tmp_path):
    """For each module: difference of both adapters' outputs on its own inputs, real tokens only."""
    model = adapted(layers=[0, 1], **settings)
    for module in adapted_modules(model).values():
        module.router_weight("default").data.mul_(40)  # gates that do depend on the token
    report = export_lora(model, tmp_path / "lora", BATCHES)
    inputs = {path: [] for path in adapted_modules(model)}
    handles = [
        m.register_forward_pre_hook(lambda layer, args, path=path: inputs[path].append(args[0]))
        for path, m in adapted_modules(model).items()
    ]
    real = []
    for batch in BATCHES:
        real.append(batch["attention_mask"].bool())
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    lora = as_lora(report.path).base_model.model
    assert set(report.module_error) == set(inputs)
    for path, module in adapted_modules(model).items():
        x = torch.cat([x[keep] for x, keep in zip(inputs[path], real, strict=True)])
        with torch.no_grad():
            base = module.base_layer(x).double()
            routed, plain_lora = (
                module(x).double() - base,
                lora.get_submodule(path)(x).double() - base,
            )
        error = float((plain_lora - routed).norm() / routed.norm())
        assert report.module_error[path] == pytest.approx(error, rel=1e-3)
    assert report.worst == max(report.module_error.values()) > 0.02


def test_padding_does_not_count(tmp_path):
    model = adapted(layers=[0])
    clean = export_lora(model, tmp_path / "a", BATCHES)
    spoiled = [
        b | {"input_ids": b["input_ids"].masked_fill(b["attention_mask"] == 0, 60)} for b in BATCHES
    ]
    assert export_lora(model, tmp_path / "b", spoiled).module_error == pytest.approx(
        clean.module_error, rel=1e-4
    )


STOCK = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
base, folder, out = sys.argv[1:]
ids = torch.tensor({ids})
def logits(model):
    with torch.no_grad():
        return model.eval()(ids).logits
model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
before = logits(model)
torch.save([before, logits(model.merge_and_unload())], out)
assert not any(name.partition(".")[0].startswith("floe") for name in sys.modules)
"""


def test_a_process_without_floe_loads_and_merges_it(tmp_path):
    base = plain()
    base.save_pretrained(tmp_path / "base")
    model = constant_routers(adapted(layers=[1]))
    export_lora(model, tmp_path / "lora", BATCHES)
    script = STOCK.format(ids=IDS.tolist())
    command = [
        sys.executable,
        "-c",
        script,
        *(str(tmp_path / n) for n in ("base", "lora", "out.pt")),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    loaded, merged = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(loaded, logits(model), rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, loaded, rtol=0, atol=1e-5)


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = adapted(layers=[0]).train()
    export_lora(model, tmp_path / "lora", BATCHES)
    assert model.training
    assert not any(m._forward_pre_hooks for m in adapted_modules(model).values())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["inference_mode"] is True
    assert [f.name for f in tmp_path.iterdir()] == ["lora"]


def test_only_the_named_adapter_is_exported(tmp_path):
    model = adapted(layers=[0])
    model.add_adapter("second", FloeConfig(r=2, num_experts=2, layers=[1]))
    with pytest.raises(
        ValueError, match=r"adapter 'second' must be active to be measured, got \['default'\]"
    ):
        export_lora(model, tmp_path / "lora", BATCHES, adapter_name="second")
    model.set_adapter("second")
    report = export_lora(model, tmp_path / "lora", BATCHES, adapter_name="second")
    assert all(".layers.1." in path for path in report.module_error)


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model must hold a floe adapter named 'x', got NoneType"):
        export_lora(adapted(layers=[0]), tmp_path / "lora", BATCHES, adapter_name="x")
    lora = peft.get_peft_model(
        plain(), peft.LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM")
    )
    with pytest.raises(
        ValueError, match="model must hold a floe adapter named 'default', got LoraConfig"
    ):
        export_lora(lora, tmp_path / "lora", BATCHES)
    with pytest.raises(ValueError, match="batches must hold at least one token, got none"):
        export_lora(adapted(layers=[0]), tmp_path / "lora", [])
    whole = get_model(plain(), FloeConfig(r=2, modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"no modules_to_save .* got .'lm_head'. and None"):
        export_lora(whole, tmp_path / "lora", BATCHES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["itself", "link", "through", "lora", "file"])
def test_a_folder_in_use_is_not_written_to(how, tmp_path):
    model = adapted(layers=[0])
    folder = tmp_path / "adapter"
    floe.save_adapter(model, folder)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    target = {
        "itself": folder,
        "link": tmp_path / "link",
        "through": tmp_path / "lora/../adapter",
        "lora": tmp_path / "lora",
        "file": folder / "README.md",
    }[how]
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(FileError, match="not overwritten"):
        export_lora(model, target, BATCHES)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export_lora(adapted(layers=[0]), tmp_path / "link", BATCHES)
    assert len(list((tmp_path / "empty").iterdir())) == 2


def test_a_fresh_adapter_has_no_error(tmp_path):
    model = get_model(plain(), FloeConfig(r=2, num_experts=2, layers=[0]))
    assert floe.export_lora(model, tmp_path / "lora", BATCHES).worst == 0.0
