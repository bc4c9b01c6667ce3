"""Runs killed at random instants, in every stage: each ends with the bytes of an unbroken one."""

import json
import random
import time

import pytest
from helpers import killing
from helpers.attack import trials
from helpers.tiny_run import write_inputs

from floe.storage import sha256

RESULTS = (
    "search/adapter",
    "score/scores.npz",
    "select",
    "train/main/adapter",
    "train/first/adapter",
    "adapter",
    "eval/results.json",
    "eval/losses.json",
)
PLACES = (  # where somebody might put a file of theirs
    "",
    "search",
    "search.work",
    "score.work",
    "train",
    "train/main.work",
    "train/main",
    "train/main.work/checkpoints",
    "train/mine",
    "eval.work",
    "eval",
    "adapter",
)
KILLS = 100


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The smallest run that has every stage."""
    found = write_inputs(tmp_path_factory.mktemp("inputs"), layers=2)
    return found | {
        "warmup": {"max_steps": 2},
        "score": {"rows": 4, "batch_size": 2, "taylor_rows": 2, "statistic_rows": 2},
        "select": {"layers": 1, "tune": False},
        "train": found["train"] | {"max_steps": 3, "save_steps": 1, "validations": 1},
        "baselines": [{"name": "first", "policy": "spectrum"}],
        "eval": {"limit": 4},
        "profile": {"steps": 0},
    }


def digests(folder):
    files = []
    for name in RESULTS:
        path = folder / name
        files += sorted(p for p in path.iterdir()) if path.is_dir() else [path]
    wanted = [f for f in files if f.suffix in (".json", ".npz", ".safetensors")]
    return {str(f.relative_to(folder)): sha256(f) for f in wanted if f.name != "DONE.json"}


class Runs:
    """Starts one run after the other; each goes on after its kills, and is compared at its end."""

    def __init__(self, config, folder):
        self.config, self.folder, self.draw = config, folder, random.Random(0)
        began = time.monotonic()
        self.start("unbroken", None).join()
        self.seconds = time.monotonic() - began
        self.changes = int((folder / "changes").read_text())
        self.expected = digests(folder / "unbroken")
        assert len(self.expected) > 12
        self.number, self.killed, self.notes = 0, {}, {}

    def start(self, name, fatal):
        settings = {**self.config, "name": name, "output_dir": str(self.folder)}
        return killing.start("running", self.folder, settings, fatal)

    def kill_once(self, number):
        """Go on with the run until a kill: before a change of the folder, or after some time."""
        run = self.folder / f"run{self.number}"
        at_a_change = number % 3
        fatal = self.draw.randrange(1, self.changes // 3) if at_a_change else None
        process = self.start(run.name, fatal)
        if at_a_change:
            process.join(120)
        else:
            process.join(self.draw.random() * self.seconds / 2)
            process.kill()
            process.join(60)
        code = process.exitcode
        process.close()
        assert code in (0, -9), f"stuck or failed after {self.killed}"
        if code == 0:
            self.finish(run)
            return False
        stage = max(run.rglob("*.work"), key=lambda f: f.stat().st_mtime, default=run)
        self.killed[stage.name] = self.killed.get(stage.name, 0) + 1
        self.leave_a_note(run)
        return True

    def leave_a_note(self, run):
        places = [run / place for place in PLACES if (run / place).is_dir()]
        if places:
            note = self.draw.choice(places) / f"note{len(self.notes)}.txt"
            note.write_text(text := f"note {len(self.notes)}")
            self.notes[note.name] = text

    def finish(self, run):
        """What an unkilled attempt has left is what an unbroken run leaves; notes are all there."""
        assert digests(run) == self.expected
        found = {path.name: path.read_text() for path in run.rglob("note*.txt")}
        assert found == self.notes
        assert json.loads((run / "eval/DONE.json").read_text())["inputs"]["arms"].keys() == {
            "main",
            "first",
        }
        self.number, self.notes = self.number + 1, {}


@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(config, tmp_path):
    runs, kills = Runs(config, tmp_path), 0
    while kills < trials(KILLS):
        kills += runs.kill_once(kills)
    process = runs.start(f"run{runs.number}", None)
    process.join(120)
    assert process.exitcode == 0
    runs.finish(tmp_path / f"run{runs.number}")
    if trials(KILLS) == KILLS:
        assert {"search.work", "score.work", "main.work", "eval.work"} <= runs.killed.keys()
