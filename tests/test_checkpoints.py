import os

import pytest

from floe.errors import FileError
from floe.training import checkpoints

ME = {"rows": "abc", "learning_rate": 0.1, "points": (1, 2)}


def make(root, step, identity=ME, sealed=True):
    folder = root / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(100)))
    (folder / "sub" / "state").write_text(f"step {step}")
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
    assert (tmp_path / "broken" / "checkpoint-12" / "weights").is_file()


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "weights").unlink(),
        lambda f: (f / "weights").write_bytes(bytes(99)),
        lambda f: (f / "weights").write_bytes(bytes(100)),
        lambda f: (f / "sub" / "state").write_text("step 5"),
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


def test_older_damaged_ones_are_set_aside_too(tmp_path):
    """One half deleted when the process died is the youngest by time and would be spared."""
    old = make(tmp_path, 2)
    make(tmp_path, 4)
    (old / "weights").unlink()
    checkpoints.newest(tmp_path, ME)
    assert [step for step, _ in checkpoints.checkpoints(tmp_path)] == [4]


def test_the_same_step_may_break_twice(tmp_path):
    for _ in range(3):
        make(tmp_path, 4, sealed=False)
        assert checkpoints.newest(tmp_path, ME) is None
    names = sorted(path.name for path in (tmp_path / "broken").iterdir())
    assert names == ["checkpoint-4", "checkpoint-4.1", "checkpoint-4.2"]
    checkpoints.remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_runs_checkpoint_is_refused(tmp_path):
    make(tmp_path, 4)
    other = {**ME, "learning_rate": 0.2, "extra": 1}
    with pytest.raises(
        FileError, match="of a run with other extra, learning_rate; use another output_dir"
    ):
        checkpoints.newest(tmp_path, other)
    assert checkpoints.newest(tmp_path, dict(ME)) is not None
