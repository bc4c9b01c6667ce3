"""The run folder: done stays done, interrupted resumes, nothing half-written is ever seen."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from floe import FileError
from floe.artifacts.schema import document
from floe.pipeline.run_folder import RunFolder, Stage, _Work
from floe.storage import hash_of, read_json, sha256


class Folder(RunFolder):
    """Makes a stage from its parts."""

    def stage(self, name, inputs, build, announce=lambda *_: None, **options):
        may_discard = options.pop("may_discard", lambda changed: False)
        self.make(Stage(name, inputs, build, **options), announce, may_discard)


@pytest.fixture
def run(tmp_path):
    with Folder(tmp_path / "run").locked() as folder:
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
    for _ in range(2):
        run.stage("score", {"a": 1}, build, lambda *event: heard.append(event))
    assert build.found == [[]]
    assert heard == [("score", "started"), ("score", "finished"), ("score", "unchanged")]
    done = run.done("score")
    assert (done.inputs, done.inputs_hash) == ({"a": 1}, hash_of({"a": 1}))
    assert document(done.outputs) == {
        "sub/out.txt": {"size": 6, "sha256": sha256(run.path / "score/sub/out.txt")}
    }
    assert (done.format, done.stage) == (2, "score")
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [(e["stage"], e["what"]) for e in events] == [
        ("score", "started"),
        ("score", "finished"),
    ]
    assert names(run) == ["events.jsonl", "score"]


def yes(changed):
    return True


def test_other_inputs_are_refused_by_name_and_replace_the_result_only_on_demand(run):
    run.stage("score", {"a": 1, "rate": {"low": 0.5}}, Build("old"))
    build, inputs, asked = Build("new"), {"a": 1, "rate": {"low": 0.25}}, []
    with pytest.raises(FileError, match=r"is finished with rate\.low 0\.5 -> 0\.25; .*--redo"):
        run.stage("score", inputs, build, may_discard=lambda changed: asked.append(changed))
    assert asked == [{"rate"}]
    assert (run.path / "score/sub/out.txt").read_text() == "old"
    heard = []
    run.stage("score", inputs, build, lambda stage, what: heard.append(what), may_discard=yes)
    assert heard == ["made anew: rate.low 0.5 -> 0.25", "started", "finished"]
    assert build.found == [[]]
    assert (run.path / "score/sub/out.txt").read_text() == "new"
    assert names(run) == ["events.jsonl", "score"]


def test_what_stands_behind_inputs_that_differ_is_told(run):
    run.stage("score", {"rows": "a" * 64}, Build(), notes={"limit": 3, "seed": 1})
    run.stage("score", {"rows": "a" * 64}, Build(), notes={"limit": 4, "seed": 1})  # unchanged
    with pytest.raises(FileError, match=r"with rows aaaaaaaa -> bbbbbbbb \(limit 4 -> none\); "):
        run.stage("score", {"rows": "b" * 64}, Build(), notes={"seed": 1})


def test_what_is_quickly_made_is_replaced_without_a_question(run):
    run.stage("arms", {"a": 1}, Build("old"))
    heard = []
    run.stage("arms", {"a": 2}, Build("new"), lambda *event: heard.append(event), disposable=True)
    assert heard[0] == ("arms", "made anew: a 1 -> 2")
    assert (run.path / "arms/sub/out.txt").read_text() == "new"


def test_the_result_of_another_version_is_not_replaced_unasked(run):
    run.stage("score", {"a": 1}, Build("old"))
    file = run.path / "score/DONE.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 1}))
    with pytest.raises(FileError, match="the inputs of another version of floe, which cannot be"):
        run.stage("score", {"a": 1}, Build())
    run.stage("score", {"a": 1}, Build("new"), may_discard=yes)
    assert (run.path / "score/sub/out.txt").read_text() == "new"


def test_a_growing_input_goes_on_from_the_finished_result(run):
    run.stage("search", {"a": 1, "trials": 2}, Build(), growing=["trials"])
    for trials in (4, 3):  # more, and fewer
        build = Build()
        run.stage("search", {"a": 1, "trials": trials}, build, growing=["trials"])
        assert build.found == [["sub"]]
    with pytest.raises(FileError, match="a 1 -> 2, trials 3 -> 4"):
        run.stage("search", {"a": 2, "trials": 4}, Build(), growing=["trials"])


def test_a_longer_search_takes_no_adapter_from_the_stages_that_rest_on_it(run):
    """Its work is kept; the run goes on with the settings before, or by redo with the new ones."""
    rests = {"growing": ["trials"], "followers": ["score"], "handed": "sub"}
    run.stage("search", {"trials": 2}, Build("first"), **rests)
    run.stage("search", {"trials": 3}, Build("best"), **rests)  # nothing rests on it yet
    run.stage("score", {"adapter": 1}, Build())
    run.stage("search", {"trials": 4}, Build("best"), **rests)  # the same is the best
    for _ in range(2):
        with pytest.raises(FileError, match=r"another sub than search/, on which .* score rests"):
            run.stage("search", {"trials": 5}, Build("better"), **rests)
        assert (run.path / "search/sub/out.txt").read_text() == "best"
        assert (run.path / "search.work/sub/out.txt").read_text() == "better"
    heard = []
    run.stage("search", {"trials": 4}, Build(), lambda _, what: heard.append(what), **rests)
    assert heard == ["unchanged"]
    run.stage("search", {"trials": 5}, Build("better"), may_discard=yes, **rests)
    assert (run.path / "search/sub/out.txt").read_text() == "better"
    replaced = {"trials": 5, "model": "new"}  # of no use any more: made anew unasked
    run.stage("search", replaced, Build("new"), may_discard=lambda names: "model" in names, **rests)
    assert (run.path / "search/sub/out.txt").read_text() == "new"


def stopped(work):
    raise KeyboardInterrupt


def test_a_kill_before_an_allowed_replacement_is_published_is_gone_on_from(run, monkeypatch):
    rests = {"growing": ["trials"], "followers": ["score"], "handed": "sub"}
    run.stage("search", {"trials": 2}, Build("first"), **rests)
    run.stage("score", {"adapter": 1}, Build())
    with monkeypatch.context() as killed:
        killed.setattr(_Work, "publish", stopped)
        with pytest.raises(KeyboardInterrupt):
            run.stage("search", {"trials": 3}, Build("new"), may_discard=yes, **rests)
    run.stage("search", {"trials": 3}, Build("new"), **rests)  # nobody is asked twice
    assert (run.path / "search/sub/out.txt").read_text() == "new"


def test_a_growing_stage_goes_on_from_a_result_that_others_have_touched(run):
    run.stage("search", {"trials": 2}, Build(), growing=["trials"])
    (run.path / "search/sub/out.txt").write_text("touched")
    build = Build()
    run.stage("search", {"trials": 2}, build, growing=["trials"])
    assert build.found == [["sub"]]
    assert (run.path / "search/sub/out.txt").read_text() == "result"


def test_a_finished_result_that_was_copied_in_part_is_copied_again(run, monkeypatch):
    def halfway(source, target):
        raise KeyboardInterrupt

    run.stage("search", {"trials": 2}, Build(), growing=["trials"])
    monkeypatch.setattr("shutil.copy2", halfway)
    with pytest.raises(KeyboardInterrupt):
        run.stage("search", {"trials": 3}, Build(), growing=["trials"])
    monkeypatch.undo()
    build = Build()
    run.stage("search", {"trials": 3}, build, growing=["trials"])
    assert build.found == [["sub"]]


def damage_cut(path):
    path.write_text("resul")


def damage_flip(path):
    path.write_text("resulT")  # same size


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, os.unlink])
def test_a_damaged_output_is_built_again_and_said(run, damage):
    run.stage("score", {"a": 1}, Build())
    damage(run.path / "score/sub/out.txt")
    build, heard = Build(), []
    run.stage("score", {"a": 1}, build, lambda stage, what: heard.append(what))
    assert build.found == [[]]
    assert heard[0] == "made again: sub/out.txt is damaged or missing"
    assert (run.path / "score/sub/out.txt").read_text() == "result"


def test_a_flipped_bit_deep_in_a_large_output_is_seen(run):
    def large(work):
        (work / "scores").write_bytes(bytes(3 << 20))

    run.stage("score", {"a": 1}, large)
    with (run.path / "score/scores").open("r+b") as file:
        file.seek(3 << 19)
        file.write(b"x")
    heard = []
    run.stage("score", {"a": 1}, large, lambda stage, what: heard.append(what))
    assert heard == ["made again: scores is damaged or missing", "started", "finished"]


def test_an_edited_card_is_the_users(run):
    def card(work):
        (work / "README.md").write_text("generated")

    run.stage("train", {"a": 1}, card)
    (run.path / "train/README.md").write_text("my own words")
    run.stage("train", {"a": 1}, failing)  # not called
    assert (run.path / "train/README.md").read_text() == "my own words"


def test_a_record_that_lists_files_elsewhere_deletes_none(run):
    mine = run.path / "mine.txt"
    mine.write_text("years of work")
    run.stage("score", {"a": 1}, Build())
    file = run.path / "score/DONE.json"
    done = json.loads(file.read_text())
    done["outputs"]["../mine.txt"] = {"size": 1, "sha256": ""}
    file.write_text(json.dumps(done))
    with pytest.raises(FileError, match=r"must list files inside its folder, got '\.\./mine\.txt'"):
        run.stage("score", {"a": 2}, Build(), may_discard=yes)
    assert mine.read_text() == "years of work"


def test_a_digest_is_taken_once_and_anew_for_a_changed_file(run, tmp_path, monkeypatch):
    file, read = tmp_path / "weights.bin", []
    file.write_bytes(b"one")
    monkeypatch.setattr("floe.pipeline.run_folder._SETTLED", 0)
    monkeypatch.setattr("floe.pipeline.run_folder.sha256", lambda p: read.append(p) or sha256(p))
    time.sleep(0.02)
    for _ in range(2):
        assert run.digest(file) == sha256(file)
    assert RunFolder(run.path).digest(file) == sha256(file)  # another process
    assert len(read) == 1
    times = file.stat()
    file.write_bytes(b"two")  # the same size, and its time put back
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run.digest(file) == sha256(file)
    (tmp_path / "new").write_bytes(b"six")
    os.utime(tmp_path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(tmp_path / "new", file)
    assert run.digest(file) == sha256(file)
    (run.path / "digests.json").write_text("{")
    assert RunFolder(run.path).digest(file) == sha256(file)


def test_the_digest_of_a_file_that_has_just_changed_is_not_kept(run, tmp_path):
    """A second change within the same tick of the clock would leave size and times alike."""
    file = tmp_path / "weights.bin"
    file.write_bytes(b"one")
    run.digest(file)
    assert not (run.path / "digests.json").exists()
    os.utime(file, (time.time() + 3600,) * 2)  # or whose times lie ahead
    run.digest(file)
    assert not (run.path / "digests.json").exists()


def test_a_damaged_record_is_an_error_naming_the_file(run):
    run.stage("score", {"a": 1}, Build())
    (run.path / "score/DONE.json").write_text('{"inputs_hash": ')
    with pytest.raises(FileError, match=r"score/DONE.json: cannot be read as JSON.*delete this"):
        run.stage("score", {"a": 1}, Build())
    (run.path / "score/DONE.json").unlink()  # as it says
    run.stage("score", {"a": 1}, Build("new"))
    assert (run.path / "score/sub/out.txt").read_text() == "new"
    assert (run.path / "score/sub/out.txt.1").read_text() == "result"


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
    assert set(run.done("train/main").outputs) == {"checkpoint", "sub/out.txt"}
    assert sorted(p.name for p in (run.path / "train").iterdir()) == ["main"]


def test_an_interrupted_stage_with_other_inputs_is_refused_and_starts_anew_on_demand(run):
    with pytest.raises(RuntimeError, match="stopped"):
        run.stage("train", {"a": 1}, failing)
    build = Build()
    with pytest.raises(FileError, match=r"train\.work: holds unfinished work with a 1 -> 2; "):
        run.stage("train", {"a": 2}, build)
    assert (run.path / "train.work/checkpoint").read_text() == "half"
    run.stage("train", {"a": 2}, build, may_discard=yes)
    assert build.found == [[]]


def test_an_attempt_that_left_nothing_is_no_reason_to_ask(run):
    def stopped_at_once(work):
        (work / "search.lock").touch()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        run.stage("train", {"a": 1}, stopped_at_once)
    run.stage("train", {"a": 2}, Build())


def test_a_replacement_that_was_allowed_and_interrupted_continues_unasked(run):
    run.stage("score", {"a": 1}, Build("old"))
    with pytest.raises(RuntimeError, match="stopped"):
        run.stage("score", {"a": 2}, failing, may_discard=yes)
    build = Build("new")
    run.stage("score", {"a": 2}, build)
    assert build.found == [["checkpoint"]]


def test_a_failing_rebuild_keeps_the_old_result(run):
    run.stage("score", {"a": 1}, Build("old"))
    with pytest.raises(RuntimeError, match="stopped"):
        run.stage("score", {"a": 2}, failing, may_discard=yes)
    assert (run.path / "score/sub/out.txt").read_text() == "old"
    build = Build("unused")
    run.stage("score", {"a": 1}, build)
    assert build.found == []


def test_a_second_process_is_refused_at_once(run):
    script = (
        "import sys; from floe.pipeline.run_folder import RunFolder; from floe import FileError\n"
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
from floe.pipeline.run_folder import RunFolder, Stage

def build(work):
    (work / "checkpoint").write_text("half")
    print("building", flush=True)
    time.sleep(60)

with RunFolder(sys.argv[1]).locked() as run:
    run.make(Stage("train", {"a": 1}, build))
"""


def test_kill_9_in_the_middle_of_a_stage_leaves_no_result_and_no_lock(tmp_path):
    command = [sys.executable, "-c", BUILD_FOR_EVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "building\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "train").exists()
    build = Build()
    with Folder(tmp_path).locked() as run:
        assert run.done("train") is None
        run.stage("train", {"a": 1}, build)
    assert build.found == [["checkpoint"]]
    assert set(run.done("train").outputs) == {"checkpoint", "sub/out.txt"}


class Stop:
    """Raises at the n-th call of a function, as a kill there would end it."""

    def __init__(self, monkeypatch, owner, name, calls):
        self.real, self.left = getattr(owner, name), calls
        monkeypatch.setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")],
)
def test_a_stop_anywhere_shows_no_partial_result_and_loses_no_work(
    run, owner, name, foreign, monkeypatch
):
    """At every call of the functions that change the folder; sealed work is not done again."""
    calls = 0
    while True:
        calls += 1
        stage, finished = f"s{calls}", []
        run.stage(stage, {"a": 1}, Build("old"))
        if foreign:
            (run.path / stage / "sub/mine.txt").write_text("mine")

        def build(work, finished=finished):
            Build("new")(work)
            finished.append(work)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            stop = Stop(patch, owner, name, calls)
            run.stage(stage, {"a": 2}, build, may_discard=yes)
        done = run.done(stage)
        if done is not None and done.inputs == {"a": 2}:
            assert (run.path / stage / "sub/out.txt").read_text() == "new"
        sealed = (run.path / f"{stage}.work/DONE.json").exists()
        done_already = sealed or (done is not None and done.inputs == {"a": 2})
        before = len(finished)
        run.stage(stage, {"a": 2}, build, may_discard=yes)
        assert len(finished) == before + (not done_already)
        assert (run.path / stage / "sub/out.txt").read_text() == "new"
        assert not any(p.is_file() for p in (run.path / f"{stage}.work").rglob("*"))
        if foreign:
            assert (run.path / stage / "sub/mine.txt").read_text() == "mine"
        if stop.left > 0:
            break
    assert calls > 1


# What floe did not write


def test_files_of_others_survive_a_replacement(run):
    run.stage("train", {"a": 1}, Build("old"))
    final = run.path / "train"
    (final / "sub/mine.txt").write_text("mine")
    (final / "notes").mkdir()
    (final / "notes/thesis.txt").write_text("years of work")
    (final / ".DS_Store").write_bytes(b"x")
    (final / "link").symlink_to("nowhere")
    run.stage("train", {"a": 2}, Build("new"), may_discard=yes)
    assert (final / "sub/out.txt").read_text() == "new"
    assert (final / "sub/mine.txt").read_text() == "mine"
    assert (final / "notes/thesis.txt").read_text() == "years of work"
    assert (final / ".DS_Store").exists()
    assert (final / "link").is_symlink()
    assert set(run.done("train").outputs) == {"sub/out.txt"}


def test_a_folder_in_a_stages_place_keeps_its_files(run):
    (run.path / "train").mkdir()
    (run.path / "train/mine.txt").write_text("mine")
    (run.path / "train/sub").mkdir()
    (run.path / "train/sub/out.txt").write_text("mine as well")
    run.stage("train", {"a": 1}, Build("new"))
    assert (run.path / "train/mine.txt").read_text() == "mine"
    assert (run.path / "train/sub/out.txt").read_text() == "new"
    assert (run.path / "train/sub/out.txt.1").read_text() == "mine as well"


def test_a_stage_folder_that_is_a_link_stays_one(run, tmp_path):
    (tmp_path / "large-disk").mkdir()
    (run.path / "train").symlink_to(tmp_path / "large-disk")
    for number in (1, 2):
        run.stage("train", {"a": number}, Build(str(number)), may_discard=yes)
        assert (tmp_path / "large-disk/sub/out.txt").read_text() == str(number)
    assert (run.path / "train").is_symlink()


def test_a_work_folder_that_floe_did_not_begin_is_refused(run):
    work = run.path / "train.work"
    work.mkdir()
    (work / ".DS_Store").write_bytes(b"x")
    run.stage("other", {"a": 1}, Build())
    (work / "mine.txt").write_text("mine")
    with pytest.raises(FileError, match=r"train\.work: must be a folder that floe began"):
        run.stage("train", {"a": 1}, Build(), may_discard=yes)
    assert (work / "mine.txt").read_text() == "mine"
    (work / "mine.txt").unlink()
    run.stage("train", {"a": 1}, Build())
    assert set(run.done("train").outputs) == {"sub/out.txt"}


def test_files_of_others_in_a_work_folder_survive_and_are_no_result(run):
    def stopped(work):
        (work / "notes.txt").write_text("mine")
        failing(work)

    def tidy(work):
        (work / "checkpoint").unlink(missing_ok=True)

    ways = {"results": ["sub"], "tidy": tidy}
    with pytest.raises(RuntimeError, match="stopped"):
        run.stage("train", {"a": 1}, stopped, **ways)
    build = Build()
    run.stage("train", {"a": 2}, build, may_discard=yes, **ways)
    assert build.found == [["notes.txt"]]
    assert (run.path / "train/notes.txt").read_text() == "mine"
    assert set(run.done("train").outputs) == {"sub/out.txt"}


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


def test_the_outlook_says_what_a_stage_would_do_and_writes_nothing(tmp_path):
    def work(folder, stop=False):
        (folder / "result").write_text("x")
        if stop:
            raise KeyboardInterrupt

    def state(**inputs):
        before = sorted(tmp_path.rglob("*"))
        reader = RunFolder(tmp_path, read_only=True)
        stage = Stage("one", inputs, work, growing=("n",))
        found = reader.outlook(stage, lambda changed: False)
        assert sorted(tmp_path.rglob("*")) == before
        return found

    folder = Folder(tmp_path)
    assert state(a=1, n=1) == "to do"
    with pytest.raises(KeyboardInterrupt):
        folder.stage("one", {"a": 1, "n": 1}, lambda place: work(place, stop=True))
    assert state(a=1, n=1) == "to do, from where it stopped"
    assert state(a=2, n=1) == "refused without --redo: a 1 -> 2"
    folder.stage("one", {"a": 1, "n": 1}, work)
    assert state(a=1, n=1) == "done"
    assert state(a=1, n=2) == "to do, from what is done"
    assert state(a=2, n=2).startswith("refused without --redo: a 1 -> 2")
    (tmp_path / "one/result").write_text("y")
    assert state(a=1, n=1) == "made again: result is damaged or missing"
