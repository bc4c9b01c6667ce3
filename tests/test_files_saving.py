"""Saving an adapter: whole or not at all, and the same form whatever the settings."""

import errno
from pathlib import Path

import pytest
import torch
from importance_models import plain
from small_adapters import adapted, logits, trained

from floe import FileError
from floe.adapters import FloeConfig, adapted_modules, get_model
from floe.adapters.files import load_adapter, save_adapter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """An adapter already at the place where the next one goes, and its logits."""
    model = adapted(layers=[1])
    save_adapter(model, tmp_path / "out")
    return tmp_path / "out", logits(model)


def assert_still_there(saved, tmp_path):
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert torch.equal(logits(load_adapter(plain(), saved[0]).eval()), saved[1])


@pytest.mark.parametrize("seed", range(6))
def test_random_configs_survive_the_round_trip(seed, tmp_path):
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    config = FloeConfig(
        r=pick(1, 6),
        num_experts=pick(1, 5),
        alpha=pick(1, 40) / 2,
        dropout=pick(0, 9) / 10,
        layers=[pick(0, 3)] if seed % 2 else None,
        rank_pattern={"1": pick(1, 6)} if seed in (2, 4) else {},
        scaling=("alpha/r", "alpha/sqrt(r)")[pick(0, 2)],
        seed=seed,
        adapter_dtype=("float32", "bfloat16", "float16")[seed % 3],
        target_modules=[["o_proj"], ["gate_proj", "q_proj"], None][pick(0, 3)],
    )
    model = trained(get_model(plain(), config), seed=seed)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(plain(), tmp_path / "a").eval()
    assert torch.equal(logits(loaded), logits(model))
    dtypes = {p.dtype for m in adapted_modules(loaded).values() for p in m.floe_shrink.parameters()}
    assert dtypes == {getattr(torch, config.adapter_dtype)}
    save_adapter(loaded, tmp_path / "b")
    assert (tmp_path / "a" / TENSORS).read_bytes()[-64:] == (tmp_path / "b" / TENSORS).read_bytes()[
        -64:
    ]


def test_an_adapter_of_another_name_is_saved_in_the_same_form(tmp_path):
    model = adapted(layers=[0])
    model.add_adapter("second", FloeConfig(r=2, num_experts=3, layers=[1]))
    trained(model, "second").set_adapter("second")
    save_adapter(model, tmp_path / "out", adapter_name="second")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["README.md", CONFIG, TENSORS]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out"]
    assert torch.equal(logits(load_adapter(plain(), tmp_path / "out").eval()), logits(model))


def test_the_card_says_what_to_import(saved):
    assert "import floe.adapters" in (saved[0] / "README.md").read_text()


def test_values_that_are_not_finite_are_never_saved(tmp_path):
    model = adapted(layers=[0])
    adapted_modules(model)["model.layers.0.mlp.up_proj"].floe_expand["default"].weight.data[
        0, 0, 0
    ] = float("nan")
    with pytest.raises(
        ValueError, match=r"up_proj.floe_expand.default must hold finite values to be saved"
    ):
        save_adapter(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_without_the_adapter_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="model must hold a floe adapter named 'default', got NoneType"
    ):
        save_adapter(plain(), tmp_path / "out")
    with pytest.raises(
        ValueError, match="model must hold a floe adapter named 'other', got NoneType"
    ):
        save_adapter(adapted(layers=[0]), tmp_path / "out", adapter_name="other")


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileError, match="exists and is not an adapter folder; not overwritten"):
        save_adapter(adapted(layers=[0]), tmp_path / "thesis")
    assert [f.name for f in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "place",
    [
        "peft.PeftModel.save_pretrained",
        "floe.adapters.files._seal",
        "os.fsync",
        "pathlib.Path.rename",
    ],
)
def test_a_full_disk_leaves_the_adapter_that_was_there(place, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(place, full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(layers=[0]), saved[0])
    monkeypatch.undo()
    assert_still_there(saved, tmp_path)


def test_a_failing_last_rename_puts_the_old_adapter_back(saved, tmp_path, monkeypatch):
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda self, to: full_disk() if self.suffix == ".tmp" else rename(self, to)
    )
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(layers=[0]), saved[0])
    monkeypatch.undo()
    assert_still_there(saved, tmp_path)


def test_saving_again_replaces_the_whole_folder(tmp_path):
    save_adapter(adapted(layers=[0]), tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("from before")
    model = adapted(layers=[1])
    save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert torch.equal(logits(load_adapter(plain(), tmp_path / "out").eval()), logits(model))
