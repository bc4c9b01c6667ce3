"""Saving an adapter: whole or not at all, and the same form whatever the settings."""

import errno
from pathlib import Path

import pytest
import torch
from helpers.importance_models import plain
from helpers.small_adapters import adapted, logits, trained

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


@pytest.mark.parametrize("name", ["second", "old", "new"])
def test_an_adapter_of_another_name_is_saved_in_the_same_form(name, tmp_path):
    model = adapted(layers=[0])
    save_adapter(model, tmp_path / "out")
    model.add_adapter(name, FloeConfig(r=2, num_experts=3, layers=[1]))
    trained(model, name).set_adapter(name)
    save_adapter(model, tmp_path / "out", adapter_name=name)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["README.md", CONFIG, TENSORS]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out"]
    assert torch.equal(logits(load_adapter(plain(), tmp_path / "out").eval()), logits(model))


def test_the_card_says_what_to_import(saved):
    assert "import floe " in (saved[0] / "README.md").read_text()


def test_values_that_are_not_finite_are_never_saved(tmp_path):
    model = adapted(layers=[0])
    adapted_modules(model)["model.layers.0.mlp.up_proj"].floe_expand["default"].weight.data[
        0, 0, 0
    ] = float("nan")
    with pytest.raises(
        ValueError, match=r"up_proj.floe_expand\S* must hold finite values to be saved"
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
        "floe.adapters.config.seal",
        "os.fsync",
        "pathlib.Path.replace",
    ],
)
def test_a_full_disk_leaves_the_adapter_that_was_there(place, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(place, full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(layers=[0]), saved[0])
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(layers=[0]), tmp_path / "new")
    monkeypatch.undo()
    assert_still_there(saved, tmp_path)


def test_a_failing_last_rename_puts_the_old_adapter_back(saved, tmp_path, monkeypatch):
    replace = Path.replace
    monkeypatch.setattr(
        Path,
        "replace",
        lambda self, to: (
            full_disk() if (self.parent.name, self.name) == ("new", TENSORS) else replace(self, to)
        ),
    )
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(layers=[0]), saved[0])
    monkeypatch.setattr("shutil.copy2", full_disk)  # the old one's copy, to put back
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted(layers=[0]), saved[0])
    monkeypatch.undo()
    assert_still_there(saved, tmp_path)


@pytest.fixture
def filled(saved, tmp_path):
    """A folder where a user keeps an adapter and other things, and those other files' contents."""
    folder = saved[0]
    for name in (
        "notes.txt",
        "README.md",
        "checkpoint-500/optimizer.pt",
        "second/" + CONFIG,
        "adapter_model.bin",
        "new/x",
        "old/x",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} of mine")
    for name in ("out.old", "out.tmp", ".out.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text(name)
    (tmp_path / "out" / "linked").symlink_to(tmp_path / "out.old" / "mine")
    return folder


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in (CONFIG, TENSORS)
    }


@pytest.mark.parametrize("how", ["path", "dot", "link", "relative"])
def test_only_the_adapter_s_own_files_are_replaced(how, filled, tmp_path, monkeypatch):
    before = contents(tmp_path)
    target = filled
    if how == "dot":
        monkeypatch.chdir(filled)
        target = "."
    elif how == "relative":
        monkeypatch.chdir(tmp_path)
        target = "out"
    elif how == "link":
        target = tmp_path / "link"
        target.symlink_to(filled)
    model = adapted(layers=[0])
    save_adapter(model, target)
    assert torch.equal(logits(load_adapter(plain(), target).eval()), logits(model))
    assert filled.is_dir()
    assert not filled.is_symlink()
    if how == "link":
        assert target.is_symlink()
        target.unlink()
    assert contents(tmp_path) == before


def test_an_empty_folder_is_filled_whatever_its_name(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    model = adapted(layers=[0])
    for target in (tmp_path / "link", "."):
        save_adapter(model, target)
        assert sorted(f.name for f in Path.cwd().iterdir()) == ["README.md", CONFIG, TENSORS]
        for file in Path.cwd().iterdir():
            file.unlink()
    assert (tmp_path / "link").is_symlink()


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loose").symlink_to(tmp_path / "nowhere")
    for name in ("file", "loose"):
        with pytest.raises(FileError, match="must be a folder, got something else"):
            save_adapter(adapted(layers=[0]), tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("content", ['{"peft_type": "LORA"}', "{", '["FLOE"]'])
def test_an_adapter_of_another_method_is_not_overwritten(content, tmp_path):
    (tmp_path / CONFIG).write_text(content)
    (tmp_path / TENSORS).write_text("trained for days")
    with pytest.raises(FileError, match="holds no floe adapter; not overwritten"):
        save_adapter(adapted(layers=[0]), tmp_path)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {
        CONFIG: content,
        TENSORS: "trained for days",
    }


def test_the_files_can_be_read_by_whom_the_user_lets(tmp_path):
    """A folder with a drawn name is closed to others when it is made; an adapter is not."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    save_adapter(adapted(layers=[0]), tmp_path / "out")
    for made, like in ((tmp_path / "out", "plain"), (tmp_path / "out" / TENSORS, "plain/file")):
        assert made.stat().st_mode == (tmp_path / like).stat().st_mode


@pytest.mark.parametrize("when", range(5))
def test_a_save_that_ends_anywhere_never_leaves_a_mixture(when, filled, tmp_path, monkeypatch):
    """Stopped before each change of a name: the old adapter, the new one, or a clear refusal."""
    old = logits(load_adapter(plain(), filled).eval())
    new = adapted(layers=[1], alpha=7.0)  # of the same shapes
    before, left = contents(tmp_path), iter(range(when))

    class Killed(BaseException):
        pass

    def dying(change):
        def step(*args, **kwargs):
            if next(left, None) is None:
                raise Killed
            return change(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        try:
            save_adapter(new, filled)
        except Killed:
            pass
        else:
            assert when == 4
    try:
        found = logits(load_adapter(plain(), filled).eval())
    except FileError as error:
        assert "the digest differs" in str(error)  # noqa: PT017
    else:
        assert torch.equal(found, old) or torch.equal(found, logits(new))
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    save_adapter(new, filled)  # the next one goes through
    assert torch.equal(logits(load_adapter(plain(), filled).eval()), logits(new))


@pytest.mark.parametrize("name", ["default", "second"])
def test_peft_s_own_saving_seals_too(name, tmp_path):
    model = adapted(layers=[0])
    model.add_adapter("second", FloeConfig(r=2, num_experts=3, layers=[1]))
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    load_adapter(plain(), folder)
    raw = bytearray((folder / TENSORS).read_bytes())
    raw[-2] ^= 1
    (folder / TENSORS).write_bytes(raw)
    with pytest.raises(FileError, match="is not what was saved"):
        load_adapter(plain(), folder)


def test_settings_saved_beside_older_tensors_are_not_sealed_with_them(saved):
    config = FloeConfig.from_pretrained(saved[0])
    assert config.layers == [1]
    config.alpha = 64.0
    config.save_pretrained(saved[0])
    with pytest.raises(FileError, match="the digest differs"):
        load_adapter(plain(), saved[0])


def test_a_pickle_that_would_never_be_loaded_is_not_saved_silently(tmp_path):
    with pytest.raises(ValueError, match="safe_serialization must be True for a floe adapter"):
        adapted(layers=[0]).save_pretrained(tmp_path, safe_serialization=False)
