import gc
import json
import shutil
from pathlib import Path

import pytest
from helpers.tiny_run import write_inputs

import floe.rank_search.search
from floe.config_file import parse_config
from floe.pipeline import search
from floe.pipeline.inputs import RunInputs


@pytest.fixture(autouse=True)
def _quiet():
    gc.freeze()  # each Trainer collects all garbage
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """``build(folder, trials=2)``: the search stage of a tiny run, its model loaded once."""
    config = write_inputs(tmp_path_factory.mktemp("inputs"), layers=1)
    config["search"]["num_experts"] = [2, 2, 1]
    config["search"]["rank"] = [1, 3, 1]
    config["warmup"] = {"max_steps": 2, "fraction": 0.25}
    work = RunInputs(parse_config(config))

    def stage(folder, trials=2):
        folder.mkdir(exist_ok=True)
        config["search"]["trials"] = trials
        work.config = parse_config(config)
        search.build(work, folder)
        return results(folder)

    return stage


def results(folder):
    """Everything that decides the later stages, without times."""
    result = json.loads((folder / "result.json").read_text())
    for trial in [result, *result["trials"]]:
        trial["seconds"] = 0
    result.pop("sampler")  # it names the folder
    found = [p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"]
    files = sorted(str(p.relative_to(folder)) for p in found)
    adapter = {p.name: p.read_bytes() for p in found if p.parent == folder / "adapter"}
    return result, files, adapter


@pytest.fixture(scope="module")
def searched(build, tmp_path_factory):
    """A work folder whose trials are all trained, and nothing of which is published."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 0, ("copy_folder",), search)
        with pytest.raises(KeyboardInterrupt):
            build(folder)
    return folder


@pytest.fixture(scope="module")
def finished(build, searched, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent") / "finished"
    shutil.copytree(searched, folder)
    build(folder)
    return folder


def kill_at(patch, number, names, owner):
    """KeyboardInterrupt, which nothing catches, in place of one call."""
    left = [number]

    def counted(real):
        def call(*arguments, **keywords):
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt
            return real(*arguments, **keywords)

        return call

    for name in names:
        patch.setattr(owner, name, counted(getattr(owner, name)))


def never_trained(patch):
    patch.setattr(floe.rank_search.search, "train", None)
    patch.setattr(search, "train", None)


def test_only_the_results_and_the_study_are_left(finished):
    assert results(finished)[1] == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "result.json",
        "study.db",
    ]


def test_a_kill_at_any_deletion_or_renaming_loses_no_trial(
    build, finished, searched, tmp_path, monkeypatch
):
    """Between the last trial and the end of the stage; nothing is trained again."""
    killed = 0
    for number in range(0, 100, 2):
        folder = tmp_path / str(number)
        shutil.copytree(searched, folder)
        with monkeypatch.context() as patch:
            never_trained(patch)
            kill_at(patch, number, ("unlink", "rmdir", "rename", "replace", "mkdir"), Path)
            try:
                build(folder)
            except KeyboardInterrupt:
                killed += 1
            else:
                break
        with monkeypatch.context() as patch:
            never_trained(patch)
            assert build(folder) == results(finished)
        shutil.rmtree(folder)
    assert killed > 8


def test_more_trials_go_on_from_the_results_of_fewer(build, finished, tmp_path, monkeypatch):
    trained, real = [], floe.rank_search.search.train

    def counted(*arguments, **keywords):
        trained.append(keywords["output_dir"])
        return real(*arguments, **keywords)

    shutil.copytree(finished, tmp_path / "more", ignore=lambda *_: ["README.md"])
    monkeypatch.setattr(floe.rank_search.search, "train", counted)
    more = build(tmp_path / "more", trials=3)
    assert len(trained) == 1
    assert more[0]["trials"][:2] == results(finished)[0]["trials"]
    assert more == build(tmp_path / "fresh", trials=3)
    with monkeypatch.context() as patch:
        never_trained(patch)
        assert build(tmp_path / "more", trials=1) == more  # fewer: nothing is lost


def test_a_kill_after_the_only_warm_up_trains_nothing_again(build, tmp_path, monkeypatch):
    whole = build(tmp_path / "whole", trials=0)
    with monkeypatch.context() as patch:
        kill_at(patch, 0, ("tidy",), search)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "killed", trials=0)
    never_trained(monkeypatch)
    assert build(tmp_path / "killed", trials=0) == whole
