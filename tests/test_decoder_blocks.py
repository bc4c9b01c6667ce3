"""Finding the decoder blocks of real architectures, and counting parameters from shapes."""

import functools

import numpy
import pytest
import torch
import transformers as hf
from helpers.importance_models import KINDS, plain
from torch import nn
from transformers import AutoModelForCausalLM

from floe.adapters import FloeConfig, adapted_layers, get_model, parameter_counts
from floe.decoder_blocks import BlockNames, base_of, find_blocks, geometry, linear_at
from floe.importance.score import score

FUSED = {"phi3"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapt", [False, True], ids=["plain", "adapted"])
def test_blocks_of_every_known_layout(kind, adapt):
    model = plain(kind)
    names = (
        ["gate_up_proj", "down_proj"] if kind in FUSED else ["gate_proj", "up_proj", "down_proj"]
    )
    if adapt:
        model = get_model(model, FloeConfig(r=2, num_experts=2, target_modules=names, layers=[1]))
    blocks, base = find_blocks(model), base_of(model)
    assert [b.index for b in blocks] == [0, 1, 2]
    assert [b.path for b in blocks] == [f"model.layers.{i}" for i in range(3)]
    for block in blocks:
        assert block.module is base.get_submodule(block.path)
        assert block.o_proj == f"{block.path}.self_attn.o_proj"
        assert block.down_proj == f"{block.path}.mlp.down_proj"
        assert set(block.attention) == ({"qkv"} if kind in FUSED else {"q", "k", "v"})
        assert set(block.mlp) == ({"gate_up"} if kind in FUSED else {"gate", "up"})
        assert set(block.linears) >= {"o_proj", *names}
        assert all(isinstance(linear_at(model, path), nn.Linear) for path in block.linears.values())
    sizes = geometry(model, blocks)
    head_dim = getattr(base.config, "head_dim", None) or 32 // 4
    assert (sizes.layers, sizes.heads, sizes.kv_heads) == (3, 4, 2)
    assert (sizes.head_dim, sizes.neurons, sizes.hidden) == (head_dim, 40, 32)


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=61), hf.GPT2LMHeadModel),
        (
            hf.OPTConfig(
                hidden_size=32,
                ffn_dim=40,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=61,
                word_embed_proj_dim=32,
            ),
            hf.OPTForCausalLM,
        ),
    ],
    ids=["gpt2", "opt"],
)
def test_other_architectures_are_refused_untouched(config, model):
    base = model(config)
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(
        ValueError,
        match=r"no decoder blocks floe knows: .*set model.floe_block_names = ",
    ):
        get_model(base, FloeConfig())
    assert {name: type(module) for name, module in base.named_modules()} == before
    assert not hasattr(base, "peft_config")


class Foreign(nn.Module):
    """Blocks under other names, beside a list that has nothing to do with them; no config."""

    def __init__(self, blocks=2):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))
        self.tower = nn.ModuleList(nn.Module() for _ in range(blocks))
        for block in self.tower:
            for name in ("query", "key", "value", "out", "gate", "up", "down"):
                block.add_module(name, nn.Linear(8, 8))


def test_blocks_named_by_hand():
    names = BlockNames(
        attention_output=("out",),
        attention_inputs=({"q": "query", "k": "key", "v": "value"},),
        mlp_output=("down",),
        mlp_inputs=({"gate": "gate", "up": "up"},),
    )
    model = Foreign()
    with pytest.raises(ValueError, match="has no decoder blocks"):
        find_blocks(model)
    empty = Foreign(0)
    model.floe_block_names = empty.floe_block_names = names
    with pytest.raises(ValueError, match="has no decoder blocks"):
        find_blocks(empty)
    blocks = find_blocks(model)
    assert [b.o_proj for b in blocks] == ["tower.0.out", "tower.1.out"]
    assert blocks[1].attention == {"q": "tower.1.query", "k": "tower.1.key", "v": "tower.1.value"}
    with pytest.raises(ValueError, match="must give num_attention_heads >= 1, got None"):
        geometry(model, blocks)


def test_a_model_named_by_hand_is_adapted_and_scored():
    """A Llama whose modules have other names gives the scores of the one it is."""
    known, foreign = plain("llama"), plain("llama")
    for block in foreign.model.layers:
        block.mlp.forward = functools.partial(_feed_forward, block.mlp)
        for old, new in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            block.mlp.add_module(new, block.mlp._modules.pop(old))
    targets = {"known": ["gate_proj", "up_proj", "down_proj"], "foreign": ["w1", "w3", "w2"]}
    foreign.floe_block_names = BlockNames(
        mlp_output=("mlp.w2",), mlp_inputs=({"gate": "mlp.w1", "up": "mlp.w3"},)
    )
    batches = [{"input_ids": torch.arange(3, 19).view(2, 8), "attention_mask": torch.ones(2, 8)}]
    batches[0]["labels"] = batches[0]["input_ids"].clone()
    found = []
    for model, names in ((known, targets["known"]), (foreign, targets["foreign"])):
        config = FloeConfig(r=2, num_experts=2, dropout=0.0, target_modules=names)
        found.append(score(get_model(model, config), batches))
    for name in ("head_fisher", "neuron_fisher", "head_taylor", "neuron_taylor"):
        numpy.testing.assert_allclose(*(getattr(scores, name) for scores in found), rtol=1e-5)


def _feed_forward(mlp, x):
    return mlp.w2(mlp.act_fn(mlp.w1(x)) * mlp.w3(x))


def test_blocks_of_unequal_size_are_refused():
    model = plain("llama")
    model.model.layers[1].mlp.down_proj = nn.Linear(44, 32, bias=False)
    with pytest.raises(
        ValueError, match=r"all blocks must have one size, got .*\(32, 40\), \(32, 44\)"
    ):
        geometry(model)


def test_heads_that_do_not_divide_the_width_are_refused():
    model = plain("llama")
    model.config.num_attention_heads = 5
    with pytest.raises(ValueError, match="o_proj's width must be a multiple of 5 heads, got 32"):
        geometry(model)


# Sizes from the models' published config.json.
LLAMA2_7B = hf.LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
LLAMA31_8B = hf.LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
LLAMA32_3B = hf.LlamaConfig(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
MISTRAL_7B = hf.MistralConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
GEMMA2_2B = hf.Gemma2Config(
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
)
COUNTS = [
    ("llama2-7b", LLAMA2_7B, 2, 4, 10_371_072, 0.1539),
    ("llama2-7b", LLAMA2_7B, 4, 4, 18_284_544, 0.2713),
    ("llama2-7b", LLAMA2_7B, 8, 3, 26_812_416, 0.3979),
    ("llama2-7b", LLAMA2_7B, 8, 4, 34_111_488, 0.5062),
    ("llama2-7b", LLAMA2_7B, 8, 6, 48_709_632, 0.7229),
    ("mistral-7b", MISTRAL_7B, 8, 4, 42_205_184, 0.5828),
    ("llama3.1-8b", LLAMA31_8B, 8, 4, 42_205_184, 0.5256),
    ("gemma2-2b", GEMMA2_2B, 8, 4, 21_565_440, 0.8249),
    ("llama3.2-3b", LLAMA32_3B, 8, 4, 22_249_472, 0.6925),
]


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("config", "rank", "experts", "total", "percent"),
    [row[1:] for row in COUNTS],
    ids=[f"{row[0]}-r{row[2]}-M{row[3]}" for row in COUNTS],
)
def test_parameter_counts_of_published_models(config, rank, experts, total, percent):
    model = on_meta(config)
    counts = parameter_counts(model, FloeConfig(r=rank, num_experts=experts))
    assert sum(counts) == total
    assert counts == [total // config.num_hidden_layers] * config.num_hidden_layers
    whole = sum(p.numel() for p in model.parameters())
    assert round(100 * total / whole, 4) == percent
    adapted = get_model(model, FloeConfig(r=rank, num_experts=experts))
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == total
    assert all(p.device.type == "meta" for p in trainable)


def test_llama2_7b_has_its_published_size():
    assert sum(p.numel() for p in on_meta(LLAMA2_7B).parameters()) == 6_738_415_616


def test_counts_follow_patterns_and_layers_of_a_real_adapter():
    config = FloeConfig(
        r=4,
        num_experts=2,
        layers=[0, 2],
        rank_pattern={"2": 3, "model.layers.0.mlp.up_proj": 1},
        expert_pattern={"0": 5},
    )
    counts = parameter_counts(plain("llama"), config)
    model = get_model(plain("llama"), config)
    for index, modules in adapted_layers(model).items():
        assert (
            sum(p.numel() for m in modules.values() for p in m.parameters() if p.requires_grad)
            == counts[index]
        )
    assert list(adapted_layers(model)) == [0, 2]
    assert counts[1] == 2 * ((4 + 2) * 32 + 2 * 40 * 4) + (4 + 2) * 40 + 2 * 32 * 4


def encoder_decoder(layers=(2, 2)):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "vocab_size": 61,
    }
    encoder, decoder = ({**sizes, "num_hidden_layers": count} for count in layers)
    with torch.device("meta"):
        return hf.T5GemmaForConditionalGeneration(
            hf.T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=61)
        )


@pytest.mark.parametrize("layers", [(2, 2), (2, 3), (3, 2)])
def test_of_an_encoder_and_a_decoder_one_must_be_named(layers):
    model = encoder_decoder(layers)
    match = r"say which is to be adapted, got model\.encoder\.layers, model\.decoder\.layers of an"
    with pytest.raises(ValueError, match=match):
        get_model(model, FloeConfig(r=2, task_type="SEQ_2_SEQ_LM"))
    for part, count in zip(("encoder", "decoder"), layers, strict=True):
        model.floe_block_names = BlockNames(blocks=f"model.{part}.layers")
        assert [b.path for b in find_blocks(model)] == [
            f"model.{part}.layers.{i}" for i in range(count)
        ]
    adapted = get_model(model, FloeConfig(r=2, task_type="SEQ_2_SEQ_LM"))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all(".decoder.layers." in name for name in trained)
    assert geometry(adapted).neurons == 48
    # One stack of the two that fits is not taken for the one that is meant.
    model.floe_block_names = None
    model.get_submodule("model.decoder.layers.1").mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"got model\.encoder\.layers of an encoder-decoder"):
        find_blocks(model)
    model.floe_block_names = BlockNames(blocks="model.layers")
    with pytest.raises(ValueError, match=r"list of .* blocks at model\.layers holding one"):
        find_blocks(model)


def test_another_stack_that_looks_like_the_decoder_is_not_taken_for_it():
    """A tower of as many blocks is refused, a draft head of fewer is passed over."""
    model, other = plain("llama"), plain("llama")
    model.draft = nn.ModuleList(other.model.layers[:1])
    assert [b.path for b in find_blocks(model)] == [f"model.layers.{i}" for i in range(3)]
    model.vision = other.model.layers
    with pytest.raises(ValueError, match=r"got model\.layers, vision: set model"):
        find_blocks(model)
    model.floe_block_names = BlockNames(blocks="model.layers")
    assert find_blocks(model)[2].path == "model.layers.2"
