"""The command line in this process: exit codes, messages, and what is left behind."""

import json
import subprocess
import sys
import time

import pytest
from tiny_run import write_config, write_inputs

from floe import cli


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def floe(monkeypatch, capsys):
    """Run a command; returns exit code, stdout, stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["floe", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


def changed(config, section, **values):
    return {**config, section: {**config[section], **values}}


def bad_data(config, tmp_path, text):
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    return changed(config, "data", train={"path": str(path)})


ROW = '{"prompt": "a", "completion": "b", "choices": ["b", "c"], "answer": 0, "task": "t"}\n'
BAD = {
    "empty data": (lambda c, t: bad_data(c, t, ""), 3, "at least one row"),
    "broken JSON": (lambda c, t: bad_data(c, t, ROW + "{oops\n"), 3, "row 1"),
    "missing column": (lambda c, t: bad_data(c, t, '{"prompt": "a"}\n'), 3, "completion"),
    "no target left": (
        lambda c, t: bad_data(c, t, ROW.replace('"b", "choices"', '" ", "choices"')),
        3,
        "no row with a target",
    ),
    "missing file": (
        lambda c, t: changed(c, "data", train={"path": str(t / "none.jsonl")}),
        3,
        "does not exist",
    ),
    "missing model": (lambda c, t: changed(c, "model", path=str(t / "none")), 3, "none"),
    "unknown module": (
        lambda c, t: {**c, "adapter": {"target_modules": ["gate_projection"]}},
        2,
        "gate_projection",
    ),
    "rank 0": (lambda c, t: {**c, "adapter": {"r": 0}}, 2, "adapter.r"),
    "search rank 0": (lambda c, t: changed(c, "search", rank=[0, 4, 2]), 2, "search.rank"),
    "budget NaN": (lambda c, t: changed(c, "select", budget=float("nan")), 2, "select.budget"),
    "too many layers": (lambda c, t: changed(c, "select", layers=9), 2, "got 9"),
    "unknown policy": (lambda c, t: changed(c, "select", policy="best"), 2, "policy"),
    "unknown setting": (
        lambda c, t: changed(c, "train", learning_rat=1),
        2,
        "did you mean 'learning_rate'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_nothing_half_written(case, config, tmp_path, floe):
    change, code, message = BAD[case]
    settings = change(config, tmp_path) | {"name": case.replace(" ", "-"), "baselines": []}
    settings["output_dir"] = str(tmp_path / "runs")
    found, _, err = floe("run", write_config(tmp_path / "c.yaml", settings), "--quiet")
    assert (found, message in err) == (code, True), err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/*/adapter"))
    assert not list(tmp_path.glob("runs/*/*/DONE.json")) or case == "too many layers"


def test_a_model_without_such_blocks_is_refused(config, tmp_path, floe):
    from tiny import tiny_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    settings = changed(config, "model", path=str(tmp_path / "gpt2")) | {"name": "gpt2"}
    code, _, err = floe("search", write_config(tmp_path / "c.yaml", settings), "--quiet")
    assert code == 2
    assert "no decoder blocks" in err


def test_usage_errors(floe, tmp_path):
    assert floe("run")[0] == 2
    assert floe("run", tmp_path / "none.yaml")[0] == 3
    assert floe("nonsense")[0] == 2


def test_json_is_one_object_on_stdout(config, tmp_path, floe):
    path = write_config(tmp_path / "c.yaml", config)
    code, out, _ = floe("select", path, "--json", "--set", "name=json", "--set", "baselines=[]")
    assert code == 0
    found = json.loads(out)
    assert len(found["selection"]["layers"]) == 2
    assert found["search"]["trials"]
    code, out, _ = floe("select", path, "--set", "name=json", "--set", "baselines=[]")
    assert out.strip().endswith("select/selection.json")


def test_init_writes_a_configuration_that_loads(tmp_path, floe):
    from floe.config import load_config

    path = tmp_path / "new.yaml"
    assert floe("init", path)[0] == 0
    assert load_config(path).name == "my-run"
    assert floe("init", path)[0] == 3


def test_schema_is_json_schema(floe):
    code, out, _ = floe("schema")
    assert code == 0
    assert {"model", "data", "train"} <= set(json.loads(out)["properties"])


def test_a_failing_selftest_is_the_exit_code(floe, monkeypatch):
    from floe import doctor

    wrong = doctor.Result("moe_lora_forward", "y", "cpu", "float32", "T17", float("inf"), 1e-6)
    monkeypatch.setattr(doctor, "selftest", lambda: [wrong])
    code, out, err = floe("doctor", "--selftest")
    assert code == 1
    assert "moe_lora_forward" in err
    assert "1 comparisons with float64, 1 out of budget" in out


def test_help_is_quick_and_loads_no_torch():
    code = "import sys; sys.argv = ['floe', '--help']; from floe.cli import app; import click\n"
    code += "try: app(standalone_mode=False)\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    began = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Fine-tune" in done.stdout
    assert time.process_time() - began < 5
