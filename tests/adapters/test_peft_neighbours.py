"""An adapted model among its neighbours: other adapters, heads, wrappers, copies, its base."""

import copy
import gc
from functools import partial

import peft
import pytest
import torch
from helpers.importance_models import SIZES, plain
from helpers.small_adapters import IDS, adapted, logits, trained
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

from floe.adapters import FloeConfig, adapted_modules, get_model, remove_adapters
from floe.adapters.files import load_adapter, save_adapter
from floe.adapters.fingerprint import fingerprint, same_base

SMALL = {"r": 2, "num_experts": 2, "dropout": 0.0}


def lora(base, **settings):
    base.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, **settings))
    return base


def classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3))


# Names


def test_parameters_are_named_as_peft_names_them():
    """Tools copy an adapter by replacing its name between dots, as TRL does for a reference."""
    model = adapted(layers=[1])
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter)
    expected = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    base = remove_adapters(model)
    assert not torch.equal(logits(base), expected)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_adapter_dtype_decides_whoever_adds_it(tmp_path, kind):
    model = peft.get_peft_model(
        plain(dtype=torch.bfloat16), FloeConfig(**SMALL, layers=[0], adapter_dtype=kind)
    )
    weights = [p for p in model.parameters() if p.requires_grad]
    assert {str(p.dtype) for p in weights} == {f"torch.{kind}"}
    save_adapter(trained(model), tmp_path / "a")
    again = load_adapter(plain(dtype=torch.bfloat16), tmp_path / "a")
    for (name, mine), other in zip(
        adapted_modules(model).items(), adapted_modules(again).values(), strict=True
    ):
        assert all(map(torch.equal, mine.adapter("default"), other.adapter("default"))), name


def test_what_is_saved_says_its_own_dtype(tmp_path):
    """An engine that trains in bfloat16 casts what was made as float32."""
    model = adapted(layers=[0])
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(tmp_path / "a")
    assert FloeConfig.from_pretrained(tmp_path / "a").adapter_dtype == "bfloat16"


def test_placeholders_of_a_sharded_adapter_are_not_saved(tmp_path):
    model = adapted(layers=[0])
    leaf = adapted_modules(model)["model.layers.0.mlp.up_proj"].floe_expand["default"]
    leaf.weight.data = torch.empty(0)
    for name, save in {"a": model.save_pretrained, "b": partial(save_adapter, model)}.items():
        with pytest.raises(ValueError, match=r"up_proj\S* must be whole, .* got \(0,\)"):
            save(tmp_path / name)
        assert not (tmp_path / name / "adapter_model.safetensors").exists()


# Tasks and heads


def test_a_decoder_without_a_head_is_wrapped():
    torch.manual_seed(0)
    model = peft.get_peft_model(LlamaModel(LlamaConfig(**SIZES)), FloeConfig(**SMALL))
    assert model.peft_config["default"].task_type is None
    assert model(IDS).last_hidden_state.isfinite().all()


def test_a_model_that_generates_gets_its_task():
    assert get_model(plain(), FloeConfig(**SMALL)).peft_config["default"].task_type == "CAUSAL_LM"


def test_the_feed_forward_is_adapted_where_nothing_is_named():
    model = get_model(plain("phi3"), FloeConfig(**SMALL, layers=[0]))
    assert model.peft_config["default"].target_modules == ["down_proj", "gate_up_proj"]


@pytest.mark.parametrize("load", [load_adapter, peft.PeftModel.from_pretrained])
@pytest.mark.parametrize(
    "config", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["norm"]}, {}], ids=str
)
def test_a_head_and_whole_modules_are_trained_and_saved(tmp_path, config, load):
    model = trained(peft.get_peft_model(classifier(), FloeConfig(**SMALL, layers=[0], **config)))
    own = [n for n, p in model.named_parameters() if p.requires_grad and "floe_" not in n]
    assert bool(own) == bool(config)
    with torch.no_grad():
        for name in own:
            model.get_parameter(name).add_(0.5)
    model.save_pretrained(tmp_path / "a")
    again = load(classifier(), tmp_path / "a").eval()
    assert torch.equal(logits(again), logits(model.eval()))


def test_rows_of_the_embedding_are_trained_and_saved(tmp_path):
    config = FloeConfig(**SMALL, layers=[0], trainable_token_indices=[3, 5])
    model = trained(get_model(plain(), config))
    (row,) = (p for n, p in model.named_parameters() if p.requires_grad and "floe_" not in n)
    row.data.add_(0.5)
    save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(load_adapter(plain(), tmp_path / "a")), logits(model.eval()))


# Other adapters


def test_two_adapters_may_adapt_different_projections_of_one_input():
    for share in (True, False):
        model = get_model(
            plain(), FloeConfig(**SMALL, target_modules=["q_proj", "k_proj"], share_input=share)
        )
        model.add_adapter(
            "second", FloeConfig(**SMALL, target_modules=["k_proj", "v_proj"], share_input=share)
        )
        trained(trained(model), "second", seed=6)
        alone = trained(
            get_model(plain(), FloeConfig(**SMALL, target_modules=["k_proj", "v_proj"], seed=41)),
            seed=6,
        )
        model.set_adapter("second")
        torch.testing.assert_close(logits(model), logits(alone))


def test_a_mixed_batch_gives_each_row_its_own_adapter():
    model = adapted(layers=[0, 1])
    model.add_adapter("other", FloeConfig(**SMALL, layers=[1, 2], target_modules=["q_proj"]))
    trained(model, "other", seed=6)
    with torch.no_grad():
        mixed = model(IDS.repeat(2, 1), adapter_names=["other", "default", "__base__", "other"])
    rows = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        rows[name] = logits(model)
    with model.disable_adapter():
        rows["__base__"] = logits(model)
    for i, (name, row) in enumerate([("other", 0), ("default", 1), ("__base__", 0), ("other", 1)]):
        torch.testing.assert_close(mixed.logits[i], rows[name][row], msg=f"row {i}: {name}")
    torch.testing.assert_close(logits(model), rows["other"])  # nothing of it stays


def test_mixed_batches_generate_with_beams():
    model = adapted(layers=[0])
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    mixed = model.generate(input_ids=IDS, adapter_names=["__base__", "default"], **options)
    alone = model.generate(input_ids=IDS[1:], **options)
    assert torch.equal(mixed[1, : alone.shape[1]], alone[0])


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["default", "nope"], r"adapter_names must be among \['default'\] or '__base__', got \['n"),
        (["default"], "adapter_names must hold one name for each of the input's 2 rows, got 1"),
    ],
)
def test_wrong_adapter_names_are_refused(names, text):
    with pytest.raises(ValueError, match=text):
        adapted(layers=[0])(IDS, adapter_names=names)


def test_a_mixed_batch_is_not_trained():
    with pytest.raises(ValueError, match="must be None in training mode"):
        adapted(layers=[0]).train()(IDS, adapter_names=["default", "default"])


def test_an_adapter_of_another_method_belongs_to_the_base(tmp_path):
    base = lora(plain(), target_modules=["q_proj", "up_proj"]).eval()
    before, names = logits(base), {n for n, p in base.named_parameters() if p.requires_grad}
    model = trained(get_model(base, FloeConfig(**SMALL, layers=[1])))
    assert not any("lora" in n for n, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    assert not any("lora" in n for n, p in model.named_parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    save_adapter(model, tmp_path / "a")
    other = lora(plain(), target_modules=["q_proj", "up_proj"])
    again = load_adapter(other, tmp_path / "a", other_base=True)
    state = again.state_dict()
    again.load_state_dict(
        {n: t for n, t in model.state_dict().items() if "lora" in n}
        | {n: t for n, t in state.items() if "lora" not in n}
    )
    assert torch.equal(logits(again), logits(model))
    assert remove_adapters(model) is base
    assert torch.equal(logits(base), before)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == names
    assert base.peft_config["default"].peft_type == "LORA"


def test_an_adapted_model_is_not_adapted_again(tmp_path):
    model = adapted(layers=[0])
    save_adapter(model, tmp_path / "a")
    for again in (
        lambda: get_model(model, FloeConfig(**SMALL)),
        lambda: get_model(model.get_base_model(), FloeConfig(**SMALL)),
        lambda: load_adapter(model.get_base_model(), tmp_path / "a"),
        lambda: peft.PeftModelForCausalLM(model, FloeConfig(**SMALL)),
    ):
        with pytest.raises(ValueError, match=r"base.model must not carry an adapter, got one"):
            again()
    assert model.peft_config["default"].layers == [0]
    save_adapter(model, tmp_path / "b")
    assert torch.equal(logits(load_adapter(plain(), tmp_path / "b")), logits(model))


def test_a_base_whose_adapted_model_is_gone_is_used_again():
    base = plain()
    expected = logits(base.eval())
    trained(get_model(base, FloeConfig(**SMALL, layers=[0])))
    gc.collect()
    assert torch.equal(logits(get_model(base, FloeConfig(**SMALL, layers=[2]))), expected)
    assert all("layers.2." in path for path in adapted_modules(base))


def test_removing_an_adapter_leaves_the_base_as_it_was():
    base = plain()
    base.model.embed_tokens.requires_grad_(False)
    kinds = [type(m) for m in base.modules()]
    flags = [p.requires_grad for p in base.parameters()]
    config = FloeConfig(**SMALL, target_modules=["q_proj", "k_proj"], modules_to_save=["norm"])
    for remove in (remove_adapters, lambda model: model.unload()):
        remove(get_model(base, config))
        assert [type(m) for m in base.modules()] == kinds
        assert [p.requires_grad for p in base.parameters()] == flags
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
        assert not {"peft_config", "_floe_base"} & vars(base).keys()


# The base


def test_a_replaced_forward_of_a_base_linear_is_called():
    base = plain()
    linear = base.model.layers[1].mlp.down_proj
    own = linear.forward
    linear.forward = lambda x: 2 * own(x)
    expected = logits(base.eval())
    assert torch.equal(logits(get_model(base, FloeConfig(**SMALL, layers=[1]))), expected)


@pytest.mark.parametrize("load", [load_adapter, peft.PeftModel.from_pretrained])
@pytest.mark.parametrize(
    "place",
    [
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.2.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_an_adapter_of_another_base_is_refused(tmp_path, place, load):
    save_adapter(adapted(layers=[0]), tmp_path / "a")
    other = plain()
    other.get_parameter(place).data.view(-1)[5] += 0.5
    kinds, flags = [type(m) for m in other.modules()], [p.requires_grad for p in other.parameters()]
    with pytest.raises(ValueError, match=r"base model must have the weights that the adapter was"):
        load(other, tmp_path / "a")
    assert [type(m) for m in other.modules()] == kinds
    assert [p.requires_grad for p in other.parameters()] == flags
    load_adapter(other, tmp_path / "a", other_base=True)


def test_a_base_that_changed_under_its_adapter_is_the_one_that_counts(tmp_path):
    model = adapted(layers=[0])
    base = model.get_base_model()
    base.model.layers[2].mlp.up_proj.weight.data.mul_(2)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="base model must have the weights"):
        load_adapter(plain(), tmp_path / "a")
    changed = plain()
    changed.model.layers[2].mlp.up_proj.weight.data.mul_(2)
    assert torch.equal(logits(load_adapter(changed, tmp_path / "a")), logits(model))


def test_another_method_s_adapter_is_part_of_the_base(tmp_path):
    base = lora(plain(), target_modules=["q_proj"])
    save_adapter(trained(get_model(base, FloeConfig(**SMALL, layers=[0]))), tmp_path / "a")
    with pytest.raises(ValueError, match="base model must have the weights"):
        load_adapter(plain(), tmp_path / "a")


def test_a_folder_is_not_loaded_into_an_adapter_of_another_function(tmp_path):
    """As the Trainer does to resume: PEFT then keeps the settings that are there."""
    save_adapter(adapted(layers=[0]), tmp_path / "a")
    same = get_model(plain(), FloeConfig(r=3, num_experts=2, layers=[0]))
    same.load_adapter(tmp_path / "a", "default")
    assert torch.equal(logits(same.eval()), logits(adapted(layers=[0])))
    other = plain()
    other.model.norm.weight.data.mul_(2)
    for base, change, text in (
        (other, {}, "base model must have the weights"),
        (plain(), {"alpha": 64.0}, "has rank, experts and scaling"),
        (plain(), {"scaling": "alpha/sqrt(r)"}, "has rank, experts and scaling"),
    ):
        model = get_model(base, FloeConfig(r=3, num_experts=2, layers=[0], **change))
        before = logits(model.eval())
        with pytest.raises(ValueError, match=text):
            model.load_adapter(tmp_path / "a", "default")
        assert torch.equal(logits(model), before)


def test_a_configuration_edited_afterwards_is_not_saved(tmp_path):
    model = adapted(layers=[0])
    model.peft_config["default"].alpha = 64.0
    with pytest.raises(ValueError, match=r"has rank, experts and scaling \(3, 2, 10.6"):
        save_adapter(model, tmp_path / "a")


def test_a_task_that_the_model_cannot_do_leaves_it_as_it_was():
    base = classifier()
    kinds, flags = [type(m) for m in base.modules()], [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match="task_type must be one that a LlamaForSequenceClassifi"):
        get_model(base, FloeConfig(**SMALL, task_type="CAUSAL_LM"))
    assert [type(m) for m in base.modules()] == kinds
    assert [p.requires_grad for p in base.parameters()] == flags
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"target_modules": []}, "target_modules must name a projection or be None"),
        ({"layer_modules": {0: "q_proj"}}, "layer_modules must map layer indices to projection"),
        ({"base_fingerprint": "abc"}, "base_fingerprint must be what floe wrote, got 'abc'"),
        ({"modules_to_save": "norm"}, "modules_to_save must be a list of module names"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        FloeConfig(**settings)


def test_a_fingerprint_is_of_the_weights_not_of_their_dtype():
    model = plain(dtype=torch.bfloat16)
    known = fingerprint(model)
    assert same_base(known, fingerprint(model.float()))
    assert same_base(known, fingerprint(get_model(model, FloeConfig(**SMALL))))
    assert same_base(known, fingerprint(copy.deepcopy(model).half()))  # not comparable
    model.model.layers[0].mlp.gate_proj.weight.data[1, 1] += 1
    assert not same_base(known, fingerprint(model))


def test_resized_embeddings_are_saved_and_loaded_with_the_adapter(tmp_path):
    plain().save_pretrained(tmp_path / "base")

    def resized():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(63)  # new rows are drawn
        return base

    model = trained(get_model(resized(), FloeConfig(**SMALL, layers=[0])))
    save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(load_adapter(resized(), tmp_path / "a")), logits(model))
    file, digest = tmp_path / "a" / "adapter_model.safetensors", fingerprint(plain())
    assert sum("embed_tokens" in name for name in load_file(file)) == 1
    assert same_base(digest, fingerprint(model))
    unresized = get_model(plain(), FloeConfig(**SMALL, layers=[0]))
    with pytest.raises(ValueError, match=r"none of its own .*embed_tokens|lm_head"):
        peft.set_peft_model_state_dict(unresized, load_file(file))


def test_projections_that_cannot_be_read_are_not_compared():
    known, model = fingerprint(plain()), plain()
    linear = model.model.layers[0].mlp.gate_proj
    linear.weight = nn.Parameter(linear.weight.to("meta"))
    assert same_base(known, fingerprint(model))
    model.model.layers[1].input_layernorm.weight.data += 1
    assert not same_base(known, fingerprint(model))


# Wrappers


def replica_of(model):
    """The model as nn.DataParallel replicates it to a device."""
    modules = list(model.modules())
    places = {module: i for i, module in enumerate(modules)}
    replicas = [module._replicate_for_data_parallel() for module in modules]
    for module, replica in zip(modules, replicas, strict=True):
        replica._former_parameters = {}
        for name, child in module._modules.items():
            setattr(replica, name, replicas[places[child]])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.view_as(parameter))
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer)
    return replicas[0]


def test_a_replica_of_data_parallel_computes_with_its_own_parameters():
    model = adapted(target_modules=["q_proj", "k_proj", "gate_proj", "up_proj"])
    replica = replica_of(model)
    with torch.no_grad():
        for module in adapted_modules(model).values():  # what the original does is its own affair
            module.floe_expand["default"].weight = nn.Parameter(
                torch.zeros_like(module.floe_expand["default"].weight)
            )
        found = replica(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(
        found, logits(adapted(target_modules=["q_proj", "k_proj", "gate_proj", "up_proj"]))
    )


def test_hooks_on_an_adapter_s_weight_are_called():
    model, calls = adapted(layers=[0], target_modules=["gate_proj", "up_proj"]), []
    expected = logits(model)
    for module in adapted_modules(model).values():
        module.floe_expand["default"].register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(logits(model), expected)
    assert len(calls) == 2
