"""Files and folders that appear whole or not at all."""

import errno
import os

import pytest

from floe.storage import copy_folder, hash_of, publish, read_json, staging, write_json, write_text


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {"a": [1, float("nan")]}], ids=str)
def test_numbers_that_are_not_finite_are_never_written(tmp_path, bad):
    write_json(tmp_path / "x.json", {"good": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", bad)
    with pytest.raises(ValueError, match="not JSON compliant"):
        hash_of(bad)
    assert read_json(tmp_path / "x.json") == {"good": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "x.txt", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "x.txt", "new")
    assert (tmp_path / "x.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_json_is_written_the_same_whatever_the_order(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "ä": [2]})
    write_json(tmp_path / "b", {"ä": [2], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert hash_of({"x": 1, "y": 2}) == hash_of({"y": 2, "x": 1}) != hash_of({"x": 1, "y": 3})


def test_a_copied_folder_goes_over_the_old_one(tmp_path):
    (tmp_path / "new").mkdir()
    for name in ("a", "README.md"):
        (tmp_path / "new" / name).write_text("1")
    (tmp_path / "out").mkdir()
    for name in ("a", "README.md", "mine"):
        (tmp_path / "out" / name).write_text("0")
    copy_folder(tmp_path / "new", tmp_path / "out")
    found = {p.name: p.read_text() for p in (tmp_path / "out").iterdir()}
    assert found == {"a": "1", "README.md": "0", "mine": "0"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out"]


def test_a_drawn_name_is_nobody_s(tmp_path):
    with staging(tmp_path / "deep" / "out") as first, staging(tmp_path / "deep" / "out") as second:
        assert first != second
        (first / "a").touch()
        publish(first, tmp_path / "deep" / "out")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("a")] == ["deep/out/a"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")
