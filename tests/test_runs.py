"""The run folder: done stays done, interrupted resumes, nothing half-written is ever seen."""

import json
import os
import signal
import subprocess
import sys

import pytest

from floe import FileError
from floe.runs import RunFolder, environment, hash_of, read_json, sha256


@pytest.fixture
def run(tmp_path):
    with RunFolder(tmp_path / "run").locked() as folder:
        yield folder


class Build:
    """A stage's work, counting how often it ran and what it found."""

    def __init__(self, text="result"):
        self.text, self.found = text, []

    def __call__(self, work):
        self.found.append(sorted(p.name for p in work.iterdir() if not p.name.startswith(".")))
        (work / "sub").mkdir(exist_ok=True)
        (work / "sub" / "out.txt").write_text(self.text)


def names(run):
    return sorted(p.name for p in run.path.iterdir() if p.name != "lock")


def test_a_stage_is_built_once_and_recorded(run):
    build, heard = Build(), []
    first = run.stage("score", {"a": 1}, build, lambda *event: heard.append(event))
    assert (
        run.stage("score", {"a": 1}, build, lambda *event: heard.append(event))
        == first
        == hash_of({"a": 1})
    )
    assert build.found == [[]]
    assert heard == [("score", "started"), ("score", "finished"), ("score", "unchanged")]
    done = run.done("score")
    assert done["inputs"] == {"a": 1}
    assert done["outputs"] == {
        "sub/out.txt": {"size": 6, "sha256": sha256(run.path / "score/sub/out.txt")}
    }
    assert (done["format"], done["stage"]) == (1, "score")
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [(e["stage"], e["what"]) for e in events] == [
        ("score", "started"),
        ("score", "finished"),
    ]
    assert names(run) == ["events.jsonl", "score"]


def test_other_inputs_build_again_from_nothing(run):
    run.stage("score", {"a": 1}, Build("old"))
    build = Build("new")
    run.stage("score", {"a": 2}, build)
    assert build.found == [[]]
    assert (run.path / "score/sub/out.txt").read_text() == "new"
    assert names(run) == ["events.jsonl", "score"]


def damage_cut(path):
    path.write_text("resul")


def damage_flip(path):
    path.write_text("resulT")  # same size


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, os.unlink])
def test_a_damaged_output_is_built_again(run, damage):
    run.stage("score", {"a": 1}, Build())
    damage(run.path / "score/sub/out.txt")
    build = Build()
    run.stage("score", {"a": 1}, build)
    assert build.found == [[]]
    assert (run.path / "score/sub/out.txt").read_text() == "result"


def test_a_damaged_record_is_an_error_naming_the_file(run):
    run.stage("score", {"a": 1}, Build())
    (run.path / "score/DONE.json").write_text('{"inputs_hash": ')
    with pytest.raises(FileError, match=r"score/DONE.json: cannot be read as JSON"):
        run.stage("score", {"a": 1}, Build())


def failing(work):
    (work / "checkpoint").write_text("half")
    raise RuntimeError("stopped")


def test_an_interrupted_stage_resumes_where_it_was(run):
    with pytest.raises(RuntimeError, match="stopped"):
        run.stage("train/main", {"a": 1}, failing)
    assert run.done("train/main") is None
    assert not (run.path / "train/main").exists()
    build = Build()
    run.stage("train/main", {"a": 1}, build)
    assert build.found == [["checkpoint"]]
    assert set(run.done("train/main")["outputs"]) == {"checkpoint", "sub/out.txt"}
    assert sorted(p.name for p in (run.path / "train").iterdir()) == ["main"]


def test_an_interrupted_stage_with_other_inputs_starts_anew(run):
    with pytest.raises(RuntimeError, match="stopped"):
        run.stage("train", {"a": 1}, failing)
    build = Build()
    run.stage("train", {"a": 2}, build)
    assert build.found == [[]]


def test_a_failing_rebuild_keeps_the_old_result(run):
    run.stage("score", {"a": 1}, Build("old"))
    with pytest.raises(RuntimeError, match="stopped"):
        run.stage("score", {"a": 2}, failing)
    assert (run.path / "score/sub/out.txt").read_text() == "old"
    build = Build("unused")
    run.stage("score", {"a": 1}, build)
    assert build.found == []


def test_a_second_process_is_refused_at_once(run):
    script = (
        "import sys; from floe.runs import RunFolder; from floe import FileError\n"
        "try:\n    RunFolder(sys.argv[1]).locked().__enter__()\n"
        "except FileError as error:\n    sys.exit(f'refused: {error}')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(run.path)], capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "another process is working in this run folder" in ended.stderr


def test_the_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), RunFolder(tmp_path).locked():
        raise RuntimeError("stop")
    with RunFolder(tmp_path).locked():
        pass


BUILD_FOR_EVER = """
import sys, time
from floe.runs import RunFolder

def build(work):
    (work / "checkpoint").write_text("half")
    print("building", flush=True)
    time.sleep(60)

with RunFolder(sys.argv[1]).locked() as run:
    run.stage("train", {"a": 1}, build)
"""


def test_kill_9_in_the_middle_of_a_stage_leaves_no_result_and_no_lock(tmp_path):
    command = [sys.executable, "-c", BUILD_FOR_EVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "building\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "train").exists()
    build = Build()
    with RunFolder(tmp_path).locked() as run:
        assert run.done("train") is None
        run.stage("train", {"a": 1}, build)
    assert build.found == [["checkpoint"]]
    assert set(run.done("train")["outputs"]) == {"checkpoint", "sub/out.txt"}


@pytest.mark.parametrize("call", ["floe.runs.write_json", "floe.runs.replace_folder", "os.fsync"])
def test_a_stop_while_publishing_never_shows_a_partial_result(run, call, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(call, stop)
    with pytest.raises(KeyboardInterrupt):
        run.stage("score", {"a": 1}, Build())
    assert run.done("score") is None
    monkeypatch.undo()
    run.stage("score", {"a": 1}, Build())
    assert set(run.done("score")["outputs"]) == {"sub/out.txt"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"a": 1, "a": 2}', "cannot be read as JSON: a key occurs twice"),
        ('{"a": [{"b": 1' + "0" * 400 + "}]}", r"x.json: a\[0\].b must be a whole number"),
        ('{"a": 1' + "0" * 100_000 + "}", "x.json: a must be a whole number of at most 63 bits"),
        ('{"a": [0, -1e300]}', r"x.json: a\[1\] must be a number of at most 1e200"),
        ('{"a": "' + "x" * 100_001 + '"}', "x.json: a must be text of at most 100,000"),
        ('{"a": ' + "[" * 65 + "]" * 65 + "}", r"must be nested at most 64 deep"),
        (b'{"a": "\xff"}', "cannot be read as JSON: .*0xff"),
    ],
    ids=["cut", "list", "deep", "twice", "huge", "huger", "float", "text", "nested", "bytes"],
)
def test_a_bad_json_file_is_named(tmp_path, content, text):
    (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=text):
        read_json(tmp_path / "x.json")
    with pytest.raises(FileError, match=r"none\.json: is missing"):
        read_json(tmp_path / "none.json")


def test_a_missing_key_is_the_file_s_fault(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [{"b": 1}]}')
    found = read_json(tmp_path / "x.json")
    assert found == {"a": [{"b": 1}]}
    assert found.get("c") is None
    for take in (lambda: found["c"], lambda: found["a"][0]["c"]):
        with pytest.raises(FileError, match=r"x\.json: c is missing"):
            take()


def test_the_environment_names_versions_without_loading_them():
    script = (
        "import json, sys; from floe.runs import environment; found = environment()\n"
        "assert 'torch' not in sys.modules; print(json.dumps(found))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    found = json.loads(printed)
    assert found == json.loads(json.dumps(environment()))
    assert {"python", "platform", "cpu", "threads", "torch", "peft", "floe", "commit"} <= set(found)
    assert found["torch"]
