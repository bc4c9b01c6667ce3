"""Adapter folders: what was saved is loaded, or a FileError; the base model is never touched."""

import json
import shutil

import peft
import pytest
import torch
from helpers.importance_models import plain
from helpers.small_adapters import logits, trained
from safetensors.torch import load_file, save_file

from floe import FileError
from floe.adapters import FloeConfig, adapted_modules, get_model, remove_adapters
from floe.adapters.files import load_adapter, save_adapter
from floe.adapters.folder import seal

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAME = "base_model.model.model.layers.0.mlp.down_proj.floe_shrink.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small trained adapter on disk, and its logits."""
    model = trained(get_model(plain(num_hidden_layers=1), small()))
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(model, folder)
    return folder, logits(model)


def small():
    return FloeConfig(r=1, num_experts=2, target_modules=["down_proj"])


@pytest.fixture
def copy(saved, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved[0], folder)
    return folder


@pytest.fixture(scope="module")
def base():
    return plain(num_hidden_layers=1).eval()


def unchanged(model):
    """Values, trainability, modules, attributes and hooks: equal before and after a refusal."""
    tensors = {
        n: (p.detach().numpy().tobytes(), p.requires_grad) for n, p in model.named_parameters()
    }
    modules = [
        (type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in model.modules()
    ]
    return tensors, modules


def refused(base, folder, text, **arguments):
    before = unchanged(base)
    with pytest.raises(FileError, match=text) as caught:
        load_adapter(base, folder, **arguments)
    assert caught.value.path.startswith(str(folder))
    assert unchanged(base) == before


def rewrite(folder, change):
    """Replace the tensors by ``change(tensors)``, with a digest that fits: it is no signature."""
    tensors = load_file(folder / TENSORS)
    save_file(change(tensors), folder / TENSORS, metadata={"format": "pt"})
    seal(folder)


def edit_config(folder, **values):
    config = json.loads((folder / CONFIG).read_text()) | values
    (folder / CONFIG).write_text(json.dumps(config))
    rewrite(folder, dict)  # else the digest would notice


def test_loading_gives_back_exactly_what_was_saved(saved):
    folder, expected = saved
    model = load_adapter(plain(num_hidden_layers=1), folder)
    assert torch.equal(logits(model.eval()), expected)
    assert not any(p.requires_grad for p in model.parameters())
    again = load_adapter(plain(num_hidden_layers=1), folder, is_trainable=True, adapter_name="mine")
    assert {n.split(".")[-2] for n, p in again.named_parameters() if p.requires_grad} == {"mine"}
    assert torch.equal(logits(again.eval()), expected)


def test_stock_peft_reads_the_folder(saved):
    model = peft.PeftModel.from_pretrained(plain(num_hidden_layers=1), saved[0])
    assert torch.equal(logits(model.eval()), saved[1])


def foreign(tensors):
    return tensors | {"base_model.model.model.norm.weight": torch.ones(32)}


TENSOR_FAULTS = {
    "a missing tensor": (
        lambda t: {n: v for n, v in t.items() if n != NAME},
        "1 missing .*floe_shrink",
    ),
    "no tensor": (lambda t: {}, "2 missing"),
    "a base weight": (foreign, "1 that are none of its own .*norm.weight"),
    "another layer": (
        lambda t: t | {NAME.replace("layers.0", "layers.1"): t[NAME].clone()},
        "none of its own .*layers.1",
    ),
    "a shape": (
        lambda t: t | {NAME: t[NAME][:, 1:].contiguous()},
        r"floe_shrink\S* must be \(3, 40\), got \(3, 39\)",
    ),
    "a transposed tensor": (
        lambda t: t | {NAME: t[NAME].T.contiguous()},
        r"must be \(3, 40\), got \(40, 3\)",
    ),
    "integers": (
        lambda t: t | {NAME: t[NAME].to(torch.int8)},
        "must be floating point, got torch.int8",
    ),
    "nan": (
        lambda t: t | {NAME: t[NAME] * float("nan")},
        "must hold finite values, got NaN or infinity",
    ),
    "infinity": (lambda t: t | {NAME: t[NAME] / 0}, "must hold finite values, got NaN or infinity"),
}


@pytest.mark.parametrize("name", TENSOR_FAULTS)
def test_wrong_tensors_are_refused(name, copy, base):
    change, text = TENSOR_FAULTS[name]
    rewrite(copy, change)
    refused(base, copy, text)


@pytest.mark.parametrize("name", TENSOR_FAULTS)
def test_peft_s_own_loader_refuses_them_too(name, copy, base):
    change, text = TENSOR_FAULTS[name]
    rewrite(copy, change)
    before = unchanged(base)
    with pytest.raises(ValueError, match=text):
        peft.PeftModel.from_pretrained(base, copy)
    assert unchanged(base) == before


def test_a_base_that_checkpoints_gradients_is_left_as_it_was(copy):
    """PEFT puts a hook on its embeddings, beside the one that is there."""
    base = plain(num_hidden_layers=1)
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
    before = unchanged(base)
    remove_adapters(load_adapter(base, copy))
    assert unchanged(base) == before
    rewrite(copy, foreign)
    refused(base, copy, "none of its own")
    base.disable_input_require_grads()
    assert not base.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("name", TENSOR_FAULTS)
def test_an_adapted_model_refuses_them_and_stays(name, saved, copy):
    """As a second adapter, and into the adapter that is there, as the Trainer does to resume."""
    model = load_adapter(plain(num_hidden_layers=1), saved[0])
    before = unchanged(model)
    change, text = TENSOR_FAULTS[name]
    rewrite(copy, change)
    for adapter in ("second", "default"):
        with pytest.raises(ValueError, match=text):
            model.load_adapter(copy, adapter)
        assert unchanged(model) == before
        assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model.eval()), saved[1])


@pytest.mark.parametrize("how", ["new", "second", "default"])
def test_peft_s_loaders_notice_what_differs(how, saved, copy, base):
    """Whatever is read into: a flipped bit, an edited or unknown setting, a missing file."""
    model = load_adapter(base, saved[0]) if how != "new" else None
    before = unchanged(model or base)

    def load():
        if how == "new":
            return peft.PeftModel.from_pretrained(base, copy)
        return model.load_adapter(copy, how)

    raw, text = (copy / TENSORS).read_bytes(), (copy / CONFIG).read_text()
    for content in (raw[:-2] + bytes([raw[-2] ^ 1]) + raw[-1:], raw[:-8], b"", None):
        (copy / TENSORS).unlink()
        if content is not None:
            (copy / TENSORS).write_bytes(content)
        else:
            torch.save(load_file(saved[0] / TENSORS), copy / "adapter_model.bin")
        with pytest.raises(FileError, match=r"is not what|is damaged|does not exist"):
            load()
        assert unchanged(model or base) == before
        (copy / TENSORS).write_bytes(raw)
    for old, new in (
        ('"alpha": 32.0', '"alpha": 64.0'),
        ('"alpha"', '"alhpa"'),
        ('"seed"', '"alpha": 1.0, "seed"'),
    ):
        (copy / CONFIG).write_text(text.replace(old, new))
        with pytest.raises(FileError, match=r"was edited|unknown settings|occurs twice|be FLOE"):
            load()
        assert unchanged(model or base) == before
    if model:
        remove_adapters(model)


def test_twin_names_of_one_tensor_are_refused(copy, base):
    rewrite(copy, lambda t: t | {NAME.removeprefix("base_model.model."): t[NAME].clone()})
    refused(base, copy, "must name a tensor once, got model.layers.0.*floe_shrink.weight twice")


def test_settings_that_name_one_thing_twice_are_refused(copy, base):
    text = (copy / CONFIG).read_text()
    (copy / CONFIG).write_text(text.replace('"alpha": 32.0', '"alpha": 1.0, "alpha": 32.0'))
    refused(base, copy, "a key occurs twice: 'alpha'")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_link_out_of_the_folder_is_not_followed(name, saved, copy, base):
    (copy / name).unlink()
    (copy / name).symlink_to(saved[0] / name)
    refused(base, copy, "must lie in its folder, got a link to")
    with pytest.raises(FileError, match="must lie in its folder, got a link to"):
        peft.PeftModel.from_pretrained(base, copy)
    assert not adapted_modules(base)


def test_links_to_and_within_the_folder_are_followed(saved, copy, tmp_path):
    (copy / TENSORS).rename(copy / "v1.safetensors")
    (copy / TENSORS).symlink_to("v1.safetensors")
    (tmp_path / "link").symlink_to(copy)
    assert torch.equal(
        logits(load_adapter(plain(num_hidden_layers=1), tmp_path / "link").eval()), saved[1]
    )


@pytest.fixture(params=["repository", "shared"])
def cache(request, saved, tmp_path):
    """The hub's cache with the adapter in it: links to blobs, and where those may lie."""
    root = tmp_path / "cache" / "models--me--adapter"
    snapshot = root / "snapshots" / ("0" * 40)
    for folder in (snapshot, root / "refs", root / "blobs", tmp_path / "cache/blobs/ab"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    for blob, name in (("1" * 40, CONFIG), ("2" * 64, TENSORS)):
        place = root / "blobs" / blob
        if request.param == "shared":
            place.symlink_to(f"../../blobs/ab/{blob}")
            place = tmp_path / "cache" / "blobs" / "ab" / blob
        shutil.copyfile(saved[0] / name, place)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_an_adapter_in_the_hub_s_cache_is_read_as_strictly(cache, saved, base, tmp_path):
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    for load in (
        lambda model: load_adapter(model, cache),
        lambda model: peft.PeftModel.from_pretrained(model, str(cache)),
        lambda model: peft.PeftModel.from_pretrained(model, "me/adapter", **options),
    ):
        assert torch.equal(logits(load(plain(num_hidden_layers=1)).eval()), saved[1])
    assert FloeConfig.from_pretrained("me/adapter", **options).r == 1
    blob = (cache / TENSORS).resolve()
    raw = bytearray(blob.read_bytes())
    raw[-2] ^= 1
    blob.write_bytes(raw)
    before = unchanged(base)
    with pytest.raises(FileError, match="is not what was saved"):
        peft.PeftModel.from_pretrained(base, "me/adapter", **options)
    (cache / TENSORS).unlink()
    (cache / TENSORS).symlink_to(saved[0] / TENSORS)
    refused(base, cache, "must lie in its folder")
    (cache / TENSORS).unlink()
    with pytest.raises(FileError, match=r"has no adapter_model.safetensors, here or on the hub"):
        peft.PeftModel.from_pretrained(base, "me/adapter", **options)
    assert unchanged(base) == before


def test_settings_alone_are_read_back(tmp_path):
    config = FloeConfig(r=3, layers=[1])
    config.save_pretrained(tmp_path)
    assert FloeConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert peft.PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert type(peft.PeftConfig.from_pretrained(tmp_path)) is FloeConfig
    base = plain()
    before = unchanged(base)
    with pytest.raises(FileError, match="does not exist"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert unchanged(base) == before


def test_settings_of_a_saved_adapter_make_a_fresh_one(saved):
    """Nothing of the folder's tensors is kept for a later load into it."""
    model = peft.get_peft_model(plain(num_hidden_layers=1), FloeConfig.from_pretrained(saved[0]))
    assert not torch.equal(logits(model.eval()), saved[1])
    model.load_adapter(saved[0], "default")
    assert torch.equal(logits(model.eval()), saved[1])


def test_unknown_settings_are_an_error_wherever_they_come_from(copy):
    edit_config(copy, router="top2")
    for load in (FloeConfig.from_pretrained, peft.PeftConfig.from_pretrained):
        with pytest.raises((FileError, TypeError), match=r"unknown settings .'router'"):
            load(copy)
    with pytest.raises(TypeError, match=r"unknown settings .'alhpa'"):
        FloeConfig(alhpa=3)


def test_files_cut_short_anywhere_are_refused(copy, base):
    whole = (copy / TENSORS).read_bytes()
    for end in sorted({*range(0, 20, 2), *range(20, len(whole), len(whole) // 40)}):
        (copy / TENSORS).write_bytes(whole[:end])
        refused(base, copy, "is damaged")


def test_bytes_after_the_end_are_refused(copy, base):
    with (copy / TENSORS).open("ab") as file:
        file.write(b"\0" * 64)
    refused(base, copy, "is damaged")


def test_a_huge_header_length_is_refused(copy, base):
    raw = (copy / TENSORS).read_bytes()
    (copy / TENSORS).write_bytes((2**62).to_bytes(8, "little") + raw[8:])
    refused(base, copy, "is damaged")


def test_any_flipped_bit_is_noticed_or_harmless(saved, copy, base):
    """300 flips over both files: an equal adapter or a FileError, nothing else."""
    generator = torch.Generator().manual_seed(0)
    loads = 0
    original = load_file(saved[0] / TENSORS)
    for turn in range(300):
        name = (CONFIG, TENSORS)[turn % 3 > 0]
        raw = bytearray((saved[0] / name).read_bytes())
        place = int(torch.randint(len(raw), (1,), generator=generator))
        if turn % 2 and name == TENSORS:  # half of them in the header, which is short
            place %= 8 + int.from_bytes(raw[:8], "little")
        raw[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        (copy / name).write_bytes(raw)
        try:
            model = load_adapter(base, copy)
        except FileError:
            pass
        else:
            loads += 1
            (module,) = adapted_modules(model).values()
            assert torch.equal(module.floe_shrink["default"].weight, original[NAME]), (name, place)
            assert module.settings["default"].scaling == 32.0, (name, place)
            remove_adapters(model)
        shutil.copyfile(saved[0] / name, copy / name)
    assert loads < 60  # the digest does notice


def test_tensors_without_a_digest_are_refused(copy, base):
    save_file(load_file(copy / TENSORS), copy / TENSORS, metadata={"format": "pt"})
    refused(base, copy, "is not what was saved: it has no digest")


def test_the_first_format_may_lack_the_digest(saved, copy, base):
    """PEFT's own saving left it out."""
    edit_config(copy, floe_format=1)
    old = {n.removesuffix(".weight"): t for n, t in load_file(copy / TENSORS).items()}
    save_file(old, copy / TENSORS, metadata={"format": "pt"})
    assert torch.equal(logits(load_adapter(plain(num_hidden_layers=1), copy).eval()), saved[1])
    again = peft.PeftModel.from_pretrained(plain(num_hidden_layers=1), copy)
    assert torch.equal(logits(again.eval()), saved[1])
    old.popitem()
    save_file(old, copy / TENSORS, metadata={"format": "pt"})
    refused(base, copy, "1 missing")


def test_a_changed_value_is_noticed(copy, base):
    raw = bytearray((copy / TENSORS).read_bytes())
    raw[-2] ^= 1  # a mantissa bit of the last number: finite, plausible, wrong
    (copy / TENSORS).write_bytes(raw)
    refused(base, copy, "is not what was saved")


def test_an_edited_config_is_noticed(copy, base):
    text = (copy / CONFIG).read_text()
    (copy / CONFIG).write_text(text.replace('"alpha": 32.0', '"alpha": 64.0'))
    refused(base, copy, "is not what was saved")


def test_a_pickle_is_never_opened(copy, base, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (copy / TENSORS).unlink()
    torch.save({"x": Payload()}, copy / "adapter_model.bin")
    refused(base, copy, r"does not exist \(other file formats are not loaded\)")
    assert not (tmp_path / "ran").exists()


CONFIG_FAULTS = {
    "newer format": ({"floe_format": 3}, "floe_format must be in .* got 3: .*newer floe"),
    "huge alpha": ({"alpha": 10**400}, "alpha must be a finite number > 0, got 1000"),
    "huge dropout": ({"dropout": 10**400}, r"dropout must be in \[0, 1\), got 1000"),
    "huge layer": ({"layers": [10**400]}, r"layers must be in \[0, 0\] for this model"),
    "format text": ({"floe_format": "1"}, "floe_format must be in"),
    "unknown setting": (
        {"router": "top2"},
        r"unknown settings \['router'\]: written by a newer floe or edited",
    ),
    "another method": ({"peft_type": "LORA"}, "peft_type must be FLOE, got 'LORA'"),
    "no method": ({"peft_type": None}, "peft_type must be FLOE, got None"),
    "text rank": ({"r": "1"}, "r must be a whole number >= 1, got '1'"),
    "huge rank": ({"r": 10**12}, "must be"),
    "nan alpha": ({"alpha": float("nan")}, "alpha must be a finite number > 0, got nan"),
    "list pattern": ({"rank_pattern": [1]}, "rank_pattern must map"),
    "null pattern": ({"rank_pattern": None}, "rank_pattern must map"),
    "nested layers": ({"layers": [[1]]}, "layers must be"),
    "text layers": ({"layers": "0"}, "layers must be"),
    "far layer": ({"layers": [5]}, r"layers must be in \[0, 0\] for this model, got \[5\]"),
    "number target": ({"target_modules": 5}, "target_modules must be"),
    "mixed targets": ({"target_modules": ["up_proj", 5]}, "target_modules must be"),
    "regex bomb": ({"target_modules": "(a+)+$"}, "target_modules must be a list"),
    "list scaling": ({"scaling": []}, "scaling must be"),
    "dict dtype": ({"adapter_dtype": {}}, "adapter_dtype must be"),
    "task": ({"task_type": "NONSENSE"}, "Invalid task type"),
}


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_wrong_settings_are_refused(name, copy, base):
    values, text = CONFIG_FAULTS[name]
    edit_config(copy, **values)
    refused(base, copy, text)


RAW_CONFIGS = {
    "deep": ("[" * 200_000, "cannot be read as JSON"),
    "deep setting": (
        '{"peft_type": "FLOE", "layers": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "cannot be read as JSON",
    ),
    "long number": ('{"peft_type": "FLOE", "r": ' + "9" * 10_000 + "}", "cannot be read as JSON"),
    "huge": (" " * (11 << 20), "must be at most"),
    "empty": ("", "cannot be read as JSON"),
    "a list": ("[]", "peft_type must be FLOE, got 'list'"),
    "not text": (b"\xff\xfe\x00", "cannot be read as JSON"),
}


@pytest.mark.parametrize("name", RAW_CONFIGS)
def test_unreadable_settings_are_refused(name, copy, base):
    content, text = RAW_CONFIGS[name]
    (copy / CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(base, copy, text)


def test_a_missing_folder_or_file_is_named(copy, base, tmp_path):
    refused(base, tmp_path / "nowhere", "does not exist")
    (copy / CONFIG).unlink()
    refused(base, copy, "adapter_config.json: does not exist")


def test_a_bad_adapter_name_is_refused_before_anything(saved, base):
    before = unchanged(base)
    with pytest.raises(ValueError, match="adapter_name must hold only letters"):
        load_adapter(base, saved[0], adapter_name="/tmp/x")
    assert unchanged(base) == before


def test_read_config_needs_no_model(saved):
    config = FloeConfig.from_pretrained(saved[0])
    assert (config.r, config.num_experts, config.target_modules) == (1, 2, ["down_proj"])
