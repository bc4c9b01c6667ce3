"""What is checked before a run's first stage: every fault is named, and nothing is written."""

import json
import shutil
from typing import get_args

import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.tiny_run import write_config, write_inputs
from transformers import AutoModelForCausalLM

import floe
from floe import cli
from floe.config import Schedule
from floe.config_file import parse_config
from floe.errors import CheckError, DataError, FileError
from floe.pipeline.check import check
from floe.pipeline.inputs import RunInputs, structure
from floe.pipeline.run import run
from floe.progress import LineProgress, Progress
from floe.selection.policies import POLICIES

ROW = {
    "prompt": "ask",
    "completion": "answer",
    "choices": ["answer", "no"],
    "answer": 0,
    "task": "t",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def changed(config, **settings):
    """The configuration with some settings replaced: ``section__name=value``."""
    found = json.loads(json.dumps(config))
    for key, value in settings.items():
        *parents, last = key.split("__")
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return found


def looked_at(config, **settings):
    return check(RunInputs(parse_config(changed(config, **settings))))


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path)}


def saved_model(folder, model=None, tokenizer=None, **settings):
    """A model folder, its config.json changed by ``settings``."""
    (model or tiny_model()).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def baseline(**settings):
    return {"name": "one", "policy": "random", **settings}


FAULTS = {
    "test file": ({"data__test": {"path": "/none/test.jsonl"}}, FileError, "does not exist"),
    "validation file": ({"data__validation": {"path": "/none/v.csv"}}, FileError, "does not exist"),
    "taylor file": ({"score__taylor_data": {"path": "/none/t.parquet"}}, FileError, "not exist"),
    "column": ({"data__columns__task": "subject"}, CheckError, "needs the column 'subject'"),
    "layers": ({"select__layers": 99}, ValueError, r"layers must be in \[1, 4\], got 99"),
    "sweep": ({"select__layers": {"sweep": [2, 9]}}, ValueError, "at most 4 layers, got 9"),
    "params": ({"select__layers": {"params": 10}}, ValueError, "must fit at least one layer"),
    "memory": ({"select__layers": {"memory": 10}}, ValueError, "must fit at least one layer"),
    "projection": ({"adapter__target_modules": ["gate"]}, ValueError, r"got \['gate'\]"),
    "space": ({"search__rank": [2, 5, 2]}, ValueError, "high reached"),
    "first order": ({"select__first_order": True}, ValueError, "first_order=True"),
    "answer": ({"eval__max_new_tokens": 64, "eval__accuracy": "generation"}, ValueError, "got 64"),
    "negative scores": (
        {"baselines": [baseline(policy="fisher_low", choose="sizes")], "select__r0": 4.0},
        ValueError,
        "finite number >= 0",
    ),
    "few sizes": (
        {"select__choose": "sizes", "search__trials": 3, "search__num_experts": [2, 2, 1]},
        ValueError,
        "select.r0 must be set",
    ),
    "one step": ({"train__max_steps": 1}, ValueError, "1 step, which warm-up gives 0"),
    "split": ({"data__validation": None, "data__train": "one row"}, ValueError, "at least 2"),
    "few to compare": (
        {"data__validation": "one row", "select__layers": {"sweep": [1, 2]}},
        ValueError,
        "validation rows, of which there must be at least 2, got 1",
    ),
    "attention": ({"model__attention": "flash_attention_2"}, FileError, "lashAttention"),
    "model": ({"model__path": "/none/model"}, FileError, "/none/model: does not exist"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_can_be_known_is_found_before_any_stage(case, config, tmp_path):
    settings, kind, message = FAULTS[case]
    one = rows_file(tmp_path / "one.jsonl", [ROW])
    settings = {key: one if value == "one row" else value for key, value in settings.items()}
    given = changed(config, output_dir=str(tmp_path / "runs"), **settings)
    with pytest.raises(kind, match=message):
        run(parse_config(given))
    assert not (tmp_path / "runs").exists()


def test_every_problem_is_named_at_once(config, tmp_path):
    with pytest.raises(CheckError) as caught:
        looked_at(
            config,
            data__test={"path": "/none.csv"},
            select__layers=99,
            output_dir=__file__,
            adapter__target_modules=["gate"],
            select__r0=4.0,
            baselines=[baseline(policy="fisher_low", choose="sizes")],
        )
    text = str(caught.value)
    assert text.startswith(f"{len(caught.value.problems)} problems were found before")
    for part in (
        "/none.csv: ",
        "got ['gate']",
        "test_check.py: must be a folder",
        "layers must be in [1, 4]",
        "baselines.one: layer_scores[0] must",
    ):
        assert text.count(part) == 1, text


def test_no_policy_that_works_is_refused(config):
    names = [*POLICIES, *get_args(Schedule)]
    baselines = [{"name": name.replace("_", "-"), "policy": name} for name in names]
    account = looked_at(config, baselines=baselines, score__statistic_rows=4)
    assert {own["layers"] for own in account.adapters.values()} == {2, 4}
    assert account.notes == []


def test_the_check_loads_no_weights_and_predicts_sizes(config):
    work = RunInputs(parse_config(config))
    account = check(work)
    assert "base_model" not in work.__dict__
    assert {p.device.type for p in work.structure.parameters()} == {"meta"}
    low, high = account.adapters["all"]["parameters"]
    for count, rank, experts in ((low, 2, 2), (high, 4, 3)):
        adapted = floe.get_model(tiny_model(layers=4), floe.FloeConfig(r=rank, num_experts=experts))
        assert count == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert account.adapters["main"]["parameters"] == [low // 2, high // 2]
    whole = sum(p.numel() for p in tiny_model(layers=4).parameters())
    assert account.memory["base model"] == 4 * whole
    assert account.memory["adapters and optimiser"] == 16 * high
    assert account.memory["there"] > 2**28
    saving = looked_at(config, train__gradient_checkpointing=True)
    assert 0 < saving.memory["activations"] < account.memory["activations"]


def test_a_budget_that_the_search_may_outgrow_is_a_remark(config):
    layer = looked_at(config).adapters["main"]["parameters"][0] // 2
    (note,) = looked_at(config, select__layers={"params": layer}).notes
    assert note.startswith("should the search choose rank 4 and 3 experts: select: layers['params'")


def test_a_model_larger_than_the_device_is_refused(config, monkeypatch):
    monkeypatch.setattr(RunInputs, "device_memory", 100_000)
    with pytest.raises(ValueError, match="must fit the memory of cpu"):
        looked_at(config)


def test_a_full_disk_is_refused(config, monkeypatch):
    full = shutil.disk_usage("/")._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(FileError, match="must have room for about"):
        looked_at(config)


class Said(Progress):
    """Remembers what was said."""

    def __init__(self):
        self.lines, self.stages = [], []

    def say(self, text):
        self.lines.append(text)

    def stage(self, name, what):
        self.stages.append(name)


def test_rows_that_are_lost_are_told_on_the_terminal_and_in_the_run(config, tmp_path, capsys):
    rows = [ROW] * 12 + [ROW | {"completion": " "}] * 5 + [ROW | {"completion": "x" * 99}] * 2
    train = rows_file(tmp_path / "train.jsonl", [*rows, ROW | {"prompt": "y" * 99}])
    columns = {"prompt": "prompt", "completion": "completion"}
    given = changed(config, data__train=train, data__columns=columns, search={"trials": 0})
    said = Said()
    folder = run(
        parse_config(given | {"output_dir": str(tmp_path)}), until="search", progress=said
    ).folder
    own = json.loads((folder / "data.json").read_text())["parts"]["data.train"]
    assert (own["rows"], own["kept"], own["longest"]) == (20, 13, 64)
    assert own["dropped"] == {
        "without a completion": {"rows": 5, "first": [12, 13, 14, 15, 16]},
        "too long for max_length": {"rows": 2, "first": [17, 18]},
    }
    assert own["cut"] == {"rows": 1, "first": [19]}
    lost = "7 rows dropped (5 without a completion, 2 too long for max_length), 1 prompts cut"
    assert [line.startswith("data.train: 13 of 20 rows kept") for line in said.lines] == [True]
    assert lost in said.lines[0]
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    for rate, redo, first in (
        (0.01, False, "done"),
        (0.5, False, "refused without --redo: train.learning_rate 0.01 -> 0.5"),
        (0.5, True, "to do again: train.learning_rate 0.01 -> 0.5"),
    ):
        again = parse_config(changed(given, output_dir=str(tmp_path), train__learning_rate=rate))
        account = run(again, dry_run=True, redo=redo).account
        assert list(account.stages.values()) == [first, *["to do"] * 5]
        assert account.refused == first.startswith("refused")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    LineProgress().say(said.lines[0])
    assert capsys.readouterr().err.rstrip().endswith(said.lines[0])


def test_answers_that_cannot_be_given_are_a_note(config, tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "four" if i else "a longer one"} for i in range(3)]
    settings = {
        "data__test": rows_file(tmp_path / "test.jsonl", rows),
        "data__columns": {"prompt": "prompt", "completion": "completion"},
    }
    (note,) = looked_at(config, **settings, eval__max_new_tokens=4).notes
    assert note.startswith("1 right answers are longer than eval.max_new_tokens = 4")
    assert looked_at(config, **settings, eval__max_new_tokens=12).notes == []


def test_a_run_that_loses_most_of_its_rows_stops(config, tmp_path):
    train = rows_file(tmp_path / "t.jsonl", [ROW] * 9 + [ROW | {"completion": ""}] * 11)
    columns = {"prompt": "prompt", "completion": "completion"}
    given = changed(config, data__train=train, data__columns=columns)
    message = r"data.train: 11 rows dropped \(11 without a completion\) of 20, more than data.max_d"
    with pytest.raises(DataError, match=message):
        looked_at(given)
    assert looked_at(given, data__max_dropped=0.55).data["train"].kept == 9
    with pytest.raises(DataError, match=r"data.max_dropped = 0.0"):
        looked_at(given, data__max_dropped=0)


def test_a_token_without_an_embedding_is_found(config, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["ask"])
    model = tiny_model(vocabulary=len(tokenizer) - 1)
    path = str(saved_model(tmp_path / "m", model, tokenizer))
    plain = looked_at(config, model__path=path, select__layers=1)
    assert plain.data["test"].kept == 12  # no row holds the token
    for row in (ROW, ROW | {"prompt": "what", "choices": ["right", "ask"]}):
        test = rows_file(tmp_path / "test.jsonl", [row])
        with pytest.raises(FileError, match=r"token 2\d\d \('ask', data.test, row 0\), but the"):
            looked_at(config, model__path=path, select__layers=1, data__test=test)


def adapters_folder(folder, kind):
    base = saved_model(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    if kind == "floe":
        floe.save_adapter(floe.get_model(model, floe.FloeConfig(r=2)), folder / "adapter")
    else:
        import peft

        lora = peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
        peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")
    return folder / "adapter", base


@pytest.mark.parametrize("kind", ["floe", "lora"])
def test_an_adapter_is_no_base_model(kind, config, tmp_path):
    folder, base = adapters_folder(tmp_path, kind)
    work = RunInputs(parse_config(changed(config, model__path=str(folder))))
    for look in (
        lambda: check(work),
        lambda: work.base_model,
        lambda: structure(str(folder)),
    ):
        with pytest.raises(FileError, match=r"holds an adapter \((FLOE|LORA)\)") as caught:
            look()
        assert repr(str(base)) in str(caught.value)


def test_weights_that_would_be_random_are_refused(config, tmp_path):
    more = RunInputs(
        parse_config(
            changed(config, model__path=str(saved_model(tmp_path / "more", num_hidden_layers=3)))
        )
    )
    for look in (lambda: check(more), lambda: more.base_model):
        with pytest.raises(FileError, match=r"every weight, 9 are missing: model\.layers\.2\."):
            look()
    wide = saved_model(tmp_path / "wide", vocab_size=333)
    with pytest.raises(FileError, match=r"must be \[333, 32\] as config.json says, got \[320, 32"):
        looked_at(config, model__path=str(wide))
    fewer = saved_model(tmp_path / "fewer", num_hidden_layers=1)
    notes = looked_at(config, model__path=str(fewer), select__layers=1).notes
    assert ["9 tensors are of no use" in note and "model.layers.1" in note for note in notes] == [1]
    tied = tiny_model()
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    assert looked_at(config, model__path=str(saved_model(tmp_path / "tied", tied))).notes == []


def test_what_is_no_causal_language_model_is_refused(config, tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {
        f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "ffn_dim")
    }
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=320, d_model=8, **sizes))
    folder = saved_model(tmp_path / "bart", bart)
    with pytest.raises(FileError, match="got the encoder-decoder bart"):
        looked_at(config, model__path=str(folder))
    damaged = saved_model(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\x20" * 40)
    with pytest.raises(FileError, match="damaged: cannot be loaded as a model: Saf"):
        looked_at(config, model__path=str(damaged))
    wrong = saved_model(tmp_path / "wrong", hidden_size="large")
    with pytest.raises(FileError, match=r"wrong: cannot be read as a model.*hidden_size"):
        looked_at(config, model__path=str(wrong))


def test_a_dry_run_tells_and_writes_nothing(config, tmp_path, monkeypatch, capsys):
    given = changed(config, output_dir=str(tmp_path / "runs"))
    path = write_config(tmp_path / "c.yaml", given)

    def call(*words):
        monkeypatch.setattr("sys.argv", ["floe", "run", str(path), "--dry-run", "-q", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, capsys.readouterr()

    code, said = call()
    assert code == 0
    for part in (
        "data.train: 48 of 48 rows kept",
        "main: 2 layers",
        "all: 4 layers",
        "base model 0.2 MiB, ",
    ):
        assert part in said.out, said.out
    code, said = call("--json")
    assert code == 0
    assert json.loads(said.out)["data"]["test"]["kept"] == 12
    assert call("--set", "data.test.path=/none/test.jsonl")[0] == 3
    assert call("--set", "select.layers=99")[0] == 2
    assert not (tmp_path / "runs").exists()
    assert not torch.is_grad_enabled() or list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"select__policy": "lamp"}, "policy 'lamp'"),
        ({"select__tune": True}, "select.tune: true"),
        ({"select__tune": None}, None),
    ],
)
def test_what_needs_plain_weights_is_refused_on_quantised_ones(config, tmp_path, settings, what):
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path = str(saved_model(tmp_path / "quantised", quantization_config=quantised))
    if what is None:
        looked_at(config, model__path=path, **settings)
        return
    with pytest.raises(ValueError, match=f"model: {what} needs plain base weights, got quantised"):
        looked_at(config, model__path=path, **settings)


def test_rows_that_are_tested_and_trained_on_are_a_note(config):
    data = config["data"]["train"]
    (note,) = looked_at(config, data__test=data, eval__max_new_tokens=64).notes
    assert "test rows are training rows, too" in note


def test_a_length_beyond_all_measure_is_refused_at_once(config):
    with pytest.raises(ValueError, match=r"a training must take at most 200,000,000 rows, got"):
        looked_at(config, train__max_steps=None, train__epochs=1e9)
