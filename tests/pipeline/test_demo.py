"""The demo's own inputs and configuration, a few steps of everything: a real model on real rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_run import write_config

from floe.config_file import load_config
from floe.data.rows import encode
from floe.data.sources import load_rows
from floe.importance.scores import Scores
from floe.selection.select import Selection

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples/demo"
SMALL = {
    "search": {"trials": 1, "rank": [4, 8, 4], "num_experts": [2, 4, 2], "startup_trials": 1},
    "warmup": {"max_steps": 2},
    "score": {"rows": 16, "batch_size": 8, "taylor_rows": 8},
    "profile": {"steps": 1, "points": 2},
    "baselines": [{"name": "paper", "policy": "masks", "preset": "global"}],
}


@pytest.fixture(scope="module")
def inputs():
    """The folder `make demo` uses; made here if it is not there."""
    folder = ROOT / "runs/demo-inputs"
    subprocess.run([sys.executable, DEMO / "prepare.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    config = load_config(DEMO / "demo.yaml").model_dump(mode="json") | SMALL
    config["output_dir"] = str(folder)
    config["train"] |= {"max_steps": 3, "validations": 1}
    config["data"]["validation"]["limit"] = 16
    config["eval"]["limit"] = 12
    config["select"]["tune_tokens"] = 256
    path = write_config(folder / "demo.yaml", config)
    command = [sys.executable, "-m", "floe", "run", str(path), "--quiet", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "demo", json.loads(done.stdout)


def test_no_row_of_the_test_is_trained_on_and_the_stop_token_is_learnt(inputs):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs / "SmolLM2-135M-Instruct")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    parts = {n: load_rows(inputs / f"data/{n}.jsonl") for n in ("train", "validation", "test")}
    prompts = {name: {row["prompt"] for row in rows} for name, rows in parts.items()}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert {row["task"] for row in parts["test"]} == {"medical", "legal", "general"}
    rows = encode(parts["test"], tokenizer, max_length=128).rows
    assert all(row.response[-1] == tokenizer.eos_token_id for row in rows)
    assert all(row.labels[-1] == tokenizer.eos_token_id for row in rows)


def test_the_whole_method_runs_on_thirty_layers(finished):
    folder, summary = finished
    scores, selection = Scores.load(folder / "score/scores.npz"), Selection.load(folder / "select")
    assert scores.head_fisher.shape == (30, 9)
    assert scores.neuron_fisher.shape == (30, 1536)
    assert len(selection.layers) == len(selection.paper.layers) == 8
    assert summary["selection"]["layers"] == list(selection.layers)
    metrics = summary["training"]["main"]
    assert metrics["layers"] == list(selection.layers)
    assert 0 < metrics["peak_memory_bytes"] < 6 * 2**30
    losses = {arm: found["loss"]["value"] for arm, found in summary["evaluation"]["arms"].items()}
    assert losses["main"] < losses["base"]
    assert (folder / "report.html").is_file()
    modules = json.loads((folder / "eval/router.json").read_text())["modules"]
    assert {m["layer"] for m in modules} == set(selection.layers)
