"""Damaged and edited adapter folders: refused, or exactly the adapter that was saved.

floe's loader raises a FileError. PEFT's raises one, too, or a ValueError; where damage keeps PEFT
from seeing whose adapter it is, whatever PEFT raises then (KeyError, TypeError, RecursionError).
"""

import contextlib
import json
import random
import shutil
import time

import peft
import pytest
import torch
from helpers.attack import trials
from helpers.importance_models import plain
from helpers.small_adapters import trained
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from floe import FileError, FloeConfig, load_adapter, save_adapter
from floe.adapters import adapted_modules, get_model, remove_adapters

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
VALUES = [
    None,
    True,
    0,
    1,
    -1,
    2,
    3,
    10**12,
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "1",
    "\ud800",
    "../x",
    "sqrt",
    [],
    [0],
    [[0]],
    ["up_proj"],
    {},
    {"0": 1},
]
# Of a second change, where the first has left nothing to read.
UNCHANGEABLE = (OSError, ValueError, KeyError, StopIteration, RecursionError, SafetensorError)
UNCHANGEABLE += (NotImplementedError,)  # torch's, of dtypes that an earlier change named
BEFORE_FLOE = (KeyError, TypeError, RecursionError, AttributeError)  # of PEFT, see above


def flip(folder, draw):
    file = folder / draw.choice([CONFIG, TENSORS, TENSORS])
    raw = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        end = len(raw)
        if file.name == TENSORS and draw.random() < 0.5:  # the header, which is short
            end = 8 + int.from_bytes(raw[:8], "little")
        raw[draw.randrange(min(len(raw), end))] ^= 1 << draw.randrange(8)
    file.write_bytes(raw)


def cut(folder, draw):
    file = folder / draw.choice([CONFIG, TENSORS])
    raw = file.read_bytes()
    place = draw.randrange(len(raw))
    grown = raw + draw.randbytes(place % 64 + 1)
    file.write_bytes(draw.choice([raw[:place], raw[place:], grown, raw[:place] + raw[place + 1 :]]))


def edit_settings(folder, draw):
    file = folder / CONFIG
    values = json.loads(file.read_text())
    name, other = draw.sample(sorted(values), 2)
    how = draw.choice(["value", "remove", "rename", "swap", "add", "twice"])
    if how == "value" or how == "twice":
        new = json.dumps(draw.choice(VALUES))
    if how == "value":
        values[name] = json.loads(new)
    elif how == "remove":
        del values[name]
    elif how == "rename":
        values[draw.choice([name.upper(), f"{name} ", other])] = values.pop(name)
    elif how == "swap":
        values[name], values[other] = values[other], values[name]
    elif how == "add":
        values[draw.choice(["router", "runtime_config", "", "__class__"])] = draw.choice(VALUES)
    text = json.dumps(values, indent=2, sort_keys=True)
    if how == "twice":
        text = text.replace("{", f'{{"{name}": {new},', 1)
    file.write_text(text)


def edit_tensors(folder, draw):
    """As another program would: the digest is gone, or that of the old content."""
    file = folder / TENSORS
    header = json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}")
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    changes = {
        "none": {},
        "value": {name: tensor + 1},
        "nan": {name: tensor * float("nan")},
        "shape": {name: tensor[1:]},
        "turned": {name: tensor.transpose(0, 1).contiguous()},
        "type": {name: tensor.to(draw.choice([torch.int8, torch.float64, torch.bfloat16]))},
        "twin": {name.removeprefix("base_model.model."): tensor.clone()},
        "bare": {name.removesuffix(".weight"): tensor.clone()},
        "foreign": {"base_model.model.lm_head.weight": torch.ones(61, 32)},
        "name": {name.replace("0", "1"): tensors.pop(name)} if draw.random() < 0.3 else {},
    }
    kept = header["__metadata__"] if draw.random() < 0.5 else {"format": "pt"}
    save_file(tensors | draw.choice(list(changes.values())), file, metadata=kept)


def edit_header(folder, draw):
    file = folder / TENSORS
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = raw[8:end]
    how = draw.choice(["length", "offset", "twice", "metadata", "deep", "type"])
    if how == "length":
        length = draw.choice([0, 1, end - 9, end - 7, 2**31, 2**62, 2**64 - 1])
        file.write_bytes(length.to_bytes(8, "little") + raw[8:])
        return
    place = text.index(b"data_offsets")
    digit = next(i for i in range(place, len(text)) if 48 <= text[i] <= 57)
    text = {
        "offset": text[:digit] + b"%d" % draw.randrange(10) + text[digit + 1 :],
        "twice": b'{"__metadata__":{"format":"pt"},' + text[1:],
        "metadata": text.replace(b"floe_digest", draw.choice([b"digest", b"", b"format"])),
        "deep": b"[" * draw.choice([10, 100_000]) + text,
        "type": text.replace(b"F32", draw.choice([b"I32", b"F16", b"X", b"U32"]), 1),
    }[how]
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])


def change_files(folder, draw):
    """Links, and files that are missing, swapped or something else."""
    name = draw.choice([CONFIG, TENSORS])
    file, outside = folder / name, folder.parent / "outside"
    how = draw.choice(["out", "within", "loop", "loose", "gone", "folder", "other", "pickle", "up"])
    if how == "within":
        file.rename(folder / "other")
        file.symlink_to("other")
        return
    if how == "other":
        shutil.copyfile(folder / (CONFIG if name == TENSORS else TENSORS), file)
        return
    file.unlink()
    if how == "out":
        file.symlink_to(outside / name)
    elif how == "up":
        file.symlink_to(f"../outside/{name}")
    elif how == "loop":
        file.symlink_to(name)
    elif how == "loose":
        file.symlink_to("nowhere")
    elif how == "folder":
        file.mkdir()
    elif how == "pickle":
        torch.save(load_file(outside / TENSORS), folder / "adapter_model.bin")


CHANGES = [flip, flip, cut, edit_settings, edit_tensors, edit_header, change_files]
LOADERS = {
    "floe": lambda base, folder: load_adapter(base, folder),
    "peft": lambda base, folder: peft.PeftModel.from_pretrained(base, folder),
}


def state(model):
    """All that a refusal must leave as it was."""
    modules = [(type(m), sorted(vars(m)), len(m._forward_pre_hooks)) for m in model.modules()]
    values = [(p.data_ptr(), p.requires_grad, p.sum().item()) for p in model.parameters()]
    return modules, values


@pytest.mark.filterwarnings("ignore:The configuration file contains a `runtime_config`")
@pytest.mark.parametrize("part", range(10))
def test_a_changed_folder_is_refused_or_is_what_was_saved(part, tmp_path):
    draw = random.Random(part)
    base = plain(num_hidden_layers=1).eval()
    config = FloeConfig(r=1, num_experts=2, target_modules=["down_proj"])
    model = trained(get_model(base, config))
    save_adapter(model, tmp_path / "outside")
    wanted = {n: t.clone() for n, t in peft.get_peft_model_state_dict(model).items()}
    settings = FloeConfig.from_pretrained(tmp_path / "outside").to_dict()
    remove_adapters(model)
    before, outside = state(base), contents(tmp_path / "outside")
    refusals = 0
    count = trials(1000)
    for trial in range(count):
        folder = tmp_path / "folder"
        shutil.copytree(tmp_path / "outside", folder)
        changes = draw.choices(CHANGES, k=draw.choice([1, 1, 1, 2]))
        if trial == 0:  # an unchanged folder loads
            changes = []
        elif changes[0] is change_files:  # nothing is written through its links
            changes = changes[:1]
        for change in changes:
            with contextlib.suppress(*UNCHANGEABLE):
                change(folder, draw)
        loader = draw.choice(list(LOADERS))
        began = time.process_time()
        try:
            loaded = LOADERS[loader](base, folder)
        except FileError:
            refusals += 1
        except ValueError:
            assert loader == "peft", (part, trial)
            refusals += 1
        except BEFORE_FLOE:
            assert loader == "peft", (part, trial)
            assert not names_floe(folder), (part, trial)
            refusals += 1
        else:
            found = peft.get_peft_model_state_dict(loaded)
            assert found.keys() == wanted.keys(), (part, trial)
            assert all(torch.equal(found[n], t) for n, t in wanted.items()), (part, trial)
            assert loaded.peft_config["default"].to_dict() == settings, (part, trial)
            remove_adapters(loaded)
        assert time.process_time() - began < 2, (part, trial)
        assert state(base) == before, (part, trial)
        shutil.rmtree(folder)
    assert 0.7 * count < refusals < count
    assert contents(tmp_path / "outside") == outside
    assert [f.name for f in tmp_path.iterdir()] == ["outside"]
    assert not adapted_modules(base)


def names_floe(folder):
    try:
        return json.loads((folder / CONFIG).read_bytes())["peft_type"] == "FLOE"
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        return False


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}
