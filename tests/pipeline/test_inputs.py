"""What loading a base model and its tokenizer refuses, and that it runs no code of theirs."""

import json

import pytest
from helpers.tiny_run import write_inputs
from safetensors.torch import load_file, save_file

from floe import FileError
from floe.config_file import parse_config
from floe.pipeline.inputs import RunInputs, structure


@pytest.fixture
def inputs(tmp_path):
    return tmp_path / "model", write_inputs(tmp_path)


def workspace(config, **model):
    return RunInputs(parse_config({**config, "model": {**config["model"], **model}}))


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without(folder, name):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def reshaped(folder, name):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name][:3].clone()
    save_file(tensors, file, metadata={"format": "pt"})


WEIGHT = "model.layers.1.mlp.up_proj.weight"
DAMAGE = {  # what a library raises for these is of eight different types
    "a weight is missing": (
        lambda f: without(f, WEIGHT),
        rf"every weight, 1 are missing: {WEIGHT}",
    ),
    "a weight of another shape": (lambda f: reshaped(f, WEIGHT), r"must be \[64, 32\]"),
    "weights cut": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 30), "SafetensorError"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "OSError"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "ValueError"),
    "a number": (lambda f: (f / "config.json").write_text("7"), "TypeError"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 5000), "RecursionError"),
    "layers as text": (lambda f: edit(f / "config.json", num_hidden_layers="x"), "expected int"),
    "no such size": (lambda f: edit(f / "config.json", vocab_size=10**400), "TypeError: empty"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_model_is_named_in_one_line(case, inputs):
    folder, config = inputs
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(FileError, match=message) as caught:
        _ = workspace(config).base_model
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 1000


@pytest.mark.parametrize(
    "text", ["{}", "[]", "\x00", '{"version": "1.0", "model": {"type": "no"}}']
)
def test_a_damaged_tokenizer_is_named(text, inputs):
    folder, config = inputs
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(FileError, match="cannot be loaded as a tokenizer"):
        _ = workspace(config).tokenizer


@pytest.mark.parametrize("name", ["flash_attention_2", "none_of_these", "some/kernel"])
def test_an_attention_that_is_not_there_is_named(name, inputs):
    with pytest.raises(FileError, match=f"a model with model.attention: {name}: "):
        _ = workspace(inputs[1], attention=name).base_model


CODE = """
import pathlib
pathlib.Path({ran!r}).write_text("x")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig): model_type = "evil"
class Evil(LlamaForCausalLM): config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast): pass
def generate(model, *args, **kwargs): return None
"""


def test_no_code_of_a_model_runs_even_if_the_terminal_says_yes(inputs, tmp_path, monkeypatch):
    folder, config = inputs
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "custom_generate").mkdir()
    for file in ("evil.py", "custom_generate/generate.py"):
        (folder / file).write_text(CODE.format(ran=str(tmp_path / "ran")))
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]},
        tokenizer_class="EvilTokenizer",
    )
    refusal = "floe runs no code of a model"
    edit(folder / "config.json", auto_map=classes)
    _ = workspace(config).base_model  # of a known type: transformers' own class
    with pytest.raises(FileError, match=refusal):
        _ = workspace(config).tokenizer
    edit(folder / "config.json", model_type="evil")
    with pytest.raises(FileError, match=refusal):
        _ = workspace(config).base_model
    with pytest.raises(FileError, match=refusal):
        structure(str(folder))
    assert not (tmp_path / "ran").exists()
