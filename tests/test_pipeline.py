"""A whole run on a tiny model: what it writes, what it skips, and that a kill changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tiny import tiny_model
from tiny_run import write_config, write_inputs
from transformers import GraniteConfig, GraniteForCausalLM

from floe.adapters import adapted_layers
from floe.adapters.files import load_adapter
from floe.config import parse_config
from floe.importance.scores import Scores
from floe.importance.statistics import LayerStatistics
from floe.pipeline import run
from floe.progress import Progress
from floe.runs import sha256
from floe.selection.selection import Selection

KEPT = ("search/adapter", "score/scores.npz", "select/selection.json", "adapter")


class Log(Progress):
    """Remembers what each stage said."""

    def __init__(self):
        self.said = {}

    def stage(self, name, what):
        self.said[name] = what


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def config(folder):
    return write_inputs(folder)


@pytest.fixture(scope="module")
def finished(config):
    """The unbroken run every other one is compared with."""
    with torch.random.fork_rng():
        return run(parse_config(config)).folder


def digests(run_folder):
    """sha256 of the artifacts that must not depend on when or how often a run was interrupted."""
    files = []
    for name in KEPT:
        path = run_folder / name
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(f.relative_to(run_folder)): sha256(f) for f in files if f.name != "README.md"}


def renamed(config, name, **changes):
    return {**config, "name": name, **changes}


def test_a_run_writes_every_artifact_and_only_the_chosen_layers_carry_adapters(finished):
    selection = Selection.load(finished / "select")
    assert len(selection.layers) == 2
    assert selection.policy == "adapter_fisher"
    assert selection.tuned
    assert len(selection.paper.ranking) == 4
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(finished.parent.parent / "model")
    assert set(adapted_layers(load_adapter(base, finished / "adapter"))) == set(selection.layers)
    results = json.loads((finished / "eval/results.json").read_text())["arms"]
    assert set(results) == {"base", "main", "all", "paper", "random"}
    for arm in results.values():
        assert arm["loss"]["low"] <= arm["loss"]["value"] <= arm["loss"]["high"]
        assert arm["accuracy"]["rows"] == 12
        assert set(arm["by_task"]) == {"first", "second"}
    assert results["main"]["loss"]["value"] < results["base"]["loss"]["value"]
    assert (finished / "report.html").stat().st_size > 10_000
    assert not list(finished.rglob("*.work"))
    assert not list(finished.rglob("checkpoint-*"))


def test_scores_hold_every_unit(finished):
    scores = Scores.load(finished / "score/scores.npz")
    assert scores.head_fisher.shape == (4, 4)
    assert scores.neuron_fisher.shape == (4, 64)
    for name in ("head_fisher", "neuron_fisher", "head_taylor", "neuron_taylor", "adapter_fisher"):
        assert (getattr(scores, name) > 0).any(), name


def scored_by_workers(path):
    """``floe score`` by two workers of torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launch, "-m", "floe", "score", str(path), "--json"], capture_output=True, text=True,
        timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_workers_of_torchrun_share_the_score_stage(config, finished, folder):
    workers = renamed(config, "workers")
    path = write_config(folder / "workers.yaml", workers)
    unready = scored_by_workers(path)
    assert unready.returncode != 0
    assert "the search stage must be finished before several workers score" in unready.stderr
    target = finished.parent / "workers"
    shutil.copytree(finished / "search", target / "search", dirs_exist_ok=True)
    shutil.rmtree(target / "search.work")
    done = scored_by_workers(path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["folder"] == str(target)  # one worker speaks
    found, alone = (Scores.load(f / "score/scores.npz") for f in (target, finished))
    assert found.meta == alone.meta
    assert np.allclose(found.neuron_fisher, alone.neuron_fisher, rtol=1e-4)
    assert sorted(f.name for f in (target / "score").iterdir()) == ["DONE.json", "scores.npz"]
    log = Log()
    run(parse_config(workers), until="score", progress=log)
    assert log.said == {"search": "unchanged", "score": "unchanged"}


def test_schedules_statistics_and_other_ways_to_choose(config, finished, folder):
    """One run with what the other has not: trained once, looked at all over."""
    name = "others"
    target = finished.parent / name
    shutil.copytree(finished / "search", target / "search")
    lisa = {"name": "lisa", "policy": "lisa", "interval": 2}
    spectrum = {"name": "spectrum", "policy": "spectrum"}
    bottom = {"name": "bottom", "policy": "adapter_fisher", "pick": "bottom"}
    block = {"name": "block", "policy": "masks", "preset": "block"}
    modules = {"name": "modules", "policy": "adapter_fisher", "choose": "modules"}
    sizes = {"name": "sizes", "policy": "adapter_fisher", "choose": "sizes"}
    baselines = [lisa, spectrum, bottom, block, modules, sizes]
    changed = {
        **renamed(config, name, baselines=baselines),
        "score": {**config["score"], "keep_samples": True, "statistic_rows": 4},
        "select": {"layers": {"memory": 300_000}, "score": "path", "tune": False, "r0": 4.0},
        "profile": {"steps": 0},
    }
    with torch.random.fork_rng():
        run(parse_config(changed), until="train")
    arms = {p.parent.name: json.loads(p.read_text()) for p in target.glob("train/*/metrics.json")}
    selection = Selection.load(target / "select")
    count = len(selection.layers)
    assert 0 < count < 4
    assert arms["lisa"]["layers"] == [0, 1, 2, 3]
    assert set(arms["bottom"]["layers"]).isdisjoint(selection.layers) or count > 2
    assert {len(arms[name]["layers"]) for name in ("spectrum", "bottom", "block")} == {count}
    own = arms["main"]["trainable_parameters"]
    for name, key in (("modules", "modules"), ("sizes", "sizes")):
        assert 0.5 * own < arms[name]["trainable_parameters"] <= own
        placed = arms[name][key]
        assert list(map(int, placed)) == arms[name]["layers"]
        adapter = json.loads((target / f"train/{name}/adapter/adapter_config.json").read_text())
        if key == "modules":
            assert adapter["layer_modules"] == {k: sorted(v) for k, v in placed.items()}
        else:
            assert set(map(tuple, placed.values())) <= {(r, m) for r in (2, 4) for m in (2, 3)}
    assert selection.budget_path == (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert sorted(LayerStatistics.load(target / "score/statistics.npz").values) == ["signal_share"]


def test_a_sweep_chooses_the_number_of_layers_on_validation_rows(config, finished):
    target = finished.parent / "swept"
    shutil.copytree(finished / "search", target / "search")
    shutil.copytree(finished / "score", target / "score")
    select = {**config["select"], "layers": {"sweep": [3, 1]}, "tune": False}
    with torch.random.fork_rng():
        run(parse_config(renamed(config, "swept", select=select, baselines=[])), until="select")
    sweep = json.loads((target / "select/sweep.json").read_text())
    rows = {n: json.loads((target / f"sweep/{n}/losses.json").read_text())["rows"] for n in (1, 3)}
    assert {len(values) for values in rows.values()} == {8}
    assert sweep["counts"] == [1, 3]
    assert np.allclose(sweep["means"], [np.mean(rows[1]), np.mean(rows[3])])
    assert len(Selection.load(target / "select").layers) == sweep["count"]
    log = Log()
    with torch.random.fork_rng():
        again = parse_config(renamed(config, "swept", select=select, baselines=[]))
        run(again, until="select", progress=log)
    assert set(log.said.values()) == {"unchanged"}


def test_every_baseline_has_as_many_layers_and_the_same_steps(finished):
    arms = {p.parent.name: json.loads(p.read_text()) for p in finished.glob("train/*/metrics.json")}
    assert {arm: len(m["layers"]) for arm, m in arms.items()} == {
        "main": 2, "all": 4, "paper": 2, "random": 2,
    }  # fmt: skip
    assert {m["steps"] for m in arms.values()} == {6}
    assert arms["paper"]["layers"] == sorted(Selection.load(finished / "select").paper.layers)
    assert arms["all"]["trainable_parameters"] == 2 * arms["main"]["trainable_parameters"]


def test_a_second_run_skips_every_stage_and_changes_nothing(config, finished):
    before = digests(finished)
    log = Log()
    run(parse_config(config), progress=log)
    said = {name: what for name, what in log.said.items() if name != "report"}
    assert set(said.values()) == {"unchanged"}, said
    assert digests(finished) == before


def test_a_changed_setting_reruns_what_depends_on_it_alone(config, finished):
    log = Log()
    fewer = [b for b in config["baselines"] if b["name"] != "random"]
    select = {**config["select"], "layers": 3}
    changed = {**config, "select": select, "baselines": fewer}
    run(parse_config(changed), progress=log)
    stale = {name for name, what in log.said.items() if what == "finished"}
    assert not (finished / "train/random").exists()  # no longer configured
    assert {"search", "score", "train/all", "profile"}.isdisjoint(stale)
    assert {"select", "train/main", "eval"} <= stale
    run(parse_config(config))  # as the other tests expect it


def test_one_seed_gives_the_same_scores_selection_and_adapter(config, finished):
    again = run(parse_config(renamed(config, "again", baselines=[]))).folder
    same, other = digests(finished), digests(again)
    assert same.keys() == other.keys()
    assert [name for name in same if same[name] != other[name]] == []


def test_another_seed_gives_another_adapter(config, finished):
    train = {**config["train"], "seed": 7}
    settings = renamed(config, "seed7", baselines=[], train=train, search={"trials": 0})
    other = run(parse_config(settings), until="train").folder
    assert digests(other) != digests(finished)


def test_the_adapter_exports_to_a_plain_lora_with_its_error(config, finished, tmp_path):
    from floe.pipeline import export_run

    report = export_run(parse_config(config), tmp_path / "lora", rows=8)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert 0 <= report.worst < 1
    assert len(report.module_error) == 2 * 3


def start(path):
    """The run as a process of its own, which heeds SIGINT even where this one ignores it."""
    return subprocess.Popen(
        [sys.executable, "-m", "floe", "run", str(path), "--quiet"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def kill_within(process, marker, timeout=120):
    """SIGKILL the run as soon as ``marker`` exists; says whether it was still running."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        if any(marker()):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.005)
    return False


def check_killed(config, finished, tmp_path, name, patterns):
    settings = renamed(config, name, baselines=[])
    path = write_config(tmp_path / "config.yaml", settings)
    target = finished.parent / name
    for pattern in patterns:
        process = start(path)
        killed = kill_within(process, lambda p=pattern: target.glob(p))
        assert killed, f"over before {pattern}: {process.communicate()[1].decode()[-800:]}"
    process = start(path)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error.decode()
    assert digests(target) == digests(finished)


def test_a_run_killed_while_training_continues_to_the_same_bytes(config, finished, tmp_path):
    patterns = ["train/main.work/checkpoints/checkpoint-2/floe_done.json"]
    check_killed(config, finished, tmp_path, "killed", patterns)


def test_an_interrupted_run_says_how_to_continue(config, finished, tmp_path):
    path = write_config(tmp_path / "config.yaml", renamed(config, "interrupted", baselines=[]))
    process = start(path)
    while process.poll() is None:
        if (finished.parent / "interrupted/search.work/study.db").exists():
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error.decode()
    assert "the same command continues" in error.decode()
    assert not (finished.parent / "interrupted/search").exists()


def test_losses_by_row_are_those_of_the_results(finished):
    """The audit compares arms of one policy with several numbers of layers by them."""
    from floe.pipeline.auditing import arm_losses

    results = json.loads((finished / "eval/results.json").read_text())["arms"]
    found = arm_losses(finished)
    assert sorted(found) == [2, 4]
    assert len(found[2]) == 12
    assert found[2].mean() == pytest.approx(results["main"]["loss"]["value"])
    assert found[4].mean() == pytest.approx(results["all"]["loss"]["value"])


@pytest.mark.slow
def test_a_run_killed_in_every_stage_continues_to_the_same_bytes(config, finished, tmp_path):
    patterns = [
        "search.work/study.db", "search.work/trials/0001*", "score.work", "select.work",
        "train/main.work/checkpoints/checkpoint-4", "profile.work", "eval.work",
    ]  # fmt: skip
    check_killed(config, finished, tmp_path, "killed-often", patterns)


def test_a_second_process_on_one_run_is_refused(config, finished):
    from floe.runs import RunFolder

    path = write_config(finished.parent.parent / "second.yaml", config)
    with RunFolder(finished).locked():
        process = start(path)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "another process is working in this run folder" in error.decode()


def test_masks_that_cannot_be_tuned_end_no_run_unless_they_must(tmp_path):
    """A residual multiplier: the run goes on with binary masks; select.tune: true ends it early."""
    config = write_inputs(tmp_path)
    llama = tiny_model(layers=4)
    sizes = {k: v for k, v in llama.config.to_dict().items() if k in GraniteConfig().to_dict()}
    granite = GraniteForCausalLM(GraniteConfig(**sizes | {"residual_multiplier": 0.22}))
    granite.load_state_dict(llama.state_dict())
    granite.save_pretrained(config["model"]["path"])
    config |= {"search": {"trials": 0}, "baselines": []}
    must = {**config["select"], "tune": True}
    with pytest.raises(ValueError, match=r"select\.tune: true asks for masks that .* leave it out"):
        run(parse_config(config | {"select": must}), until="select")
    assert not (tmp_path / "runs/tiny/search").exists()
    with torch.random.fork_rng(), pytest.warns(RuntimeWarning, match="the masks are not tuned"):
        run(parse_config(config), until="select")
    selection = Selection.load(tmp_path / "runs/tiny/select")
    assert not selection.tuned
    assert "block model.layers.0 must output its input plus" in selection.untuned
