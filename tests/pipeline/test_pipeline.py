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
import yaml
from helpers.tiny import tiny_model
from helpers.tiny_run import write_config, write_inputs
from transformers import GraniteConfig, GraniteForCausalLM

from floe.adapters import adapted_layers
from floe.adapters.files import load_adapter
from floe.config_file import parse_config
from floe.errors import FileError
from floe.importance.scores import LayerStatistics, Scores
from floe.pipeline import identity
from floe.pipeline.run import export_run, run
from floe.progress import Progress
from floe.report.run import read_run
from floe.selection.select import Selection
from floe.storage import sha256
from floe.training.schedule import TrainSettings

KEPT = ("search/adapter", "score/scores.npz", "select/selection.json", "adapter")


class Log(Progress):
    """Remembers what each stage said; may stop the run at a step of a stage."""

    def __init__(self, stop=None):
        self.said, self.stop = {}, stop

    def stage(self, name, what):
        self.said[name] = what

    def step(self, name, done, total, note=""):
        if (name, done) == self.stop:
            raise KeyboardInterrupt


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
    assert not list(finished.rglob("checkpoint*"))


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
        [*launch, "-m", "floe", "score", str(path), "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


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
    exact = {"name": "exact", "policy": "masks", "preset": "exact"}
    modules = {"name": "modules", "policy": "adapter_fisher", "choose": "modules"}
    sizes = {"name": "sizes", "policy": "adapter_fisher", "choose": "sizes"}
    baselines = [lisa, spectrum, bottom, exact, modules, sizes]
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
    assert {len(arms[name]["layers"]) for name in ("spectrum", "bottom", "exact")} == {count}
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
    found = LayerStatistics.load(target / "statistics/signal_share/statistics.npz")
    assert sorted(found.values) == ["signal_share"]


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
        "main": 2,
        "all": 4,
        "paper": 2,
        "random": 2,
    }
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
    with pytest.raises(
        FileError, match=r"select: is finished with select\.layers 2 -> 3; only --redo"
    ):
        run(parse_config(changed))
    assert yaml.safe_load((finished / "config.yaml").read_text())["select"]["layers"] == 2
    run(parse_config(changed), progress=log, redo=True)
    stale = {name for name, what in log.said.items() if what == "finished"}
    assert {"search", "score", "train/all", "profile"}.isdisjoint(stale)
    assert {"select", "train/main", "eval"} <= stale
    assert (finished / "train/random/metrics.json").is_file()  # no longer configured, and kept
    assert set(run(parse_config(changed), until="eval").training()) == {"main", "all", "paper"}
    assert "train/random" not in read_run(finished).stages
    assert set(read_run(finished).training) == {"main", "all", "paper"}
    log = Log()
    run(parse_config(config), progress=log, redo=True)  # as the other tests expect it
    assert log.said["train/random"] == "unchanged"


SAME = {
    "train": {
        "gradient_checkpointing": True,
        "validations": 1,
        "save_steps": 3,
        "batch_size": 2,
        "grad_accum": 2,
        "epochs": 3.0,
    },
    "eval": {"batch_size": 3},
    "score": {"batch_size": 2},
    "search": {"storage": "sqlite:///elsewhere.db"},
    "adapter": {"backend": "eager", "r": 3, "num_experts": 9},
}


def with_settings(config, changes):
    both = config.keys() | changes.keys()
    return {k: {**config.get(k, {}), **changes[k]} if k in changes else config[k] for k in both}


def test_what_changes_no_result_makes_nothing_anew(config, finished):
    """How much memory a stage takes, how often it saves or looks, and what is not in force."""
    log, before = Log(), digests(finished)
    same = with_settings(config, SAME) | {"profile": {"steps": 0}}
    run(parse_config(same), until="eval", progress=log)
    assert set(log.said.values()) == {"unchanged"}
    assert digests(finished) == before


def test_every_setting_is_sorted_and_those_that_count_are_asked_about(config, finished):
    """One by one: a setting that decides a result by its value is refused, by its name."""
    sorted_ones = identity.BY_VALUE.keys() | identity.BY_CONTENT.keys()
    assert identity.flat(parse_config(config)).keys() == sorted_ones | identity.NOTHING.keys()
    assert not sorted_ones & identity.NOTHING.keys()
    counting = identity.BY_VALUE | identity.BY_CONTENT
    stages = {stage for names in counting.values() for stage in names.split()}
    assert stages == set(identity.ORDER)
    deciding = {n.removeprefix("train.") for n in identity.BY_VALUE if n.startswith("train.")}
    length = {"rows_per_step", "steps", "epochs"}
    assert TrainSettings().identity().keys() - length == deciding - {"batch_size", "grad_accum"}
    for name, value in OTHER.items():
        section, _, key = name.partition(".")
        changed = parse_config(with_settings(config, {section: {key: value}}))
        with pytest.raises(FileError, match=rf"(?s)is finished with .*{name} .* -> "):
            run(changed, until="eval")


OTHER = {
    "train.learning_rate": 0.02,
    "train.max_grad_norm": 2.0,
    "train.seed": 1,
    "adapter.alpha": 8.0,
    "adapter.target_modules": ["up_proj"],
    "search.rank": [2, 6, 2],
    "search.sampler": "grid",
    "warmup.max_steps": 4,
    "warmup.fraction": 0.25,
    "score.reduction": "batch",
    "score.rows": 8,
    "score.taylor_rows": 4,
    "select.budget": 0.25,
    "select.tune_tokens": 128,
    "select.policy": "masks",
    "train.max_steps": 7,
    "train.grad_accum": 3,
    "eval.max_new_tokens": 3,
    "data.max_length": 48,
    "eval.limit": 3,
}


def test_more_and_fewer_arms_make_only_these_anew(config, finished):
    log = Log()
    more = [*config["baselines"], {"name": "first", "policy": "first"}]
    run(parse_config({**config, "baselines": more}), until="eval", progress=log)
    made = {name for name, what in log.said.items() if what == "finished"}
    assert made == {"arms", "train/first", "eval"}
    results = json.loads((finished / "eval/results.json").read_text())["arms"]
    assert set(results) == {"base", "main", "all", "paper", "random", "first"}
    before = digests(finished)
    run(parse_config(config), until="eval")
    assert digests(finished) == before
    assert set(json.loads((finished / "eval/losses.json").read_text())["nll"]) == set(results) - {
        "first"
    }


def test_a_policy_that_needs_statistics_leaves_the_scores(config, finished):
    log = Log()
    spectrum = [{"name": "spectrum", "policy": "spectrum"}]
    run(parse_config({**config, "baselines": spectrum}), until="select", progress=log)
    assert log.said["statistics/signal_share"] == "finished"
    assert {log.said[name] for name in ("search", "score", "select")} == {"unchanged"}
    run(parse_config(config), until="select")


@pytest.mark.parametrize("file", ["note.txt", ".DS_Store"])
def test_files_of_others_in_a_run_folder_change_nothing_and_stay(config, finished, file):
    places = ["", "train", "train/main", "train/mine", "search", "eval/arms", "adapter", "other"]
    mine = [finished / place / file for place in places]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    log = Log()
    run(parse_config(config), progress=log)
    assert {what for name, what in log.said.items() if name != "report"} == {"unchanged"}
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)
    for path in mine:
        path.unlink()


def small(config, name, **changes):
    """A run of few steps: one warm-up, two layers' adapters."""
    few = {"search": {"trials": 0}, "profile": {"steps": 0}, "baselines": []}
    return {**renamed(config, name), **few, **changes}


@pytest.mark.parametrize("kind", ["safetensors", "bin", "symlink", "shards"])
def test_weights_that_changed_anywhere_are_seen(config, folder, kind):
    from transformers import AutoModelForCausalLM

    model, target = folder / "model", folder / f"model-{kind}"
    if kind == "symlink":  # as in the hub's cache
        shutil.copytree(model, folder / "blobs")
        target.mkdir()
        for file in (folder / "blobs").iterdir():
            (target / file.name).symlink_to(file)
    else:
        shutil.copytree(model, target)
    weights = target / "model.safetensors"
    if kind == "bin":
        state = AutoModelForCausalLM.from_pretrained(model).state_dict()
        weights.unlink()
        weights = target / "pytorch_model.bin"
        torch.save(state, weights)
    if kind == "shards":
        weights.unlink()
        loaded = AutoModelForCausalLM.from_pretrained(model)
        loaded.save_pretrained(target, max_shard_size="40KB")
        weights = sorted(target.glob("model-*.safetensors"))[1]
    settings = small(config, f"weights-{kind}")
    settings["model"] = {**config["model"], "path": str(target)}
    run(parse_config(settings), until="search")
    if kind == "bin":
        state["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
        torch.save(state, weights)
    else:
        with weights.open("r+b") as file:  # one byte deep inside
            file.seek(weights.stat().st_size * 2 // 3)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    log = Log()
    run(parse_config(settings), until="search", progress=log)
    assert log.said == {"search": "finished"}


def test_another_model_is_asked_about(config, folder, finished):
    shutil.copytree(folder / "model", folder / "model-other")
    with (folder / "model-other/model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    other = {**config, "model": {**config["model"], "path": str(folder / "model-other")}}
    with pytest.raises(FileError, match=r"weights\.model\.safetensors \w+ -> \w+ \(model\.path "):
        run(parse_config(other), until="search")
    shutil.rmtree(folder / "model-other")
    shutil.copytree(folder / "model", folder / "model-other")  # moved: the same files elsewhere
    log = Log()
    run(parse_config(other), until="score", progress=log)
    assert set(log.said.values()) == {"unchanged"}


def test_files_of_the_model_that_no_stage_reads_change_nothing(config, folder, finished):
    for name in ("README.md", ".gitattributes", "notes.txt", "training_args.bin"):
        (folder / "model" / name).write_text("x")
    log = Log()
    run(parse_config(config), until="eval", progress=log)
    assert set(log.said.values()) == {"unchanged"}


def test_a_tokenizer_file_counts_for_the_evaluation(config, folder):
    target = folder / "model-words"
    shutil.copytree(folder / "model", target)
    settings = small(config, "words")
    settings["model"] = {**config["model"], "path": str(target)}
    run(parse_config(settings), until="eval")
    (target / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    with pytest.raises(
        FileError, match=r"eval: is finished with tokenizer\.generation_config\.json"
    ):
        run(parse_config(settings), until="eval")


def test_a_hub_model_is_known_by_its_commit(monkeypatch, tmp_path, config):
    from floe.pipeline.inputs import RunInputs

    cache = tmp_path / "hub/models--some--model"
    for commit in ("a" * 40, "b" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text("{}")
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs/main").write_text(commit)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        named = {**config, "model": {"path": "some/model"}}
        assert RunInputs(parse_config(named)).commit == commit


def test_a_search_goes_on_with_more_trials_and_keeps_the_rest_where_the_best_is_the_same(
    config, finished
):
    target = finished.parent / "trials"
    shutil.copytree(finished / "search", target / "search")
    log = Log()
    more = renamed(config, "trials", search={**config["search"], "trials": 3})
    run(parse_config(more), until="search", progress=log)
    assert log.said == {"search": "finished"}
    found = json.loads((target / "search/result.json").read_text())["trials"]
    first = json.loads((finished / "search/result.json").read_text())["trials"]
    assert found[: len(first)] == first
    assert len(found) == 3


def test_following_the_advice_after_out_of_memory_keeps_what_was_done(config, folder):
    settings = small(config, "advice")
    with pytest.raises(KeyboardInterrupt):
        run(parse_config(settings), progress=Log(stop=("train/main", 5)))
    work = folder / "runs/advice/train/main.work/checkpoints"
    assert (work / "checkpoint-4/floe_done.json").is_file()
    advised = {**config["train"], "batch_size": 2, "grad_accum": 2, "gradient_checkpointing": True}
    log, steps = Log(), []
    log.step = lambda name, done, total, note="": steps.append((name, done))
    run(parse_config({**settings, "train": advised}), until="train", progress=log)
    assert {log.said[name] for name in ("search", "score", "select")} == {"unchanged"}
    assert [done for name, done in steps if name == "train/main"] == [5, 6]


def test_begun_training_of_other_settings_is_not_discarded_unasked(config, folder):
    settings = small(config, "begun")
    with pytest.raises(KeyboardInterrupt):
        run(parse_config(settings), progress=Log(stop=("train/main", 3)))
    other = parse_config({**settings, "train": {**config["train"], "max_steps": 9}})
    work = folder / "runs/begun/train/main.work"
    with pytest.raises(FileError, match=r"holds unfinished work with steps 6 -> 9 \(.*train\.max_"):
        run(other, until="train")
    assert (work / "checkpoints/checkpoint-2").is_dir()
    run(other, until="train", redo=True)
    metrics = json.loads((folder / "runs/begun/train/main/metrics.json").read_text())
    assert (metrics["steps"], metrics["resumed_from"]) == (9, None)


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
    report = export_run(parse_config(config), tmp_path / "lora", rows=8)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert 0 <= report.worst < 1
    assert len(report.module_error) == 2 * 3


def start(path):
    """The run as a process of its own, which heeds SIGINT even where this one ignores it."""
    return subprocess.Popen(
        [sys.executable, "-m", "floe", "run", str(path), "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


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
    _, error = process.communicate(timeout=600)
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
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130, error.decode()
    assert "the same command continues" in error.decode()
    assert not (finished.parent / "interrupted/search").exists()


def test_losses_by_row_are_those_of_the_results(finished):
    """The audit compares arms of one policy with several numbers of layers by them."""
    from floe.pipeline.audit import arm_losses

    results = json.loads((finished / "eval/results.json").read_text())["arms"]
    found = arm_losses(finished)
    assert sorted(found) == [2, 4]
    assert len(found[2]) == 12
    assert found[2].mean() == pytest.approx(results["main"]["loss"]["value"])
    assert found[4].mean() == pytest.approx(results["all"]["loss"]["value"])


@pytest.mark.slow
def test_a_run_killed_in_every_stage_continues_to_the_same_bytes(config, finished, tmp_path):
    patterns = [
        "search.work/study.db",
        "search.work/trials/0001*",
        "score.work",
        "select.work",
        "train/main.work/checkpoints/checkpoint-4",
        "profile.work",
        "eval.work/arms/main.json",
    ]
    check_killed(config, finished, tmp_path, "killed-often", patterns)


def test_a_second_process_on_one_run_is_refused(config, finished):
    from floe.pipeline.run_folder import RunFolder

    path = write_config(finished.parent.parent / "second.yaml", config)
    with RunFolder(finished).locked():
        process = start(path)
        _, error = process.communicate(timeout=600)
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
