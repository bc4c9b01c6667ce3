import contextlib
import dataclasses
import gc
import math
import random
import shutil
import sqlite3
import threading
from pathlib import Path

import optuna
import pytest
import torch
from helpers import killing
from helpers.tiny import tiny_model, tiny_rows
from optuna.distributions import IntDistribution
from optuna.trial import TrialState

import floe.rank_search.search
from floe.adapters import FloeConfig, get_model, remove_adapters
from floe.adapters.fingerprint import model_fingerprint
from floe.data.batches import make_batches
from floe.errors import SearchError
from floe.evaluation import validation_loss
from floe.rank_search import storage, studies
from floe.rank_search.search import search
from floe.rank_search.space import REDRAWS, SAMPLERS, SearchSpace, propose, sampler_settings
from floe.rank_search.studies import Outcome, Owner, mask
from floe.training.schedule import TrainSettings
from floe.training.train import train

SMALL = SearchSpace(rank=(1, 3, 1), num_experts=(1, 2, 1))
FAST = TrainSettings(
    learning_rate=1e-2, warmup_ratio=0.0, grad_accum=4, max_steps=2, save_steps=None
)


def run(directory, **changes):
    rows = tiny_rows(24)
    arguments = {"space": SMALL, "trials": 3, "settings": FAST, "adapter": {"dropout": 0.0}}
    base = changes.pop("base", None) or tiny_model(layers=1)
    return search(base, rows[:16], rows[16:], directory=directory, **{**arguments, **changes})


def made_up(point):
    return (point[0] - 20) ** 2 / 100 + abs(point[1] - 3)


def simulate(settings, space, count, seed=41, drop=()):
    """Points of a search on a made-up objective; ``drop`` = indices killed once before they end."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    me, points, killed = Owner.current(), [], set()
    while len(points) < count:
        index = len(studies.finished(study))
        point, redraws = propose(study, space, settings, seed, index)
        trial = studies.begin_trial(study, space.distributions(), point, me, index, redraws)
        if index in drop and index not in killed:
            killed.add(index)
            studies.fail_orphans(study, me, alone=True)
            continue
        studies.end_trial(study, trial, Outcome(made_up(point)))
        points.append(point)
    return points


@pytest.fixture(autouse=True)
def _quiet():
    gc.freeze()  # each Trainer collects all garbage; with all that is imported that takes a second
    with studies.quiet_optuna():
        yield
    gc.unfreeze()


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_point_twice_and_an_interrupted_search_is_the_unbroken_one(name):
    settings, space = sampler_settings(name, 10), SearchSpace()
    points = simulate(settings, space, 30)
    assert len(set(points)) == 30
    assert set(points) <= set(space.points())
    assert simulate(settings, space, 30, drop={0, 4, 11, 12, 29}) == points
    assert simulate(settings, space, 30, seed=7) != points


def test_tpe_finds_the_optimum_of_a_smooth_function_and_differs_from_the_paper_setting():
    space, best = SearchSpace(), (20, 3)
    found = {
        name: simulate(sampler_settings(name, 10), space, 24) for name in ("tpe", "paper", "random")
    }
    assert best in found["tpe"]
    assert len({tuple(points) for points in found.values()}) == 3
    assert found["tpe"][:3] == found["tpe"][:3]


def test_an_exhausted_space_is_covered_exactly():
    points = simulate(sampler_settings("tpe", 4), SMALL, 6)
    assert sorted(points) == SMALL.points()
    study = optuna.create_study()
    for index, point in enumerate(SMALL.points()):
        trial = studies.begin_trial(study, SMALL.distributions(), point, Owner.current(), index, 0)
        studies.end_trial(study, trial, Outcome(1.0))
    with pytest.raises(ValueError, match="all 6 are tried"):
        propose(study, SMALL, sampler_settings("tpe", 4), 41, 6)


def test_each_trial_draws_from_a_generator_of_its_own():
    study, space = optuna.create_study(), SearchSpace()
    drawn = [propose(study, space, sampler_settings("random", 1), 41, index) for index in range(30)]
    assert len({point for point, _ in drawn}) > 15
    assert all(redraws == 0 for _, redraws in drawn)


def test_after_bounded_redraws_the_nearest_untried_point_is_taken(monkeypatch):
    study = optuna.create_study()
    space = SearchSpace(rank=(2, 8, 2), num_experts=(2, 4, 1))
    for index, point in enumerate(((4, 3), (4, 2))):
        trial = studies.begin_trial(study, space.distributions(), point, Owner.current(), index, 0)
        studies.end_trial(study, trial, Outcome(1.0))
    monkeypatch.setattr("floe.rank_search.space._suggest", lambda *_: (4, 3))
    assert propose(study, space, sampler_settings("random", 1), 0, 2) == (
        (2, 3),
        REDRAWS + 1,
    )


def test_space():
    assert len(SearchSpace().points()) == 48
    assert len(SearchSpace(rank=(4, 64, 4), num_experts=(2, 10, 1)).points()) == 144
    assert SearchSpace(rank=(2, 2, 1), num_experts=(1, 1, 1)).points() == [(2, 1)]
    for bad in ((0, 4, 1), (4, 2, 1), (2, 5, 2), (2, 4, 0)):
        with pytest.raises(ValueError, match=r"rank must be \(low, high, step\)"):
            SearchSpace(rank=bad)
    with pytest.raises(TypeError, match="num_experts must be three ints"):
        SearchSpace(num_experts=(2, 4))


def test_search_keeps_the_best_model_and_leaves_the_base_alone(tmp_path):
    base, rows = tiny_model(layers=1), tiny_rows(24)
    before, notes = {n: p.clone() for n, p in base.named_parameters()}, []
    result = run(tmp_path, base=base, trials=4, on_progress=lambda *v: notes.append(v))
    values = {t.number: t.value for t in result.trials}
    assert sorted(values) == [0, 1, 2, 3]
    assert result.distinct == 4
    assert result.objective == min(values.values())
    assert values[result.best_trial] == result.objective
    best = result.trials[result.best_trial]
    assert (best.rank, best.num_experts) == (result.rank, result.num_experts)
    assert result.seconds == sum(t.seconds for t in result.trials) > 0
    assert not result.exhausted
    assert result.sampler["multivariate"] is True
    assert result.sampler["constant_liar"] is False
    assert [n[:2] for n in notes] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # the model returned is the best trial's: its loss is the objective
    again = validation_loss(result.model, make_batches(rows[16:], 16))
    assert again == pytest.approx(result.objective, abs=1e-7)
    remove_adapters(result.model)
    after = dict(base.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    # and the same as training that point by hand
    config = FloeConfig(r=result.rank, num_experts=result.num_experts, dropout=0.0)
    model = get_model(base, config, seed=41)
    train(
        model,
        rows[:16],
        settings=dataclasses.replace(FAST, validation_points=()),
        output_dir=tmp_path / "hand",
    )
    assert validation_loss(model, make_batches(rows[16:], 16)) == result.objective
    left = [p.name for p in (tmp_path / "trials").iterdir()]
    assert left == [f"{result.best_trial:04d}-r{result.rank}-m{result.num_experts}"]


def test_a_small_space_is_searched_whole_and_says_so(tmp_path):
    notes = []
    result = run(tmp_path, trials=50, sampler="grid", on_progress=lambda *v: notes.append(v[2]))
    assert result.exhausted
    assert sorted((t.rank, t.num_experts) for t in result.trials) == SMALL.points()
    assert notes[-1] == "the space has 6 points, fewer than 50 trials: all are trained"
    assert {t.redraws for t in result.trials} == {0}


def test_a_finished_search_returns_at_once_and_can_be_extended(tmp_path, monkeypatch):
    first = run(tmp_path, trials=2)
    with monkeypatch.context() as patch:
        patch.setattr(floe.rank_search.search, "train", None)
        again = run(tmp_path, trials=2)
    assert again.trials == first.trials
    longer = run(tmp_path, trials=4)
    assert longer.trials[:2] == first.trials
    assert longer.distinct == 4
    with monkeypatch.context() as patch:  # fewer: what is trained stays, the best of all is found
        patch.setattr(floe.rank_search.search, "train", None)
        fewer = run(tmp_path, trials=1)
    assert fewer.trials == longer.trials
    assert fewer.objective == longer.objective == min(t.value for t in longer.trials)


def test_other_arguments_are_refused_by_name(tmp_path):
    run(tmp_path, trials=1)
    with pytest.raises(ValueError, match=r"same arguments, got other seed; use another directory"):
        run(tmp_path, trials=2, seed=3)
    with pytest.raises(ValueError, match="got other adapter, settings"):
        run(tmp_path, adapter={}, settings=dataclasses.replace(FAST, learning_rate=1e-3))
    with pytest.raises(ValueError, match="got other base_model"):
        run(tmp_path, base=tiny_model(layers=1, seed=5))


def test_settings_that_change_no_result_may_change(tmp_path):
    first = run(tmp_path, trials=1)
    changed = dataclasses.replace(FAST, eval_batch_size=2, save_steps=1, validation_points=())
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as database:
        database.execute("pragma journal_mode = wal")  # another program's choice
    assert run(tmp_path, trials=2, settings=changed).trials[:1] == first.trials
    assert list(tmp_path.glob("study.db-*")) == []  # all is in the file that a run keeps


def test_points_that_ran_out_of_memory_are_tried_again_with_less(tmp_path, monkeypatch):
    real = floe.rank_search.search.train

    def exhausted(model, rows, **keywords):
        if keywords["settings"].batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, rows, **keywords)

    monkeypatch.setattr(floe.rank_search.search, "train", exhausted)
    large, small = (
        dataclasses.replace(FAST, batch_size=n, grad_accum=FAST.batch_size * FAST.grad_accum // n)
        for n in (2, 1)
    )
    for _ in range(2):  # again with the same settings: they failed, and stay so
        with pytest.raises(RuntimeError, match="none of 2: failed: out of memory"):
            run(tmp_path, trials=2, settings=large)
    result = run(tmp_path, trials=2, settings=small)
    assert [(t.number, t.state) for t in result.trials] == [(0, "complete"), (1, "complete")]
    assert run(tmp_path, trials=2, settings=large).trials == result.trials


def test_failed_trials_are_counted_and_the_search_goes_on(tmp_path, monkeypatch):
    real = floe.rank_search.search.train

    def sometimes(model, rows, **keywords):
        rank = model.peft_config["default"].r
        if rank == 1:
            raise FloatingPointError("the loss must be finite, got nan")
        if rank == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return real(model, rows, **keywords)

    monkeypatch.setattr(floe.rank_search.search, "train", sometimes)
    result = run(tmp_path, trials=6)
    states = {(t.rank, t.state) for t in result.trials}
    assert states == {(1, "failed"), (2, "failed"), (3, "complete")}
    assert result.distinct == 6  # a failed point is not tried again
    reasons = {t.rank: t.reason for t in result.trials}
    assert reasons[1] == "failed: the loss must be finite, got nan"
    assert reasons[2] == "failed: out of memory (CUDA out of memory.)"
    assert result.rank == 3
    with pytest.raises(
        RuntimeError, match="at least one trial must succeed, none of 2: failed: the loss"
    ):
        run(tmp_path / "b", trials=2, space=SearchSpace(rank=(1, 1, 1), num_experts=(1, 2, 1)))


def test_other_errors_stop_the_search_and_free_the_base(tmp_path, monkeypatch):
    base = tiny_model(layers=1)

    def broken(*args, **keywords):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(floe.rank_search.search, "train", broken)
        with pytest.raises(OSError, match="disk full"):
            run(tmp_path, base=base)
    result = run(tmp_path, base=base)  # the trial it left behind is given up and trained again
    assert [t.number for t in result.trials] == [0, 1, 2]


def test_a_trial_that_changes_the_base_is_an_error(tmp_path, monkeypatch):
    real = floe.rank_search.search.train

    def careless(model, rows, **keywords):
        with torch.no_grad():
            model.get_base_model().lm_head.weight[0] += 1
        return real(model, rows, **keywords)

    monkeypatch.setattr(floe.rank_search.search, "train", careless)
    with pytest.raises(RuntimeError, match="must leave the base model as it is"):
        run(tmp_path)


def test_pruning_reports_at_quarters(tmp_path, monkeypatch):
    seen = []
    report = optuna.trial.Trial.report

    def noted(trial, loss, step):
        seen.append((trial.number, step))
        report(trial, loss, step)

    monkeypatch.setattr(optuna.trial.Trial, "report", noted)
    monkeypatch.setattr(
        optuna.pruners.MedianPruner, "prune", lambda self, study, trial: len(study.trials) == 1
    )
    result = run(tmp_path, prune=True, settings=dataclasses.replace(FAST, max_steps=4))
    assert seen == [(0, 1), (0, 2), (0, 3), (1, 1), (2, 1), (2, 2), (2, 3)]
    assert [t.state for t in result.trials] == ["complete", "pruned", "complete"]
    assert result.trials[1].reason == "stopped early: above the median"
    assert result.trials[1].value is None


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        run(tmp_path, trials=0)
    with pytest.raises(TypeError, match="trials must be an int, got float"):
        run(tmp_path, trials=2.0)
    with pytest.raises(
        ValueError, match="sampler must be one of tpe, paper, random, grid, got 'gp'"
    ):
        run(tmp_path, sampler="gp")
    with pytest.raises(ValueError, match="startup_trials must be at least 1, got 0"):
        run(tmp_path, startup_trials=0)
    with pytest.raises(ValueError, match="adapter must not set r, the search does"):
        run(tmp_path, adapter={"r": 4})
    with pytest.raises(ValueError, match="validation_rows must not be empty"):
        search(tiny_model(), tiny_rows(4), [], directory=tmp_path)
    adapted = get_model(tiny_model(), FloeConfig())
    with pytest.raises(ValueError, match="must not be adapted already"):
        run(tmp_path, base=adapted.get_base_model())
    assert list(tmp_path.iterdir()) == []


def test_passwords_are_never_shown(tmp_path):
    url = f"nosuchdb://me:geheim@{'host'}/db"
    with pytest.raises(ValueError, match="storage must be a database that opens") as caught:
        run(tmp_path, storage=url)
    assert "geheim" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None
    for url, shown in [
        (
            "postgresql://me:geheim@host/db?sslpassword=geheim&mode=x",
            "postgresql://me:***@host/db?sslpassword=***&mode=x",
        ),
        ("postgresql://me:ge@heim@host/db", "postgresql://me:***@host/db"),
        ("mysql://me:ge heim{}%@host/db", "mysql://me:***@host/db"),
        (
            "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dgeheim",
            "mssql+pyodbc:///?odbc_connect=hidden",
        ),
    ]:
        assert mask(url) == shown
    assert mask("geheim") == "an unreadable URL"
    path = tmp_path / "own.db"
    result = run(tmp_path / "s", trials=1, storage=f"sqlite:///{path}")
    assert path.is_file()
    assert result.sampler["storage"] == f"sqlite:///{path}"


def test_one_process_at_a_time(tmp_path):
    with (
        studies.one_process(tmp_path / "search.lock"),
        pytest.raises(RuntimeError, match="one at a time"),
    ):
        run(tmp_path)


def test_orphans_of_a_shared_storage():
    me = Owner.current()
    for owner, told in [
        (dataclasses.replace(me, pid=2**22 + 1), True),
        (dataclasses.replace(me, started="0"), True),
        (dataclasses.replace(me, boot="another"), True),
        (me, True),
        (dataclasses.replace(me, pid=1, started=studies._started(1)), False),
        (dataclasses.replace(me, host="elsewhere"), False),
    ]:
        study = optuna.create_study()
        studies.begin_trial(study, SMALL.distributions(), (1, 1), owner, 0, 0)
        if told:
            assert studies.fail_orphans(study, me, alone=False) == [0]
        else:
            with pytest.raises(RuntimeError, match="trial 0 of this study is running in process"):
                studies.fail_orphans(study, me, alone=False)
            assert studies.fail_orphans(study, me, alone=True) == [0]
        assert study.trials[0].state == TrialState.FAIL


def ask_by_hand(study):
    return study.ask({"rank": IntDistribution(1, 9), "num_experts": IntDistribution(1, 2)})


def touch(study, step):
    """What other programs do to a study; the last three to the search's own running trial."""
    if step == "told":
        study.tell(ask_by_hand(study), -1.0)
    elif step == "left":
        ask_by_hand(study)
    elif step == "enqueued":
        study.enqueue_trial({"rank": 2, "num_experts": 1})
    elif step == "failed":
        study.tell(ask_by_hand(study), state=TrialState.FAIL)
        trial = ask_by_hand(study)
        trial.report(0.5, 1)
        study.tell(trial, state=TrialState.PRUNED)
    elif step == "bare":
        study.tell(study.ask(), -2.0)
    elif step == "attributes":
        trial = ask_by_hand(study)
        for name in ("index", "owner", "redraws", "seconds", "loss"):
            trial.set_user_attr(name, 0)
        study.tell(trial, -3.0)
    elif step == "copied":
        (trial, *_) = [t for t in study.get_trials() if "seconds" in t.user_attrs]
        study.add_trial(trial)
        trial.value = -4.0
        study.add_trial(trial)
    else:
        own = [t for t in study.get_trials(states=(TrialState.RUNNING,)) if "owner" in t.user_attrs]
        study.tell(own[0].number, **step)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"), trials=5, startup_trials=2)


def without_seconds(trials):
    return [dataclasses.replace(trial, seconds=0.0) for trial in trials]


def test_trials_of_other_programs_are_passed_over(tmp_path, monkeypatch, undisturbed):
    real = floe.rank_search.search.train
    others = ["told", "left", "enqueued", "failed", "bare", "attributes", "copied"]
    own = [{"values": -1.0}, {"state": TrialState.FAIL}, {"state": TrialState.PRUNED}]
    steps = [step for pair in zip(others, own, strict=False) for step in pair] + others[len(own) :]

    def disturbed(*arguments, **keywords):
        result = real(*arguments, **keywords)
        study = optuna.load_study(study_name="floe", storage=f"sqlite:///{tmp_path}/study.db")
        for _ in range(2):
            if steps:
                touch(study, steps.pop(0))
        return result

    monkeypatch.setattr(floe.rank_search.search, "train", disturbed)
    result = run(tmp_path, trials=5, startup_trials=2)
    assert steps == []
    assert without_seconds(result.trials) == without_seconds(undisturbed.trials)
    assert result.best_trial == undisturbed.best_trial
    study = optuna.load_study(study_name="floe", storage=f"sqlite:///{tmp_path}/study.db")
    assert [t.value for t in study.trials].count(-1.0) == 2  # one told, one of ours told
    assert len([t for t in study.trials if t.state == TrialState.RUNNING]) == 1  # the one left
    assert without_seconds(run(tmp_path, trials=5, startup_trials=2).trials) == without_seconds(
        undisturbed.trials
    )


def test_an_own_trial_told_after_its_process_died_is_trained_again(tmp_path):
    study = studies.open_study(tmp_path / "study.db", {"space": 1}, prune=False)
    for act in ({"values": -1.0}, {"state": TrialState.PRUNED}):
        trial = studies.begin_trial(study, SMALL.distributions(), (2, 1), Owner.current(), 0, 0)
        trial.set_user_attr("loss", 3.5)
        trial.set_user_attr("seconds", 1.0)  # killed before its own tell
        study.tell(trial, **act)
    assert studies.finished(study) == []
    assert studies.tried_points(study) == set()


@pytest.mark.parametrize(
    "directions", [["minimize"], ["maximize"], ["minimize", "minimize"]], ids=len
)
def test_a_study_of_another_program_is_refused_untouched(tmp_path, directions):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    study = optuna.create_study(study_name="floe", storage=url, directions=directions)
    if directions == ["minimize"]:
        study.ask()

    def dump():
        with contextlib.closing(sqlite3.connect(tmp_path / "x.db")) as database:
            return list(database.iterdump())

    before = dump()
    with pytest.raises(ValueError, match=r"the study 'floe' in .*x\.db must be one that a search"):
        run(tmp_path / "a", storage=url)
    assert dump() == before


def test_parameters_of_another_kind_in_the_study_are_named(tmp_path):
    study = studies.open_study(tmp_path / "study.db", {"space": 1}, prune=False)
    study.ask({"rank": optuna.distributions.CategoricalDistribution(("low", "high"))})
    with pytest.raises(ValueError, match="'floe' must hold whole-number rank and num_experts"):
        studies.begin_trial(study, SMALL.distributions(), (2, 1), Owner.current(), 0, 0)


@pytest.mark.parametrize(
    "name",
    [
        "50%25",
        "a?b",
        "a#1",
        "two words",
        'it\'s "x"',
        "{0}",
        "\u00e9\u4e2d",
        "file:x?mode=ro",
        ":memory:",
        "a\\b",
        "%",
        "a\udcff",
    ],
)
def test_the_study_lies_in_a_directory_of_any_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for _ in range(2):
        study = studies.open_study(folder / "study.db", {"space": 1}, prune=False)
    assert study.user_attrs == {"identity": {"space": 1}}
    assert sorted(p.name for p in folder.iterdir()) == ["study.db", "study.db.lock"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_search_in_a_directory_of_an_odd_name(tmp_path, monkeypatch):
    (tmp_path / "a? 50%25 {x}").mkdir()
    monkeypatch.chdir(tmp_path / "a? 50%25 {x}")
    result = run("b#", trials=1)
    assert sorted(p.name for p in Path("b#").iterdir()) == [
        "best",
        "search.lock",
        "study.db",
        "study.db.lock",
        "trials",
    ]
    assert result.adapter_path == Path("b#/best")
    assert [p.name for p in tmp_path.iterdir()] == ["a? 50%25 {x}"]


@contextlib.contextmanager
def locked(file, seconds):
    """Another program's lock on a SQLite file, held for that long."""
    database = sqlite3.connect(file, check_same_thread=False)
    database.execute("begin exclusive")
    timer = threading.Timer(seconds, database.rollback)
    timer.start()
    try:
        yield
    finally:
        timer.join()
        database.close()


def test_a_lock_is_waited_for(tmp_path, monkeypatch):
    run(tmp_path, trials=1)
    notes = []
    with locked(tmp_path / "study.db", 1.5):
        result = run(tmp_path, trials=2, on_progress=lambda *v: notes.append(v[2]))
    assert len(result.trials) == 2
    assert notes[0].startswith("waiting for sqlite:///")
    assert notes[0].endswith("study.db: another program has locked it")
    monkeypatch.setattr(storage, "PATIENCE", 0.1)
    with (
        locked(tmp_path / "study.db", 3.0),
        pytest.raises(SearchError, match="has been locked by another program for 0 s"),
    ):
        run(tmp_path, trials=2)


def test_a_database_that_does_not_open_is_named(tmp_path):
    (tmp_path / "text.db").write_text("no database, but long enough to be taken for one" * 30)
    (tmp_path / "folder.db").mkdir()
    older = f"sqlite:///{tmp_path / 'older.db'}"
    optuna.create_study(storage=older)
    with contextlib.closing(sqlite3.connect(tmp_path / "older.db")) as database, database:
        database.execute("update alembic_version set version_num = 'v2.4.0.a'")
    for url, words in [
        (f"sqlite:///{tmp_path / 'text.db'}", "file is not a database"),
        (f"sqlite:///{tmp_path / 'folder.db'}", "unable to open database file"),
        (f"sqlite:///{tmp_path / 'text.db'}/x.db", "text.db"),
        (older, "optuna storage upgrade"),
        ("postgresql://me:ge{}heim@host:port/db", "unreadable URL"),
        ("", "unreadable URL"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            run(tmp_path / "s", storage=url)
        assert str(caught.value).startswith("storage must be a database that opens, got ")
        assert caught.value.__context__ is None
        assert "heim" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_database_that_fails_later_keeps_its_trials(tmp_path):
    url, notes = f"sqlite:///{tmp_path / 'x.db'}", []

    def drop(*note):
        notes.append(note)
        with contextlib.closing(sqlite3.connect(tmp_path / "x.db")) as database, database:
            database.execute("alter table trial_params rename to gone")

    with pytest.raises(SearchError, match=r"x\.db failed \(OperationalError: no such table"):
        run(tmp_path / "a", storage=url, on_progress=drop)
    with contextlib.closing(sqlite3.connect(tmp_path / "x.db")) as database, database:
        database.execute("alter table gone rename to trial_params")
    assert len(run(tmp_path / "a", storage=url).trials) == 3
    assert len(notes) == 1


def test_a_damaged_database_is_named_or_read_right(tmp_path):
    study = studies.open_study(tmp_path / "study.db", {"space": 1}, prune=False)
    for index, point in enumerate(SMALL.points()[:4]):
        trial = studies.begin_trial(study, SMALL.distributions(), point, Owner.current(), index, 0)
        studies.end_trial(study, trial, Outcome(1.0 / (index + 1), seconds=2.5))
    right = [(t.number, t.rank, t.num_experts, t.value) for t in studies.finished(study)]
    raw = (tmp_path / "study.db").read_bytes()
    used = [place for place, byte in enumerate(raw) if byte]
    draw, refused = random.Random(0), {}
    for number in range(40):
        bad = bytearray(raw)
        for _ in range(draw.choice((1, 3, 30))):
            bad[draw.choice(used)] = draw.randrange(256)
        file = tmp_path / f"{number}.db"
        file.write_bytes(bad)
        try:
            study = studies.open_study(file, {"space": 1}, prune=False)
            found = [(t.number, t.rank, t.num_experts, t.value) for t in studies.finished(study)]
        except (ValueError, SearchError) as error:
            refused[str(file)] = str(error)
        else:
            assert set(found) <= set(right)
    assert len(refused) > 20
    assert all(file in text and "\n" not in text for file, text in refused.items())


def test_when_every_trial_diverges_one_error_says_so(tmp_path):
    wild = dataclasses.replace(FAST, learning_rate=1e30)
    for _ in range(2):
        with pytest.raises(
            SearchError, match="at least one trial must succeed, none of 2"
        ) as found:
            run(tmp_path, trials=2, settings=wild)
        assert "lower learning_rate" in str(found.value)
        assert str(found.value).endswith(f"; they are kept in sqlite:///{tmp_path}/study.db")
    study = optuna.load_study(study_name="floe", storage=f"sqlite:///{tmp_path}/study.db")
    assert [t.user_attrs["index"] for t in study.trials] == [0, 1]
    assert all(t.user_attrs["reason"].startswith("failed: ") for t in study.trials)


def test_a_validation_loss_that_is_not_finite_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(floe.rank_search.search, "mean_loss", lambda losses: math.nan)
    with pytest.raises(SearchError, match="failed: the validation loss must be finite, got nan"):
        run(tmp_path, trials=1)


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_best_adapter_that_is_gone_is_trained_again(tmp_path, monkeypatch):
    url, notes = f"sqlite:///{tmp_path / 'x.db'}", []

    def again(directory):
        notes.clear()
        return run(directory, trials=2, storage=url, on_progress=lambda *v: notes.append(v[2]))

    first = again(tmp_path / "a")
    kept = bytes_of(first.adapter_path)
    with monkeypatch.context() as patch:  # one of its two places is enough
        patch.setattr(floe.rank_search.search, "train", None)
        shutil.rmtree(tmp_path / "a/trials")
        assert bytes_of(again(tmp_path / "a").adapter_path) == kept
    shutil.rmtree(tmp_path / "a/best")
    for directory in ("a", "b"):  # b: another directory, or machine, of the same study
        result = again(tmp_path / directory)
        assert bytes_of(result.adapter_path) == kept
        assert result.trials == first.trials
        assert "is trained again, its adapter is gone from" in notes[0]
    victim = tmp_path / "b/best/adapter_model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-4] + b"\0\0\0\0")
    shutil.rmtree(tmp_path / "b/trials")
    assert bytes_of(again(tmp_path / "b").adapter_path) == kept


def test_another_search_in_the_directory_does_not_lend_its_adapter(tmp_path):
    one = SearchSpace(rank=(2, 2, 1), num_experts=(2, 2, 1))
    run(tmp_path / "a", space=one, trials=1, storage=f"sqlite:///{tmp_path / 'x.db'}")
    url = f"sqlite:///{tmp_path / 'y.db'}"
    other = dataclasses.replace(FAST, learning_rate=3e-2)
    kept = run(tmp_path / "b", space=one, trials=1, storage=url, settings=other)
    result = run(tmp_path / "a", space=one, trials=1, storage=url, settings=other)
    assert bytes_of(result.adapter_path) == bytes_of(kept.adapter_path)


def test_files_of_others_among_the_trials_stay(tmp_path):
    run(tmp_path, trials=1)
    (trial,) = (tmp_path / "trials").iterdir()
    for file in (trial / "notes.txt", trial / "adapter/mine.bin", tmp_path / "trials/x"):
        file.write_text("mine")
    run(tmp_path, trials=2)
    floe.rank_search.search.remove_trials(tmp_path)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("trials/**/*") if p.is_file())
    assert left == [
        f"trials/{trial.name}/adapter/mine.bin",
        f"trials/{trial.name}/notes.txt",
        "trials/x",
    ]


def test_fingerprint_and_removal():
    base = tiny_model(layers=1)
    before = model_fingerprint(base)
    for _ in range(2):
        base = remove_adapters(get_model(base, FloeConfig(r=2)))
    assert model_fingerprint(base) == before
    with torch.no_grad():
        base.lm_head.weight.view(-1)[0] += 1
    assert model_fingerprint(base) != before


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    killing.run("searching", folder)
    return torch.load(folder / "out.pt")


def kill_and_resume(folder, unbroken, seed, kills):
    rng, killed = random.Random(seed), 0
    for _ in range(kills):
        process = killing.start("searching", folder)
        grown = rng.randrange(0, 3)
        delay = 0.3 * rng.random() + 0.3 * (grown == 0)
        killed += killing.kill_after(process, folder / "progress", grown, delay)
    assert killed >= 2  # the last may find nothing left to do
    killing.run("searching", folder)
    values, trials, best = torch.load(folder / "out.pt")
    assert trials == unbroken[1]
    assert best == unbroken[2]
    assert all(torch.equal(a, b) for a, b in zip(values, unbroken[0], strict=True))
    study = optuna.load_study(
        study_name="floe", storage=f"sqlite:///{folder / 'search' / 'study.db'}"
    )
    assert TrialState.RUNNING not in {t.state for t in study.trials}


def test_killed_at_random_instants_it_ends_with_the_same_trials(tmp_path, unbroken):
    kill_and_resume(tmp_path, unbroken, seed=0, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_many_times_it_ends_with_the_same_trials(tmp_path, unbroken, seed):
    kill_and_resume(tmp_path, unbroken, seed, kills=4)


def test_a_kill_while_the_database_is_made_leaves_none_or_a_whole_one(tmp_path):
    """Optuna makes its tables one by one; half of them must never be taken for a study."""
    killed = 0
    for statement in (1, 2, 3, 7, 12, 100):  # 2: the index of the studies' names
        folder = tmp_path / str(statement)
        folder.mkdir()
        process = killing.start("opening_a_study", folder, statement)
        process.join(60)
        killed += process.exitcode == -9
        for _ in range(2):
            study = studies.open_study(f"sqlite:///{folder}/study.db", {"space": 1}, prune=False)
        with contextlib.closing(sqlite3.connect(folder / "study.db")) as database:
            assert database.execute("select study_name from studies").fetchall() == [("floe",)]
            indices = database.execute("select name from sqlite_master where type = 'index'")
            assert ("ix_studies_study_name",) in indices.fetchall()
        assert study.trials == []
    assert killed == 5
