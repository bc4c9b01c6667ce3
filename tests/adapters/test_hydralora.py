import copy
import io
import json

import pytest
import torch
from helpers.tiny import tiny_model
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from floe.adapters import FloeConfig
from floe.adapters.conversion import import_hydralora, named_base
from floe.adapters.files import load_adapter
from floe.cli import app
from floe.errors import FileError

RANK, EXPERTS, ALPHA = 4, 3, 8.0
NAMES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class HydraLoRA(nn.Module):
    """A layer as HydraLoRA computes it: the loop over experts, without dropout."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        k, n = base.in_features, base.out_features
        self.lora_A = nn.Linear(k, RANK, bias=False)
        self.experts = nn.ModuleList(nn.Linear(RANK, n, bias=False) for _ in range(EXPERTS))
        self.lora_route = nn.Linear(k, EXPERTS, bias=False)

    def forward(self, x):
        weights = torch.softmax(self.lora_route(x), -1)
        y = self.base(x)
        for i, expert in enumerate(self.experts):
            y = y + ALPHA / RANK * weights[..., i : i + 1] * expert(self.lora_A(x))
        return y

    def tensors(self, path):
        found = {"lora_A": self.lora_A, "lora_route": self.lora_route}
        found |= {f"lora_B{i}": expert for i, expert in enumerate(self.experts)}
        return {f"base_model.model.{path}.{n}.weight": m.weight.data for n, m in found.items()}


def hydra(layers=(0, 2)):
    """A model with such layers, and the tensors its code would save."""
    torch.manual_seed(3)
    model, tensors = copy.deepcopy(tiny_model(layers=3)), {}
    for layer in layers:
        for name in NAMES:
            path = f"model.layers.{layer}.{name}"
            module = HydraLoRA(model.get_submodule(path))
            model.set_submodule(path, module)
            tensors |= module.tensors(path)
    return model, tensors


def write(folder, tensors, binary=False, **settings):
    folder.mkdir(exist_ok=True)
    values = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "lora_nums": EXPERTS,
        "bias": "none",
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values | settings))
    if binary:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("binary", [False, True])
def test_the_imported_adapter_computes_the_same(tmp_path, binary):
    model, tensors = hydra()
    config = import_hydralora(
        write(tmp_path / "in", tensors, binary), tmp_path / "out", tiny_model(layers=3)
    )
    assert (config.r, config.num_experts, config.alpha, config.dropout) == (4, 3, 8.0, 0.05)
    assert config.layers == [0, 2]
    found = load_adapter(tiny_model(layers=3), tmp_path / "out").eval()
    ids = torch.randint(0, 320, (2, 9))
    expected, plain = model.eval()(ids).logits, tiny_model(layers=3).eval()(ids).logits
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(found(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_layers_may_differ_in_their_projections(tmp_path):
    _, tensors = hydra()
    kept = {n: t for n, t in tensors.items() if "layers.2" not in n or "up_proj" in n}
    import_hydralora(write(tmp_path / "in", kept), tmp_path / "out", tiny_model(layers=3))
    modules = FloeConfig.from_pretrained(tmp_path / "out").layer_modules
    assert modules == {"0": ["down_proj", "gate_proj", "up_proj"], "2": ["up_proj"]}


def test_the_command_needs_the_base_models_configuration_alone(tmp_path):
    _, tensors = hydra()
    tiny_model(layers=3).config.save_pretrained(tmp_path / "base")
    source = write(tmp_path / "in", tensors, base_model_name_or_path=str(tmp_path / "base"))
    done = CliRunner().invoke(app, ["import-hydralora", str(source), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("out: 2 layers, rank 4, 3 experts\n")
    values = {n: t for n, t in tensors.items() if n.endswith("lora_A.weight")}
    found = load_adapter(tiny_model(layers=3), tmp_path / "out")
    for name, value in values.items():
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        shrink = found.get_base_model().get_submodule(path).floe_shrink["default"].weight
        assert torch.equal(shrink[:RANK], value)


def renamed(tensors, old, new):
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda t: t, {"peft_type": "LOHA"}, "peft_type must be LORA, got 'LOHA'"),
        (lambda t: t, {"bias": "all"}, "bias must be 'none' to import, got 'all'"),
        (lambda t: t, {"lora_alpha": None}, "lora_alpha must be a number, got None"),
        (lambda t: t, {"r": 8}, "_proj: lora_A must have r = 8 rows, got 4"),
        (lambda t: without(t, "route"), {}, "must have lora_A, lora_B0 ... and lora_route, got"),
        (lambda t: without(t, "lora_B1"), {}, r"rows, 3, got lora_B of \[0, 2\]"),
        (lambda t: renamed(t, "layers.2", "layers.7"), {}, "which is no projection of the base"),
        (lambda t: renamed(t, "lora_A", "lora_E"), {}, "tensors must be lora_A, .* got .*lora_E"),
        (lambda t: t, {"use_rslora": True}, "use_rslora must not be set to import, got True"),
        (lambda t: t, {"lora_alpha": 10**400}, "int too large to convert to float"),
        (lambda t: t, {"lora_dropout": "0.1"}, "lora_dropout must be a number, got '0.1'"),
        (
            lambda t: t | {n.replace("B1", "B01"): v for n, v in t.items() if "B1" in n},
            {},
            "tensors must be lora_A, .*lora_B01",
        ),
        (
            lambda t: t | {n.replace(".weight", ".default.weight"): 0 * v for n, v in t.items()},
            {},
            r"lora_\w+ must be given once, got .*weight, too",
        ),
        (
            lambda t: t | {n.removeprefix("base_model.model."): v for n, v in t.items()},
            {},
            r"lora_\w+ must be given once, got .*weight, too",
        ),
        (lambda t: {n: v.double() for n, v in t.items()}, {}, "must be a dense matrix of"),
        (lambda t: {n: v / 0 for n, v in t.items()}, {}, "must hold finite values"),
        (
            lambda t: {n: t[:, :3] if "2.mlp.up_proj.lora_A" in n else t for n, t in t.items()},
            {},
            "up_proj: .*got|up_proj: Sizes of tensors",
        ),
        (
            lambda t: {n: t[:2] if "0.mlp.up_proj.lora_A" in n else t for n, t in t.items()},
            {},
            r"up_proj: floe_shrink must be of shape \(7, 32\), .* got \(5, 32\)",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, change, settings, message):
    _, tensors = hydra()
    changed = {name: tensor.clone().contiguous() for name, tensor in change(tensors).items()}
    base = tiny_model(layers=3)
    before = state_of(base)
    with pytest.raises(FileError, match=message):
        import_hydralora(write(tmp_path / "in", changed, **settings), tmp_path / "out", base)
    assert [f.name for f in tmp_path.iterdir()] == ["in"]
    assert state_of(base) == before


def state_of(model):
    """All that an import must leave as it was, but for the values."""
    modules = [(name, type(m), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    return modules, [(n, p.requires_grad) for n, p in model.named_parameters()], [*vars(model)]


def test_the_base_is_left_as_it_was(tmp_path):
    base = tiny_model(layers=3)
    base.lm_head.requires_grad_(False)
    before = state_of(base)
    import_hydralora(write(tmp_path / "in", hydra()[1]), tmp_path / "out", base)
    assert state_of(base) == before


@pytest.mark.parametrize("how", ["itself", "link", "through", "files"])
def test_a_folder_in_use_is_not_written_to(tmp_path, how, monkeypatch):
    source = write(tmp_path / "in", hydra()[1])
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    monkeypatch.chdir(source)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    output = {
        "itself": ".",
        "link": tmp_path / "link",
        "through": tmp_path / "notes/../in",
        "files": tmp_path / "notes",
    }[how]
    with pytest.raises(FileError, match="exists and is not empty; not overwritten"):
        import_hydralora(source, output, tiny_model(layers=3))
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert [f.name for f in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_tensors_of_several_types_are_kept_in_the_widest(tmp_path):
    tensors = {n: t.bfloat16() if "lora_A" in n else t for n, t in hydra()[1].items()}
    import_hydralora(write(tmp_path / "in", tensors), tmp_path / "out", tiny_model(layers=3))
    assert FloeConfig.from_pretrained(tmp_path / "out").adapter_dtype == "float32"


def test_a_damaged_pickle_is_a_file_error(tmp_path):
    """Cut short, bits flipped, other objects, tensors that are none: never another exception."""
    _, tensors = hydra(layers=(0,))
    source = write(tmp_path / "in", tensors, binary=True)
    file = source / "adapter_model.bin"
    whole, base, refused = file.read_bytes(), tiny_model(layers=3), 0
    generator = torch.Generator().manual_seed(0)

    def draw(high):
        return int(torch.randint(high, (1,), generator=generator))

    name = next(iter(tensors))
    odd = [
        tensors[name].to_sparse(),
        tensors[name][:1, :1].expand(10**6, 10**6),
        5,
        None,
        torch.empty(4, 32, device="meta"),
        torch.ones((4, 32), dtype=torch.int8),
    ]
    damaged = [b"", whole[:40], *(whole[: draw(len(whole))] for _ in range(8))]
    for _ in range(30):
        raw = bytearray(whole)
        raw[draw(1200) - draw(2) * 1200] ^= 1 << draw(8)  # the pickle, or the archive's table
        damaged.append(bytes(raw))
    for content in odd:
        buffer = io.BytesIO()
        torch.save(tensors | {name: content}, buffer)
        damaged.append(buffer.getvalue())
    for turn, content in enumerate(damaged):
        file.write_bytes(content)
        try:
            import_hydralora(source, tmp_path / f"out{turn}", base)
        except FileError:
            refused += 1
            assert not (tmp_path / f"out{turn}").exists()
    assert refused >= 25


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    source = write(tmp_path / "in", hydra()[1])
    (source / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    (source / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match=r"must lie in its folder, got a link to .*elsewhere"):
        import_hydralora(source, tmp_path / "out", tiny_model(layers=3))


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    source = write(tmp_path / "in", {"a": torch.ones(1)}, binary=True)
    torch.save({"x": Evil()}, source / "adapter_model.bin")
    with pytest.raises(FileError, match="cannot be read as tensors"):
        import_hydralora(source, tmp_path / "out", tiny_model(layers=3))
    assert not (tmp_path / "ran").exists()
    torch.save([torch.ones(1)], source / "adapter_model.bin")
    with pytest.raises(FileError, match="must hold named tensors, got list"):
        import_hydralora(source, tmp_path / "out", tiny_model(layers=3))


def test_folders_without_an_adapter_or_a_base_are_named(tmp_path):
    source = write(tmp_path / "in", hydra()[1])
    with pytest.raises(FileError, match="names no base model: give one"):
        named_base(source)
    (source / "adapter_model.safetensors").unlink()
    with pytest.raises(FileError, match=r"must hold adapter_model.safetensors or .*got neither"):
        import_hydralora(source, tmp_path / "out", tiny_model(layers=3))
