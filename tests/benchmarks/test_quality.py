"""The comparison of policies, end to end on a tiny model, and its statistics against loops."""

import gc
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.killing import kill_after, start
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tiny_run import write_rows

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: an installed floe stays first

import benchmarks.quality.__main__ as quality
from benchmarks import questions
from benchmarks.quality import report
from benchmarks.quality.report import Cell
from benchmarks.quality.runs import Run, Settings, Study, check_arm
from floe.adapters import remove_adapters
from floe.importance.scores import LayerStatistics

ARMS = "adapter_fisher,random,even"
pytestmark = pytest.mark.filterwarnings("ignore:.*is zero everywhere:RuntimeWarning")


def inputs(folder):
    """A model of four layers and two mixes; returns the options of a small study of them."""
    (folder / "model").mkdir(parents=True)
    tiny_model(layers=4).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for mix in ("one", "two"):
        write_rows(folder / f"{mix}.jsonl", 60, mix)
    sizes = "--sizes 32,8,10 --layers 2 --batch-size 4 --points 2 --warmup-steps 3 --score-rows 8"
    return (
        f"--model {folder / 'model'} --data {folder} --mixes one,two --arms {ARMS} --draws 2 "
        f"--seeds 0,1 --steps 4 --longest 64 {sizes} --rates 1e-3,1e-2 --output {folder / 'out'}"
    ).split()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    options = inputs(folder)
    gc.freeze()  # the Trainer collects garbage in every run
    quality.main(options)
    quality.main([*options, "--phase", "time", "--rounds", "2"])
    yield folder / "out", options
    gc.unfreeze()


def test_it_trains_every_arm_of_the_plan_and_reports_it(study):
    folder, _ = study
    files = sorted(file.stem for file in folder.glob("runs/*.json"))
    # two mixes: three arms at two rates on seed 0, the second draw, and four runs on seed 1
    assert len(files) == 2 * (3 * 2 + 1 + 4)
    found = json.loads((folder / "report.json").read_text())
    assert [(r["mix"], r["arm"], r["seeds"], r["runs"]) for r in found["rows"]] == [
        (mix, arm, 2, runs)
        for mix in ("one", "two")
        for arm, runs in (("adapter_fisher", 2), ("even", 2), ("random", 4))
    ]
    for row in found["rows"]:
        assert row["rate"] == float(min(row["rates"], key=row["rates"].get))
        assert len(row["rates"]) == 2
        assert row["test"] < row["base"]
        assert [step for step, _ in row["validation"]] == [2, 4]
        assert row["step_seconds"] > 0
        gap = row["default_minus_this"]
        assert (gap is None) == (row["arm"] == "adapter_fisher")
        assert gap is None or gap["low"] <= gap["value"] <= gap["high"]
        assert gap is None or (gap["pairs"], gap["seeds"]) == (row["runs"], 2)
    assert {"cpu", "torch", "commit"} <= set(found["environments"][0])


def test_arms_share_rows_and_differ_in_layers_alone(study):
    runs = [json.loads(file.read_text()) for file in study[0].glob("runs/one-seed1-*.json")]
    assert len({json.dumps(run["test"]["tokens"]) for run in runs}) == 1
    up, down = 12 * 32 + 64 * 32, 12 * 64 + 32 * 32  # shrink [8 + 4, K] and expand [N, 4, 8]
    assert {run["parameters"] for run in runs} == {2 * (2 * up + down)}
    chosen = {(run["arm"], run["draw"]): run["layers"] for run in runs}
    assert chosen["even", 0] == [0, 3]
    assert all(len(layers) == 2 for layers in chosen.values())
    splits = [
        set((study[0] / f"data/one-seed1/{s}.jsonl").read_text().splitlines())
        for s in questions.SPLITS
    ]
    assert [len(rows) for rows in splits] == [32, 8, 10]
    assert len(set.union(*splits)) == 50


def test_a_random_draw_has_its_own_layers_whatever_the_rate(study):
    runs = [json.loads(file.read_text()) for file in study[0].glob("runs/*-random-*.json")]
    layers = {}
    for run in runs:
        layers.setdefault((run["mix"], run["seed"], run["draw"]), set()).add(tuple(run["layers"]))
    assert {len(sets) for sets in layers.values()} == {1}
    for mix in ("one", "two"):
        by_draw = [{key[2]: s for key, s in layers.items() if key[:2] == (mix, n)} for n in (0, 1)]
        assert any(draws[0] != draws[1] for draws in by_draw)
        assert by_draw[0] != by_draw[1]


def test_arms_may_spend_their_parameters_otherwise(study):
    folder, options = study
    settings, _ = quality.COMMAND.parse(options)
    work = Study(folder, settings)
    places = {
        arm: work.placement(Run("one", 1, arm, 0, 4, 1e-3))
        for arm in (
            "adapter_fisher",
            "adapter_fisher@modules",
            "adapter_fisher@sizes",
            "forward_selection",
        )
    }
    assert not places["adapter_fisher"].modules
    names = {name for one in places["adapter_fisher@modules"].modules.values() for name in one}
    assert names <= {"gate_proj", "up_proj", "down_proj"}
    assert {experts for _, experts in places["adapter_fisher@sizes"].sizes.values()} == {4}
    statistics = LayerStatistics.load(folder / "warmups/one-seed1/forward_selection.npz")
    first = np.flatnonzero(statistics.values["forward_place"] <= 2)
    assert places["forward_selection"].layers == tuple(first)
    model = work.fresh(work.work("one", 1), places["adapter_fisher@modules"])
    remove_adapters(model)


@pytest.mark.parametrize("arm", ["adapter_fisher@parts", "unknown", "@modules"])
def test_unknown_arms_are_refused(arm):
    with pytest.raises(ValueError, match=r"arm must be one of .*@modules or @sizes, got"):
        check_arm(arm)


def test_forgetting_is_the_rise_of_the_other_mixs_loss(study):
    bases = {(b["mix"], b["seed"]): b for b in report.read(study[0]).bases.values()}
    for run in report.read(study[0]).runs:
        mix = {"one": "two", "two": "one"}[run["mix"]]
        assert run["other"]["tokens"] == bases[mix, run["seed"]]["validation"]["tokens"]
        assert bases[run["mix"], run["seed"]]["other"] == bases[mix, run["seed"]]["validation"]


def test_the_comparison_is_that_of_the_files(study):
    records = report.read(study[0])
    for row in report.summarise(records):
        runs = {
            (run["seed"], run["arm"], run["draw"]): run["test"]["mean"]
            for run in records.runs
            if run["mix"] == row["mix"]
            and run["rate"] == report.best_rate(records.runs, row["mix"], run["arm"], 4)
        }
        draws = range(row["runs"] // 2)
        gaps = [
            runs[seed, "adapter_fisher", 0] - runs[seed, row["arm"], draw]
            for seed in (0, 1)
            for draw in draws
        ]
        timed = row["default_minus_this_at_equal_seconds"]
        assert (timed is None) == (row["arm"] == "adapter_fisher")
        if row["arm"] != "adapter_fisher":
            assert timed["low"] <= timed["value"] <= timed["high"]
            assert row["default_minus_this"]["value"] == pytest.approx(np.mean(gaps), abs=1e-12)
            assert row["default_minus_this"]["lower"] == sum(gap < 0 for gap in gaps)


def test_a_seed_weighs_the_same_however_many_draws_it_has():
    runs = [{"seed": 0}, {"seed": 0}, {"seed": 1}]
    assert report._over_seeds(runs, [1.0, 3.0, 10.0]) == 6.0


def test_what_is_there_is_not_trained_again_and_the_report_needs_the_files_alone(
    study, tmp_path, capsys
):
    folder, options = study
    before = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*.json")}
    events = (folder / "events.jsonl").read_text()
    quality.main(options)
    printed = capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in folder.glob("runs/*.json")} == before
    assert (folder / "events.jsonl").read_text() == events
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    (moved / "report.json").unlink()
    quality.main(["--report", str(moved)])
    assert capsys.readouterr().out == printed
    assert (moved / "report.json").read_bytes() == (folder / "report.json").read_bytes()
    quality.main([*options, "--plan"])
    assert "22 of 22 runs are done" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        quality.main([*options, "--layers", "3"])
    assert "is of runs with other layers; use another --output" in capsys.readouterr().err


def test_killed_in_the_middle_it_loses_one_run(tmp_path, study):
    options = [*inputs(tmp_path), "--arms", "even", "--seeds", "0"]
    out = tmp_path / "out"
    process = start("comparing", tmp_path, options)
    assert kill_after(process, out / "events.jsonl", 5, 0.05)  # a warm-up, a run, half of another
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    finished = {line["run"] for line in lines if line["what"] == "finished" and "run" in line}
    assert {file.stem for file in out.glob("runs/*.json")} >= finished
    assert 1 <= len(finished) < 4
    kept = {file: file.stat().st_mtime_ns for file in out.glob("runs/*.json")}
    quality.main(options)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    files = sorted(out.glob("runs/*.json"))
    assert len(files) == 4
    for file in files:  # and what was killed came out the same
        ours, theirs = (json.loads((f / "runs" / file.name).read_text()) for f in (out, study[0]))
        for key in ("layers", "validation", "test", "other", "train_loss"):
            assert ours[key] == theirs[key], (file.name, key)


def cells(seeds=3, draws=4, rows=11):
    rng = np.random.default_rng(5)
    return [
        Cell(
            rng.gamma(2.0, size=rows),
            rng.gamma(2.0, size=(draws, rows)),
            rng.integers(1, 9, rows).astype(float),
        )
        for _ in range(seeds)
    ]


def test_the_difference_is_the_mean_over_seeds_of_token_means():
    found = cells()
    expected = 0.0
    for one in found:
        own = sum(one.losses) / sum(one.tokens)
        others = sum(sum(draw) / sum(one.tokens) for draw in one.others) / len(one.others)
        expected += (own - others) / len(found)
    assert report.compare(found, resamples=9)["value"] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="at least one seed"):
        report.compare([])


def test_the_interval_resamples_rows_draws_and_seeds():
    rows, one = 400, np.ones
    rng = np.random.default_rng(1)

    def width(own, others):
        made = [Cell(a, b, one(len(a))) for a, b in zip(own, others, strict=True)]
        found = report.compare(made)
        return found["high"] - found["low"]

    noise = rng.normal(size=rows)
    alone = width([noise], [np.zeros((1, rows))])
    assert alone == pytest.approx(2 * 1.96 * noise.std() / np.sqrt(rows), rel=0.1)  # rows alone
    levels = np.array([-1.0, 1.0] * 8)[:, None] * one(rows)  # sixteen draws of sd 1
    assert width([np.zeros(rows)], [levels]) == pytest.approx(2 * 1.96 / 4, rel=0.1)
    seeds = [level * one(rows) for level in (-1.0, 1.0) * 8]
    assert width(seeds, [np.zeros((1, rows))] * 16) == pytest.approx(2 * 1.96 / 4, rel=0.1)
    assert width([noise], [noise[None]]) == 0.0  # paired


def fake(arm, rate, losses, seed=0, draw=0, layers=(0,)):
    measured = {"mean": 1.0, "nll": [1.0], "tokens": [1]}
    return {
        "mix": "m",
        "seed": seed,
        "arm": arm,
        "draw": draw,
        "steps": 10,
        "rate": rate,
        "layers": list(layers),
        "validation": losses,
        "test": measured,
        "other": measured,
    }


def test_the_rate_is_the_best_of_seed_zero_at_the_end():
    runs = [
        fake("even", 1e-3, [[5, 1.0], [10, 3.0]]),
        fake("even", 3e-3, [[5, 2.0], [10, 2.5]]),
        fake("even", 1e-2, [[5, 1.0], [10, 2.5]]),
        fake("even", 1e-1, [[5, 0.0], [10, 0.0]], seed=1),
        fake("even", 1e-1, [[5, 0.0], [10, 0.0]], draw=1),
        fake("last", 1e-1, [[5, 0.0], [10, 0.0]]),
    ]
    assert report.best_rate(runs, "m", "even", 10) == 3e-3  # the lower of two that tie
    with pytest.raises(ValueError, match="chosen on seed 0: run it first"):
        report.best_rate(runs, "m", "first", 10)


def test_equal_seconds_are_those_of_the_fastest_arm():
    base = {
        "mix": "m",
        "seed": 0,
        "validation": {"mean": 4.0},
        "test": {"mean": 4.0},
        "other": {"mean": 0.5},
    }
    slow = fake("adapter_fisher", 1e-3, [[5, 3.0], [10, 2.0]], layers=(0,))
    fast = fake("last", 1e-3, [[5, 3.5], [10, 2.5]], layers=(3,))
    times = {report.place_of(slow): 2.0, report.place_of(fast): 0.8}
    records = report.Records([fast, slow], {("m", 0): base}, times, {})
    first, second = report.summarise(records)
    assert (first["arm"], second["arm"]) == ("adapter_fisher", "last")
    assert first["equal_seconds"] == pytest.approx(8.0)
    left = (4.0 - 4 / 5) - 2.0  # four steps of five are done, the validation loss ends at 2
    assert first["at_equal_seconds"] == pytest.approx(1.0 + left)
    assert second["at_equal_seconds"] == pytest.approx(1.0)
    assert first["default_minus_this_at_equal_seconds"] is None
    gap = second["default_minus_this_at_equal_seconds"]
    assert (gap["value"], gap["lower"], gap["pairs"]) == (pytest.approx(left), 0, 1)
    assert second["default_minus_this"]["value"] == pytest.approx(0.0)
    assert first["forgetting"] == pytest.approx(0.5)
    untimed = report.Records([fast, slow], {("m", 0): base}, {("m", (0,)): 2.0}, {})
    assert report.summarise(untimed)[0]["at_equal_seconds"] is None


def test_arms_on_other_rows_are_not_compared():
    own, other = fake("even", 1e-3, []), fake("last", 1e-3, [])
    other["test"] = {"mean": 1.0, "nll": [1.0], "tokens": [2]}
    with pytest.raises(ValueError, match="same rows"):
        report.cell(own, [other])


def test_the_plan_is_balanced_wherever_it_stops():
    _, options = quality.COMMAND.parse(["--arms=random,even", "--draws=2", "--seeds=0,1"])
    runs = quality.plan(options, Settings("model", mixes=("a", "b"), data="d", rates=(1.0, 2.0)))
    assert runs[:4] == [Run(mix, 0, "random", 0, 100, r) for mix in "ab" for r in (1.0, 2.0)]
    first = [(r.arm, r.draw, r.mix, r.rate) for r in runs if r.seed == 0][8:]
    assert first == [("random", 1, "a", None), ("random", 1, "b", None)]
    assert [r.seed for r in runs] == sorted(r.seed for r in runs)
    assert {r.rate for r in runs if r.seed == 1} == {None}


def test_wrong_options_are_refused(tmp_path, capsys):
    for options, text in (
        (["--arms", "best"], "arm must be one of"),
        (["--mixes", "one"], "mixes must be at least 2"),
        (["--mixes", "one,two"], "without --data, got ['one', 'two']"),
    ):
        with pytest.raises(SystemExit):
            quality.main([*options, "--model", str(tmp_path), "--output", str(tmp_path / text[:3])])
        assert text in capsys.readouterr().err


def test_a_split_refuses_too_few_rows(tmp_path):
    rows = [{"prompt": str(i), "completion": " a"} for i in range(5)]
    sizes = {"train": 3, "validation": 1, "test": 1}
    questions.write_split(rows, tmp_path, sizes, "s", lambda row: True)
    with pytest.raises(ValueError, match="at least 5 that fit, got 4"):
        questions.write_split(rows, tmp_path, sizes, "s", lambda row: row["prompt"] != "2")
