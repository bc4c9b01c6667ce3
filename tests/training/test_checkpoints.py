import json
import os
import shutil

import pytest

from floe.errors import FileError
from floe.training import checkpoints

ME = {"rows": "abc", "learning_rate": 0.1, "points": (1, 2)}


def make(root, step, identity=ME, sealed=True):
    folder = root / f"checkpoint-{step}"
    (folder / ("sub" if sealed else ".")).mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(bytes(range(100)))
    (folder / ("sub" if sealed else ".") / "rng_state.pth").write_text(f"step {step}")
    if sealed:
        checkpoints.seal(folder, identity)
    return folder


def test_the_newest_whole_one(tmp_path):
    assert checkpoints.newest(tmp_path / "none", ME) is None
    for step in (2, 4, 10):
        make(tmp_path, step)
    make(tmp_path, 12, sealed=False)
    assert checkpoints.newest(tmp_path, ME) == tmp_path / "checkpoint-10"
    assert [step for step, _ in checkpoints.checkpoints(tmp_path)] == [2, 4, 10]
    assert (tmp_path / "broken" / "checkpoint-12" / "optimizer.pt").is_file()


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "optimizer.pt").unlink(),
        lambda f: (f / "optimizer.pt").write_bytes(bytes(99)),
        lambda f: (f / "optimizer.pt").write_bytes(bytes(100)),
        lambda f: (f / "sub" / "rng_state.pth").write_text("step 5"),
        lambda f: (f / "floe_done.json").write_text("{"),
        lambda f: (f / "floe_done.json").write_text("{}"),
        lambda f: (f / "floe_done.json").write_text("[]"),
        lambda f: (f / "floe_done.json").write_bytes(b"\xff"),
        lambda f: os.replace(f / "floe_done.json", f / "floe_done.json.tmp"),
    ],
)
def test_damage_is_seen(tmp_path, damage):
    make(tmp_path, 2)
    folder = make(tmp_path, 4)
    assert checkpoints.verify(folder)["rows"] == "abc"
    damage(folder)
    assert checkpoints.verify(folder) is None
    assert checkpoints.newest(tmp_path, ME) == tmp_path / "checkpoint-2"


def test_the_number_decides_whatever_the_times_say(tmp_path):
    """The clock may have been set back, the folder copied from another machine."""
    for place, step in enumerate((9, 10, 2)):
        folder = make(tmp_path, step)
        os.utime(folder, (2e9 + place, 2e9 + place))
    assert checkpoints.newest(tmp_path, ME) == tmp_path / "checkpoint-10"
    checkpoints.rotate(tmp_path, 2)
    assert [step for step, _ in checkpoints.checkpoints(tmp_path)] == [9, 10]


def test_files_of_others_survive(tmp_path):
    notes = tmp_path / "checkpoint-notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "mine.txt").write_text("mine")
    (tmp_path / "readme.txt").write_text("mine")
    unsealed = make(tmp_path, 1, sealed=False)
    (unsealed / "mine.txt").write_text("mine")
    for step in (2, 3, 4):
        folder = make(tmp_path, step)
        (folder / "mine.txt").write_text("mine")  # in a sealed one: neither damage nor to go
        (folder / ".DS_Store").write_bytes(b"x")
    assert checkpoints.newest(tmp_path, ME) == tmp_path / "checkpoint-4"
    checkpoints.rotate(tmp_path, 1)
    assert [
        s for s, p in checkpoints.checkpoints(tmp_path) if (p / "floe_done.json").is_file()
    ] == [4]
    assert checkpoints.newest(tmp_path, ME) == tmp_path / "checkpoint-4"
    checkpoints.remove_checkpoints(tmp_path)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert [name for name in left if ".DS_Store" not in name] == [
        "broken/checkpoint-1/mine.txt",
        "broken/checkpoint-2/mine.txt",
        "broken/checkpoint-3/mine.txt",
        "broken/mine.txt",
        "checkpoint-4/mine.txt",
        "checkpoint-notes/thesis.txt",
        "readme.txt",
    ]


def test_what_a_file_manager_leaves_is_not_sealed(tmp_path):
    folder = make(tmp_path, 4, sealed=False)
    (folder / ".DS_Store").write_bytes(b"x")
    checkpoints.seal(folder, ME)
    (folder / ".DS_Store").write_bytes(b"changed")
    assert checkpoints.verify(folder) is not None


def test_older_damaged_ones_are_set_aside_too(tmp_path):
    """One half deleted when the process died."""
    old = make(tmp_path, 2)
    make(tmp_path, 4)
    (old / "optimizer.pt").unlink()
    checkpoints.newest(tmp_path, ME)
    assert [step for step, _ in checkpoints.checkpoints(tmp_path)] == [4]


def test_the_same_step_may_break_twice(tmp_path):
    for _ in range(3):
        make(tmp_path, 4, sealed=False)
        assert checkpoints.newest(tmp_path, ME) is None
    names = sorted(path.name for path in (tmp_path / "broken").iterdir())
    assert names == ["checkpoint-4", "checkpoint-4.1", "checkpoint-4.2"]
    checkpoints.remove_checkpoints(tmp_path)
    assert not tmp_path.exists()


def test_another_runs_checkpoint_is_refused(tmp_path):
    make(tmp_path, 4)
    other = {**ME, "learning_rate": 0.2, "extra": 1}
    with pytest.raises(
        FileError, match="of a run with other extra, learning_rate; use another output_dir"
    ):
        checkpoints.newest(tmp_path, other)
    assert checkpoints.newest(tmp_path, dict(ME)) is not None


def test_a_user_s_file_in_a_checkpoint_is_never_listed(tmp_path):
    folder = make(tmp_path, 2, sealed=False)
    (folder / "mine.txt").write_text("mine")
    checkpoints.seal(folder, ME)
    checkpoints.remove_checkpoints(tmp_path)
    assert [p.name for p in folder.iterdir()] == ["mine.txt"]


def test_a_checkpoint_under_another_step_s_name_is_set_aside(tmp_path):
    for step in (2, 3):
        folder = make(tmp_path, step, sealed=False)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        checkpoints.seal(folder, ME)
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-7" / "mine.txt").write_text("mine")
    assert checkpoints.newest(tmp_path, ME) == tmp_path / "checkpoint-3"
    checkpoints.remove_checkpoints(tmp_path)
    assert [p.name for p in tmp_path.rglob("*.txt")] == ["mine.txt"]


def test_a_file_in_a_checkpoint_s_place_is_named(tmp_path):
    make(tmp_path, 2)
    (tmp_path / "checkpoint-8").write_text("mine")
    with pytest.raises(FileError, match="checkpoint-8: lies where a checkpoint's folder may"):
        checkpoints.newest(tmp_path, ME)
