"""The benchmark of search strategies: its counts against loops and known means, its surface."""

import gc
import itertools
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

import benchmarks.search.__main__ as search
from benchmarks import paper
from benchmarks.search import replay, report
from benchmarks.search.replay import STRATEGIES, Surface
from benchmarks.search.surface import PAPER_SPACE, Run, Settings, plan
from floe.rank_search.space import SearchSpace
from floe.rank_search.studies import quiet_optuna

SPACE = SearchSpace(rank=(4, 32, 4), num_experts=(2, 6, 1))  # 40 points


@pytest.fixture(autouse=True)
def _quiet():
    with quiet_optuna():
        yield


def bowl(space=SPACE, best=(24, 3), base=5.0):
    """Lowest at one point, on one row of one token and another that is the same."""
    loss = [1 + ((r - best[0]) / 8) ** 2 + (m - best[1]) ** 2 for r, m in space.points()]
    nll = np.repeat(np.array(loss)[:, None], 2, axis=1)
    return Surface(space, nll, np.ones(2), np.arange(1.0, len(loss) + 1), base)


# what is counted


def test_the_trial_on_a_good_point_counts_as_one_and_the_shares_follow(monkeypatch):
    space = SearchSpace(rank=(1, 4, 1), num_experts=(2, 2, 1))
    nll = np.array([[5.0, 5.0], [4.0, 4.0], [2.0, 2.0], [2.01, 2.01]])
    surface = Surface(space, nll, np.ones(2), np.array([1.0, 2.0, 4.0, 8.0]), 5.0)
    assert surface.good() == {"best": {(3, 2)}, "1 SE": {(3, 2)}, "1 %": {(3, 2), (4, 2)}}
    monkeypatch.setattr(replay, "replay", lambda *_: [0, 3, 2])
    row = replay.summarise([surface], "grid", repeats=2)
    best, near = row["found"]["best"], row["found"]["1 %"]
    assert (best["median"], best["mean"], best["low"], best["high"], best["n"]) == (3, 3, 3, 3, 2)
    assert (best["share_of_trials"], best["share_of_seconds"]) == (3 / 4, 13 / 15)
    assert (near["mean"], near["share_of_seconds"]) == (2, 9 / 15)
    assert (best["expected_in_random_order"], near["expected_in_random_order"]) == (2.5, 5 / 3)
    assert row["regret"]["mean"] == pytest.approx([3.0, 0.01, 0.0, 0.0])
    monkeypatch.setattr(replay, "replay", lambda *_: [2])
    assert replay.summarise([surface], "grid", repeats=1)["found"]["best"]["mean"] == 1


@pytest.mark.parametrize(("points", "good"), [(5, 1), (6, 2), (6, 6)])
def test_the_exact_mean_is_that_of_all_orders(points, good):
    firsts = [
        1 + min(order.index(one) for one in range(good))
        for order in itertools.permutations(range(points))
    ]
    assert replay.expected_trials(points, good) == pytest.approx(np.mean(firsts), abs=1e-12)


def test_good_is_what_the_rows_cannot_tell_from_the_best():
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 9, 50).astype(float)
    nll = rng.gamma(2.0, size=50) * tokens + rng.normal(0, 0.3, (40, 50)) * tokens
    surface = Surface(SPACE, nll, tokens, np.ones(40), 9.0)
    good, loss = surface.good(), surface.loss
    best = int(np.argmin(loss))
    gaps = {}
    for place, point in enumerate(SPACE.points()):
        drawn = rng.integers(0, 50, (4000, 50))
        means = (nll[place] - nll[best])[drawn].sum(1) / tokens[drawn].sum(1)
        gaps[point] = loss[place] - loss[best], means.std()
    assert good["best"] == {SPACE.points()[best]}
    for point, (gap, error) in gaps.items():
        if not 0.95 < gap / max(error, 1e-300) < 1.05:  # the bootstrap's own noise
            assert (point in good["1 SE"]) == (gap <= error), point
        assert (point in good["1 %"]) == (gap <= 0.01 * (9.0 - loss[best]))
    assert 1 < len(good["1 SE"]) < 40


def test_the_standard_error_is_the_usual_one_where_rows_are_of_one_length():
    gap = np.random.default_rng(0).normal(size=30)
    expected = gap.std(ddof=1) / np.sqrt(30) / 4
    assert replay.standard_error(gap, np.full(30, 4.0)) == pytest.approx(expected)


def test_training_that_gained_nothing_leaves_the_best_alone():
    assert bowl(base=0.5).good()["1 %"] == {(24, 3)}


# the strategies


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_strategy_tries_a_point_twice_or_goes_on_after_the_best(strategy):
    surface = bowl()
    for seed in range(5):
        tried = replay.replay(surface, strategy, seed)
        assert len(set(tried)) == len(tried)
        assert [SPACE.points()[place] == (24, 3) for place in tried].index(True) == len(tried) - 1
        assert replay.replay(surface, strategy, seed) == tried


def test_a_replay_asks_as_the_search_does(monkeypatch):
    asked, propose = [], replay.propose

    def recorded(study, space, settings, seed, index):
        asked.append((settings["name"], settings["n_startup_trials"], seed, index))
        return propose(study, space, settings, seed, index)

    monkeypatch.setattr(replay, "propose", recorded)
    tried = replay.replay(bowl(), "paper", 7, startup_trials=4)
    assert asked == [("paper", 4, 7, index) for index in range(len(tried))]


def test_the_grid_is_a_permutation_that_no_loss_changes():
    here, there = bowl(best=(4, 2)), bowl(best=(32, 6))
    for seed in range(5):
        pair = [replay.replay(s, "grid", seed) for s in (here, there)]
        short, long = sorted(pair, key=len)
        assert long[: len(short)] == short
    lengths = {len(replay.replay(here, "grid", seed)) for seed in range(300)}
    assert max(lengths) == 40
    assert min(lengths) == 1


@pytest.mark.parametrize("strategy", ["grid", "random"])
def test_trials_in_random_order_have_the_exact_mean(strategy):
    found = replay.summarise([bowl(base=100.0)], strategy, repeats=250)["found"]
    for name, good in (("best", 1), ("1 %", 3)):  # two neighbours are 0.25 above it
        mean, exact = found[name]["mean"], found[name]["expected_in_random_order"]
        assert exact == 41 / (good + 1)
        tail = np.array(
            [np.prod((41 - good - np.arange(1, k)) / (41 - np.arange(1, k))) for k in range(1, 41)]
        )  # P(trials >= k)
        variance = (2 * np.arange(1, 41) - 1) @ tail - exact**2
        assert tail.sum() == pytest.approx(exact)
        assert abs(mean - exact) < 4 * np.sqrt(variance / 250), (name, mean, exact)
        assert found[name]["low"] < mean < found[name]["high"]


@pytest.mark.parametrize("strategy", ["tpe", "paper"])
def test_tpe_uses_what_it_is_told(strategy):
    surface = bowl(PAPER_SPACE, best=(44, 6))
    found = replay.summarise([surface], strategy, repeats=30)["found"]["best"]
    assert found["high"] < 40 < replay.expected_trials(144, 1)
    first = [replay.replay(s, strategy, 1) for s in (bowl(), bowl(best=(32, 6)))]
    assert first[0][:10] == first[1][:10]  # drawn before anything was told
    assert first[0] != first[1]


# several seeds


def test_noise_is_what_differs_between_seeds():
    assert replay.noise([bowl()]) is None
    space = SearchSpace(rank=(1, 3, 1), num_experts=(2, 2, 1))

    def surface(*loss):
        return Surface(space, np.array(loss)[:, None], np.ones(1), np.ones(3), 9.0)

    found = replay.noise([surface(1.0, 2.0, 3.0), surface(3.0, 2.0, 1.0)])
    assert found["rank_correlation"] == pytest.approx(-1.0)
    assert found["seed_sd"] == pytest.approx(np.sqrt((2 + 0 + 2) / 3))
    assert found["point_sd"] == pytest.approx(0.0)
    assert (found["regret_elsewhere"], found["regret_of_any"]) == (2.0, 1.0)
    same = replay.noise([surface(1.0, 2.0, 3.0)] * 2)
    assert (same["seed_sd"], same["regret_elsewhere"]) == (0.0, 0.0)
    assert same["rank_correlation"] == pytest.approx(1.0)


# the command


def inputs(folder):
    """A model of four layers and a mix; returns the options of a small study of them."""
    (folder / "model").mkdir(parents=True)
    tiny_model(layers=4).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "one.jsonl", 60, "one")
    return (
        f"--model {folder / 'model'} --data {folder} --mix one --rank 2,4,2 --experts 2,3,1 "
        f"--sizes 24,10 --layers 2 --batch-size 4 --steps 3 --rate 1e-2 --longest 64 --repeats 20 "
        f"--startup-trials 2 --output {folder / 'out'}"
    ).split()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    options = inputs(folder)
    gc.freeze()  # the Trainer collects garbage in every run
    search.main([*options, "--seeds", "0,1"])
    yield folder / "out", options
    gc.unfreeze()


def test_it_trains_every_point_on_the_same_rows(study):
    folder, _ = study
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("points/*.json"))]
    wanted = [(r, m, seed) for r in (2, 4) for m in (2, 3) for seed in (0, 1)]
    assert [(run["rank"], run["experts"], run["seed"]) for run in runs] == wanted
    base = json.loads((folder / "base.json").read_text())
    for run in runs:
        assert run["tokens"] == base["tokens"]
        assert len(run["nll"]) == 10
        assert run["loss"] == pytest.approx(sum(run["nll"]) / sum(run["tokens"]))
        assert run["loss"] < base["loss"]
        assert run["seconds"] > 0
        shrink, expand = run["rank"] + run["experts"], run["rank"] * run["experts"]
        up, down = shrink * 32 + expand * 64, shrink * 64 + expand * 32
        assert run["parameters"] == 2 * (2 * up + down)
        assert {"cpu", "torch", "commit", "device"} <= set(run["environment"])
    assert len({run["loss"] for run in runs}) == 8  # a seed is a training of its own


def test_what_is_there_is_not_trained_again_and_the_report_needs_the_files_alone(
    study, tmp_path, capsys
):
    folder, options = study
    before = {file: file.stat().st_mtime_ns for file in folder.glob("points/*.json")}
    events = (folder / "events.jsonl").read_text()
    search.main([*options, "--seeds", "0,1"])
    printed = capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in folder.glob("points/*.json")} == before
    assert (folder / "events.jsonl").read_text() == events
    moved, record, picture = tmp_path / "moved", tmp_path / "found.json", tmp_path / "found.png"
    shutil.copytree(folder, moved)
    shutil.rmtree(moved / "data")
    command = ["--report", str(moved), "--repeats", "20", "--startup-trials", "2"]
    search.main([*command, "--json", str(record), "--plot", str(picture)])
    assert capsys.readouterr().out == printed
    assert picture.stat().st_size > 10_000
    for text in (
        "scale: other, 4 points (the paper's space has 144)",
        "the paper's figures, not",
        "grid, all points",
        "tpe, univariate (paper)",
        "between seeds a point's loss",
    ):
        assert text in printed
    found = json.loads(record.read_text())
    assert [row["case"]["implementation"] for row in found["rows"]] == list(STRATEGIES)
    assert {row["found"]["best"]["n"] for row in found["rows"]} == {40}
    assert found["paper"]["table_8"]["grid search"] == [144, 100.0]
    assert [one["seed"] for one in found["surfaces"]] == [0, 1]


def test_the_plan_says_what_is_missing_and_other_settings_are_refused(study, capsys):
    _, options = study
    search.main([*options, "--seeds", "0,2", "--plan"])
    printed = capsys.readouterr().out
    assert "waiting  r2-m2-seed2" in printed
    assert "4 of 8 points are done; about 0 min to go" in printed
    with pytest.raises(SystemExit):
        search.main([*options, "--steps", "4"])
    assert "is of points with other steps; use another --output" in capsys.readouterr().err
    runs = plan(Settings("model", rank=(4, 8, 4), experts=(2, 2, 1)), (3, 1))
    assert runs == [Run(4, 2, 3), Run(8, 2, 3), Run(4, 2, 1), Run(8, 2, 1)]


def test_killed_in_the_middle_it_loses_one_point(study, tmp_path, capsys):
    options = [*inputs(tmp_path), "--seeds", "0"]
    out = tmp_path / "out"
    process = start("replaying", tmp_path, options)
    assert kill_after(process, out / "events.jsonl", 3, 0.02)  # a point, and part of another
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    finished = {line["run"] for line in lines if line["what"] == "finished"}
    kept = {file: file.stat().st_mtime_ns for file in out.glob("points/*.json")}
    assert {file.stem for file in kept} >= finished
    assert 1 <= len(kept) < 4
    with pytest.raises(SystemExit):
        search.main(["--report", str(out)])
    assert f"a seed must have all 4 points to replay, got {len(kept)}" in capsys.readouterr().err
    search.main(options)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    files = sorted(out.glob("points/*.json"))
    assert len(files) == 4
    for file in files:  # and what was killed came out the same
        ours, theirs = (json.loads((f / "points" / file.name).read_text()) for f in (out, study[0]))
        assert (ours["nll"], ours["parameters"]) == (theirs["nll"], theirs["parameters"])


def test_points_on_other_rows_are_not_compared(study, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(study[0], moved)
    file = moved / "points" / "r2-m2-seed0.json"
    run = json.loads(file.read_text())
    run["tokens"][0] += 1
    file.write_text(json.dumps(run))
    with pytest.raises(SystemExit):
        search.main(["--report", str(moved)])
    assert "points must be measured on the same rows" in capsys.readouterr().err


def test_the_scale_is_called_full_for_the_papers_space_alone():
    assert report._scale(PAPER_SPACE) == "full"
    assert report._scale(SearchSpace((4, 64, 12), (2, 10, 2))) == "reduced"
    assert report._scale(SearchSpace((2, 32, 2), (2, 4, 1))) == "other"


def test_wrong_options_are_refused(tmp_path, capsys):
    for text, message in {
        "--plot a.png": "needs --json",
        "--rank 4,64": "rank must be three ints",
        "--experts 2,9,2": "num_experts must be (low, high, step)",
        "--repeats 0": "must be a whole number >= 1, got '0'",
        "--steps x": "must be a whole number >= 1, got 'x'",
        "--layers 0": "must be a whole number >= 1, got '0'",
        "--rate 0": "learning_rate must be a number > 0",
        "--sizes 5": "sizes must be >= 1 and >= 2 rows",
        "--sizes 5,1": "sizes must be >= 1 and >= 2 rows",
        "--mix none": "mix must be one of",
        "--clock processor --threads 2": "--clock processor needs",
        "--seeds=-1": "seeds must be",
        f"--report {tmp_path / 'none'}": "is missing",
    }.items():
        with pytest.raises(SystemExit):
            search.main(["--output", str(tmp_path / "out"), *text.split()])
        assert message in capsys.readouterr().err, text


def test_more_layers_than_the_model_has_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        search.main([*inputs(tmp_path), "--layers", "5"])
    assert "layers must be at most the model's 4, got 5" in capsys.readouterr().err
    assert not (tmp_path / "out" / "settings.json").exists()  # the next call may say otherwise


def test_the_papers_shares_are_those_of_its_trials():
    for trials, share in paper.TABLE_8.values():
        assert abs(100 * trials / 144 - share) < 1
