"""The command line in this process: exit codes, messages, and what is left behind."""

import io
import json
import subprocess
import sys
import time

import pytest
from helpers.tiny_run import write_config, write_inputs

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
    from helpers.tiny import tiny_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    settings = changed(config, "model", path=str(tmp_path / "gpt2")) | {"name": "gpt2"}
    code, _, err = floe("search", write_config(tmp_path / "c.yaml", settings), "--quiet")
    assert code == 2
    assert "no decoder blocks" in err


SECRET = "postgresql://u:S3CRET@h/db"


def test_a_fault_of_floe_keeps_its_traceback_and_no_secret(floe, monkeypatch):
    from floe import doctor

    def fail():
        raise KeyError(SECRET)

    monkeypatch.setattr(doctor, "diagnose", fail)
    code, _, err = floe("doctor")
    assert (code, "in fail" in err, "S3CRET" in err) == (1, True, False)
    assert "KeyError: 'postgresql://u:***@h/db'. This is a fault of floe" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ImportError("no module\n named x"), 1, "floe: ImportError: no module named x"),
        (
            OSError(28, "No space left on device", "/x/y"),
            1,
            "floe: /x/y: No space left on device; the same command continues",
        ),
        (OSError("odd"), 1, "floe: OSError: odd"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4, None),
        (MemoryError(), 4, "floe: MemoryError"),
        (
            Exception("I/O error: No space left on device (os error 28)"),
            1,
            "floe: Exception: I/O error: No space left on device (os error 28)",
        ),
        (ValueError(f"one\ntwo {SECRET}"), 2, "floe: ValueError: one two postgresql://u:***@h/db"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_a_library_is_one_line(error, code, line, floe, monkeypatch):
    from floe import doctor

    def fail():
        raise error

    monkeypatch.setattr(doctor, "diagnose", fail)
    found, _, err = floe("doctor")
    assert found == code
    assert err.count("\n") == 1
    assert line is None or err == line + "\n"
    monkeypatch.setenv("FLOE_TRACEBACK", "1")
    assert "in fail" in floe("doctor")[2]


def test_what_floe_says_itself_is_no_fault_of_it(tmp_path, capsys):
    """A RuntimeError of floe's own is a sentence for its user."""
    from floe.rank_search.studies import one_process

    lock = tmp_path / "lock"
    with (
        pytest.raises(SystemExit) as caught,
        cli._exit_codes(),
        one_process(lock),
        one_process(lock),
    ):
        pass
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("floe: another process is searching")


def test_usage_errors_repeat_no_secret(floe):
    code, _, err = floe("run", "c.yaml", f"search.storage={SECRET}")
    assert (code, "S3CRET" in err, "u:***@h/db" in err) == (2, False, True)


@pytest.mark.parametrize("storage", [SECRET, "postgresql://u:${FLOE_PW}@h:1/db", "${FLOE_DB}"])
def test_a_password_goes_to_the_database_alone(storage, config, tmp_path, floe, monkeypatch):
    """No database answers here: what was said and written until then holds no password."""
    monkeypatch.setenv("FLOE_PW", "S3CRET")
    monkeypatch.setenv("FLOE_DB", SECRET)
    settings = changed(config, "search", storage=storage) | {"output_dir": str(tmp_path / "runs")}
    path = write_config(tmp_path / "c.yaml", settings)
    monkeypatch.setenv("FLOE_TRACEBACK", "1")
    code, out, err = floe("search", path)
    assert (code, "u:***@h" in err, "S3CRET" in out + err) == (2, True, False), err
    written = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert {"config.yaml", "env.json", "events.jsonl"} <= {file.name for file in written}
    assert not [file for file in written if b"S3CRET" in file.read_bytes()]


def test_files_that_cannot_be_used_are_named(config, tmp_path, floe):
    path = write_config(tmp_path / "c.yaml", config)
    code, _, err = floe("run", tmp_path)
    assert (code, "cannot be read as YAML: Is a directory" in err) == (3, True)
    code, _, err = floe("search", path, "-q", "--set", f"output_dir={path}")
    assert (code, f"{path}: must be a folder to hold the run's" in err) == (3, True)
    code, _, err = floe("init", tmp_path / "no" / "new.yaml")
    assert (code, "cannot be written: " in err) == (3, True)
    (tmp_path / "link.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    assert floe("init", tmp_path / "link.yaml")[0] == 3
    assert not (tmp_path / "elsewhere.yaml").exists()
    code, _, err = floe("run", "\udcff\udcfe.yaml")
    assert (code, "No such file" in err, err.count("\n")) == (3, True, 1)
    code, _, err = floe("run", path, "--set", "mod\udcff=1", "--set", "name=\udcff")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("| (exec <&-; sleep 0.1)", 1, ""),
        (">/dev/full", 1, "floe: No space left on device; the same command continues"),
        (">&-", 0, ""),
        (">/dev/null 2>&-", 0, ""),
    ],
)
def test_an_output_that_is_closed_or_full(redirection, code, message):
    command = f"COLUMNS=1 {sys.executable} -m floe schema {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (code, message)


def test_any_terminal_gets_its_text(tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["floe", "init", str(tmp_path / "na\u00efve\u2013.yaml")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert b"na\\xefve\\u2013.yaml written" in out.buffer.getvalue()


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
    from floe.config_file import load_config

    path = tmp_path / "new.yaml"
    assert floe("init", path)[0] == 0
    assert load_config(path).name == "my-run"
    assert floe("init", path)[0] == 3


def test_schema_is_json_schema(floe):
    code, out, _ = floe("schema")
    assert code == 0
    assert {"model", "data", "train"} <= set(json.loads(out)["properties"])


def test_a_failing_selftest_is_the_exit_code(floe, monkeypatch):
    from floe import selfcheck

    wrong = selfcheck.Result("moe_lora_forward", "y", "cpu", "float32", "T17", float("inf"), 1e-6)
    monkeypatch.setattr(selfcheck, "selftest", lambda: [wrong])
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


@pytest.fixture(scope="module")
def audited(config, tmp_path_factory):
    """A run selected with its rows' gradients kept, for audits."""
    from floe.config_file import parse_config
    from floe.pipeline.run import run

    settings = changed(config, "score", keep_samples=True) | {"name": "audited", "baselines": []}
    settings = changed(settings, "search", trials=0)
    folder = run(parse_config(settings), until="select").folder
    return write_config(tmp_path_factory.mktemp("audit") / "c.yaml", settings), folder


def test_an_audit_needs_a_finished_selection(config, tmp_path, floe):
    settings = changed(config, "search", trials=0) | {"name": "early"}
    settings["output_dir"] = str(tmp_path)
    path = write_config(tmp_path / "c.yaml", settings)
    code, _, err = floe("audit", path, "--quiet")
    assert (code, "search stage is not finished; run: floe search" in err) == (3, True), err
    assert not (tmp_path / "early").exists()


def test_an_audit_from_saved_scores_loads_no_model(audited, floe, monkeypatch):
    from floe.pipeline.inputs import RunInputs

    path, folder = audited
    config_text = (folder / "config.yaml").read_bytes()

    def refuse(work):
        raise AssertionError("the model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(RunInputs, "base_model", property(refuse))
        words = ("audit", path, "--statistics", "none", "--bootstrap", "5", "--json", "--quiet")
        code, out, err = floe(*words)
    assert code == 0, err
    document = json.loads(out)
    assert document == json.loads((folder / "audit/audit.json").read_text())
    assert (document["rows"], document["draws"], document["count"]) == (16, 5, 2)
    assert document["masks"] is not None
    assert not document["routers"]
    assert (
        document["selection"]
        == json.loads((folder / "select/DONE.json").read_text())["inputs_hash"]
    )
    assert (folder / "config.yaml").read_bytes() == config_text
    assert "lamp" in document["lacking"]


def test_an_audit_measures_once_and_enters_the_report(audited, floe):
    path, folder = audited
    words = ("audit", path, "--statistics", "lamp,kl_guided,layer_card", "--rows", "4")
    code, out, err = floe(*words, "--bootstrap", "2")
    assert code == 0, err
    assert out.splitlines()[-1] == f"audit: {folder / 'audit/audit.json'}"
    assert any(line.startswith("open ") for line in out.splitlines())
    document = json.loads((folder / "audit/audit.json").read_text())
    assert {"lamp", "kl_guided", "layer_card"} <= {one["name"] for one in document["policies"]}
    assert len(document["routers"]) == 4 * 3
    began = time.monotonic()
    stamps = {file: file.stat().st_mtime_ns for file in folder.glob("audit/*/*")}
    assert floe(*words, "--bootstrap", "2")[0] == 0
    assert stamps == {file: file.stat().st_mtime_ns for file in folder.glob("audit/*/*")}
    assert time.monotonic() - began < 60
    assert document == json.loads((folder / "audit/audit.json").read_text())

    from floe.report.page import sections
    from floe.report.run import read_run

    (part,) = [part for part in sections(read_run(folder)) if part.key == "audit"]
    assert len(part.pictures) == 3
    assert [sentence for _, sentence in part.verdicts] == [
        sentence for kind in ("solid", "open", "note") for sentence in document["verdicts"][kind]
    ]


def test_what_a_model_does_not_give_is_told_and_an_error_if_it_was_named(audited, floe):
    """The tiny model's last token is its padding, whose embedding has no direction."""
    path, _ = audited
    words = ("--rows", "4", "--bootstrap", "1", "--quiet")
    code, _, err = floe("audit", path, "--statistics", "angular", *words)
    assert (code, "zero or infinite state" in err) == (2, True), err
    code, out, err = floe("audit", path, *words, "--json")
    assert code == 0, err
    lacking = json.loads(out)["lacking"]
    assert "does not give: angular_last must be finite" in lacking["angular"]
    assert not {"lamp", "spectrum", "eva", "gradient_norm", "layer_card"} & set(lacking)
    assert "--statistics shapley" in lacking["shapley"]


def test_an_interrupted_audit_keeps_what_was_measured(audited, floe, monkeypatch):
    from floe.pipeline import audit

    path, folder = audited
    real = audit.measure_statistics

    def interrupted(model, batches, names, **options):
        if "eva" in names:
            raise KeyboardInterrupt
        return real(model, batches, names, **options)

    words = ("audit", path, "--statistics", "spectrum,eva", "--rows", "5", "--bootstrap", "2", "-q")
    before = (folder / "audit/audit.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(audit, "measure_statistics", interrupted)
        code, _, err = floe(*words)
    assert (code, "the same command continues" in err) == (130, True)
    assert (folder / "audit/audit.json").read_bytes() == before
    stamp = (folder / "audit/spectrum/statistics.npz").stat().st_mtime_ns
    assert floe(*words)[0] == 0
    assert (folder / "audit/spectrum/statistics.npz").stat().st_mtime_ns == stamp
    assert (folder / "audit/eva/statistics.npz").is_file()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--statistics", "best"), 2, "statistics must be cheap, all, none or policies of"),
        (("--rows", "0"), 2, "rows must be >= 1, got 0"),
        (("--bootstrap", "0"), 2, "bootstrap must be >= 1, got 0"),
        (("--set", "select.layers=3"), 3, "select: was made with other settings"),
        (("--set", "score.rows=8"), 3, "score: was made with other settings"),
    ],
)
def test_what_an_audit_refuses(audited, floe, words, code, message):
    found, _, err = floe("audit", audited[0], "--quiet", *words)
    assert (found, message in err) == (code, True), err
