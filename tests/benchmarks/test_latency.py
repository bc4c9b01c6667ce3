import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: an installed floe stays first

import benchmarks.latency.__main__ as latency
from benchmarks import cost, harness, implementations, models, paper, plot
from benchmarks.harness import Bench, Candidate, WrongResult
from benchmarks.implementations import TARGETS, Adapter, Problem
from benchmarks.latency import adapted_models as ways
from benchmarks.latency import options, training
from benchmarks.latency.adapted_models import AdaptedLinear
from benchmarks.latency.block_check import BlockCheck
from floe.decoder_blocks import find_blocks
from floe.errors import FileError
from floe.pipeline.run_folder import RunFolder, Stage

CPU = torch.device("cpu")
WAYS = ["floe", "peft r=4", "peft r=12", "eager", "hydra"]


def _subject(dtype=torch.float32):
    return models.load("tiny", device=CPU, dtype=dtype)


def _adapter(dtype=torch.float32, dropout=0.0):
    return Adapter(4, 3, dropout, dtype)


def _build(subject, way, layers=(0, 1), adapter=None):
    adapter = adapter or _adapter()
    return ways.build("model", "way", way, subject.model, layers, adapter)


# models


def test_shared_models_have_the_same_weights_and_modules_of_their_own():
    base = _subject().model
    other = models.share(base)
    pairs = list(zip(base.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in pairs)
    other.set_submodule("model.layers.0.mlp.up_proj", nn.Identity())
    assert isinstance(base.model.layers[0].mlp.up_proj, nn.Linear)


def test_models_and_their_tokens_are_the_same_every_time():
    one, two = _subject(), _subject()
    assert torch.equal(one.model.lm_head.weight, two.model.lm_head.weight)
    assert not any(value.requires_grad for value in one.model.parameters())
    assert torch.equal(one.tokens(3, 8), two.tokens(3, 8))
    assert one.tokens(3, 8).shape == (3, 8)
    with pytest.raises(ValueError, match=r"model must be one of .*, got 'gpt'"):
        models.load("gpt", device=CPU, dtype=torch.float32)


def test_questions_are_packed_without_padding_from_another_one_in_every_row():
    found = models.few_shot([[1, 2, 3], [4, 5], [6]], count=4, length=5)
    assert found.tolist() == [[1, 2, 3, 4, 5], [4, 5, 6, 1, 2], [6, 1, 2, 3, 4], [1, 2, 3, 4, 5]]


# adapted models and their check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_computes_its_formula(dtype):
    subject, adapter = _subject(dtype), _adapter(dtype)
    check = BlockCheck(subject.model, subject.tokens(2, 8), adapter)
    named = {"frozen": ways.frozen, **ways.registry(4, 3, CPU, False)}
    assert [*named] == ["frozen", *WAYS]
    hidden = {}
    for name, way in named.items():
        model = _build(subject, way, () if name == "frozen" else (0, 1), adapter)
        error = harness.gate(Candidate(name, lambda: None, lambda a=model: check.checks(a)))
        assert 0.0 < error < (1e-5 if dtype == torch.float32 else 0.05)
        with torch.no_grad():
            hidden[name] = model.model(input_ids=subject.tokens(2, 8)).logits.double()
    apart = {
        name: float((value - hidden["frozen"]).norm() / hidden["frozen"].norm())
        for name, value in hidden.items()
        if name != "frozen"
    }
    assert min(apart.values()) > 0.1  # strong adapters: what is wrong with one shows
    routed = [hidden[name] for name in ("floe", "eager", "hydra")]
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert all(float((v - routed[0]).norm() / routed[0].norm()) < tolerance for v in routed)


def test_an_adapter_in_float32_beside_bfloat16_weights_passes_too():
    subject = _subject(torch.bfloat16)
    check = BlockCheck(subject.model, subject.tokens(2, 8), _adapter())
    for way in ways.registry(4, 3, CPU, False).values():
        model = _build(subject, way)
        assert all(value.dtype == torch.float32 for value in model.parameters)
        harness.gate(Candidate("model", lambda: None, lambda a=model: check.checks(a)))


def _hydra_without_an_expert(x, weight, p, a, router, *experts):
    return implementations.hydra_linear(x, weight, p, a, router, *experts[:-1], experts[-1] * 0.0)


def _hydra_with_another_sign(x, weight, p, a, router, *experts):
    return 2 * (x @ weight.T) - implementations.hydra_linear(x, weight, p, a, router, *experts)


def _eager_without_a_router(x, weight, p, shrink, expand):
    flat = torch.cat([shrink[: expand.shape[2]], shrink[expand.shape[2] :] * 0.0])
    return implementations.eager_linear(x, weight, p, flat, expand)


def _eager_with_half_the_gradient(x, weight, p, shrink, expand):
    return implementations.eager_linear(x * 0.5 + x.detach() * 0.5, weight, p, shrink, expand)


def _swapping(kind, function, only=None):
    """`kind`, with another function in every linear, or in those whose path ends in ``only``."""

    def way(model, paths, adapter):
        adapted, linears = kind(model, paths, adapter)
        for path in paths:
            if path.endswith(only or path):
                adapted.get_submodule(path).function = function
        return adapted, linears

    return way


def _with_other_numbers(model, paths, adapter):
    adapted, linears = ways.routed(model, paths, adapter)
    with torch.no_grad():
        next(iter(linears.values())).parameters[1][:, 1].zero_()
    return adapted, linears


WRONG = {
    "without an expert": _swapping(ways.hydra, _hydra_without_an_expert),
    "wrong in one linear": _swapping(ways.hydra, _hydra_without_an_expert, "0.self_attn.k_proj"),
    "wrong in the last block": _swapping(ways.hydra, _hydra_without_an_expert, "1.mlp.down_proj"),
    "another sign": _swapping(ways.hydra, _hydra_with_another_sign),
    "no router": _swapping(ways.eager, _eager_without_a_router),
    "half the gradient": _swapping(ways.eager, _eager_with_half_the_gradient),
    "other numbers": _with_other_numbers,
}


@pytest.mark.parametrize("way", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_way_gets_no_time(way, dtype):
    subject, adapter = _subject(dtype), _adapter(dtype)
    check = BlockCheck(subject.model, subject.tokens(2, 8), adapter)
    right = _build(subject, ways.eager, adapter=adapter)
    wrong = _build(subject, way, adapter=adapter)
    bench = Bench(CPU, lambda: 0.0, {}, 1)
    run = lambda: pytest.fail("timed")  # noqa: E731
    found = [
        Candidate("wrong", run, lambda: check.checks(wrong)),  # first: no truth is known yet
        Candidate("right", run, lambda: check.checks(right)),
    ]
    with pytest.raises(WrongResult, match=r"wrong: block \d: .* has relative error .*not timed"):
        bench.time({}, found)


def test_a_decode_step_is_gated_by_its_output():
    subject = _subject()
    check = BlockCheck(subject.model, subject.tokens(1, 6), _adapter(), backward=False)
    found = [check.output for check in check.checks(_build(subject, ways.hydra, (1,)))]
    assert found == [*(f"block 1: output of {name}" for name in TARGETS), "block 1: output"]
    for name in ("without an expert", "wrong in one linear", "other numbers", "another sign"):
        model = _build(subject, WRONG[name])
        with pytest.raises(WrongResult):
            harness.gate(Candidate("wrong", lambda: None, lambda a=model: check.checks(a)))


def test_a_way_that_adapts_other_linears_than_told_gets_no_time():
    subject = _subject()

    def elsewhere(model, paths, adapter):
        return ways.eager(model, {p: i for p, i in paths.items() if "k_proj" not in p}, adapter)

    with pytest.raises(WrongResult, match=r"must adapt 7 linears, differs in .*k_proj.*not timed"):
        _build(subject, elsewhere, (1,))


def test_only_the_asked_for_layers_and_projections_are_adapted():
    subject, adapter = _subject(), Adapter(4, 3, targets=("up_proj", "q_proj"))
    for way in ways.registry(4, 3, CPU, False).values():
        model = _build(subject, way, (1,), adapter)
        assert sorted(model.linears) == [
            "model.layers.1.mlp.up_proj",
            "model.layers.1.self_attn.q_proj",
        ]
        assert model.model is not subject.model
        assert all(value.requires_grad for value in model.parameters)


def test_backends_are_rows_of_their_own_on_cuda_alone():
    on_cuda = ways.registry(8, 4, torch.device("cuda"), True)
    assert {"floe", "floe gemm", "floe fused", "floe eager", "compiled"} <= set(on_cuda)
    assert not {name for name in ways.registry(8, 4, CPU, False) if name.startswith("floe ")}


def test_a_swapped_linear_drops_in_training_alone_and_takes_no_bias():
    model = _build(_subject(), ways.hydra, (0,), _adapter(dropout=0.5))
    block, x = find_blocks(model.model)[0].module, torch.randn(2, 5, 64)
    up = block.mlp.up_proj
    assert torch.equal(up(x), up(x))
    up.train()
    assert not torch.equal(up(x), up(x))
    with pytest.raises(ValueError, match="base_layer must have no bias, got one"):
        ways.Swapped(nn.Linear(2, 2), implementations.eager_linear, [], 0.0)


def test_peft_keeps_no_third_dtype():
    with pytest.raises(ValueError, match="adapter dtype must be float32 or the weights' for PEFT"):
        _build(_subject(), partial(ways.lora, rank=4), adapter=_adapter(torch.bfloat16))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # dynamo's own
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_compiled_way_is_right_and_stays_compiled():
    subject = _subject()
    check = BlockCheck(subject.model, subject.tokens(2, 8), _adapter())
    model = _build(subject, ways.registry(4, 3, CPU, True)["compiled"], (0,))
    harness.gate(Candidate("compiled", lambda: None, lambda: check.checks(model)))
    assert torch._dynamo.config.fail_on_recompile_limit_hit


# what a call costs


def test_operators_are_counted_inside_other_libraries_too():
    x, w = torch.randn(4, 4), torch.randn(4, 4)
    assert cost.launches(lambda: torch.relu(x.view(2, 8)), CPU) == (1, cost.OPERATORS)
    assert cost.launches(lambda: torch.relu(x.T @ w), CPU)[0] == 2
    problem = Problem.draw((33, 48, 17), Adapter(4, 3), torch.float32, CPU)
    floe, frozen = implementations.floe(problem), implementations.frozen(problem)
    assert cost.launches(lambda: frozen.forward(problem.x), CPU)[0] == 1
    assert cost.launches(lambda: floe.forward(problem.x), CPU)[0] > 1
    assert torch.equal(floe.forward(problem.x), floe.forward(problem.x))


def test_saved_bytes_leave_parameters_out_and_count_shared_memory_once():
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    product = lambda: nn.functional.linear(x, w)  # noqa: E731
    assert cost.saved_bytes(product, [w]) == x.nbytes
    assert cost.saved_bytes(product, [w, x]) == 0
    assert (
        cost.saved_bytes(lambda: product() + nn.functional.linear(x[:4], w).sum(), [w]) == x.nbytes
    )


def test_peak_memory_is_the_rise_during_the_call():
    rise, kind = cost.peak_bytes(lambda: torch.ones(64, 1 << 18), CPU)
    assert rise >= 0.9 * (64 << 20)
    assert kind.startswith("resident set")


# timing


def test_the_slope_is_taken_round_by_round():
    # 10 + 2 n ms in the first round, thrice that on a machine that slows down
    seconds = [[1e-3 * (10 + 2 * n), 3e-3 * (10 + 2 * n)] for n in (0, 1, 4)]
    found = harness.slope([0, 1, 4], seconds)
    assert (found["p20"], found["p80"], found["n"]) == (pytest.approx(2.0), pytest.approx(6.0), 2)
    with pytest.raises(ValueError, match=r"two different numbers of layers, got \[3, 3\]"):
        harness.slope([3, 3], [[1.0], [1.0]])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_trains_the_adapter_and_notes_every_phase(checkpointing):
    subject, now = _subject(), iter(range(100))
    tokens = subject.tokens(2, 8)
    model = _build(subject, ways.routed, (1,), _adapter(dropout=0.25))
    model.model.train()
    step = training.Step(model, tokens, 3, lambda: float(next(now)), checkpointing)
    before = [value.detach().clone() for value in model.parameters]
    weight = subject.model.lm_head.weight.clone()
    step()
    step()
    assert step.laps == [(1.0, 1.0, 1.0)] * 2
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters, strict=True))
    assert torch.equal(weight, subject.model.lm_head.weight)
    exact = subject.model(input_ids=tokens).logits[:, -4:-1].log_softmax(-1)
    wanted = -exact.gather(2, tokens[:, -3:, None]).mean()
    frozen = training.Step(_build(subject, ways.frozen, ()), tokens, 3, lambda: 0.0, checkpointing)
    assert float(frozen.loss().detach()) == pytest.approx(float(wanted), rel=1e-5)
    frozen()  # nothing to train, but a backward all the same


# the command


def test_latency_prints_every_table_and_writes_records_and_a_picture(tmp_path, capsys, monkeypatch):
    file, picture, drawn = tmp_path / "latency.json", tmp_path / "latency.png", []
    monkeypatch.setattr(plot, "draw", lambda *files: drawn.append(files))
    command = "--table all --scale tiny --dtype float32 --rank 2 --experts 3 --dropout 0.25"
    command += f" --only floe,peft,hydra --rounds 2 --json {file} --plot {picture}"
    latency.main(command.split())
    printed = capsys.readouterr().out
    assert "scale: tiny. Checked against float64 before timing" in printed
    assert printed.count("the paper's figures, not ours; hardware not stated") == 2
    data = json.loads(file.read_text())
    rows = {
        (r["case"]["table"], r["case"]["what"], r["case"]["implementation"]): r
        for r in data["rows"]
    }
    peers = ["floe", "peft r=2", "peft r=6", "hydra"]
    tables = {"4": ("prefill", "decode"), "5": ("training step",), "op": ("forward",)}
    for table, parts in tables.items():
        for what in parts:
            names = [name for t, w, name in rows if (t, w) == (table, what)]
            sets = {"4": ("1 of 2", "2 of 2"), "5": ("all 2", "1 of 2")}.get(table)
            expected = [f"{way}, {s}" for s in sets for way in peers] if sets else peers
            assert names == ["frozen", *expected]
    for row in data["rows"]:
        assert row["case"]["scale"] == "tiny"
        assert {"cpu", "torch", "commit", "dirty"} <= set(row["environment"])
        assert row["milliseconds"]["n"] == 2
        assert 0.0 < row["relative_error"] < 1e-5
        assert row["launches"] > 0
        assert row["peak_bytes"] >= 0
    step = rows["5", "training step", "hydra, all 2"]
    assert set(step["phases_ms"]) == {"forward", "backward", "optimiser"}
    phases = sum(phase["median"] for phase in step["phases_ms"].values())
    assert phases == pytest.approx(step["milliseconds"]["median"], rel=0.5)
    floe = rows["5", "training step", "floe, all 2"]
    assert floe["saved_bytes"] < step["saved_bytes"]
    assert set(floe["ratio_to_way"]) == {"peft r=2", "peft r=6", "hydra"}
    assert floe["trained_parameters"] == step["trained_parameters"]
    assert [fit["case"]["way"] for fit in data["fits"]] == peers * 2
    assert all(math.isfinite(fit["milliseconds_per_layer"]["median"]) for fit in data["fits"])
    assert [gain["case"]["way"] for gain in data["gains"]] == peers
    assert data["paper"]["note"] == paper.NOTE
    assert drawn == [(file, picture)]
    monkeypatch.undo()
    plot.main([str(file), str(picture)])
    assert picture.stat().st_size > 10_000


def test_one_set_of_layers_and_given_counts_can_be_timed_alone(tmp_path, capsys):
    file = tmp_path / "latency.json"
    common = f"--scale tiny --dtype float32 --only hydra --rounds 1 --dropout 0 --json {file}"
    latency.main(["--table", "5", "--sets", "all", *common.split()])
    data = json.loads(file.read_text())
    assert [r["case"]["implementation"] for r in data["rows"]] == ["frozen", "hydra, all 2"]
    assert data["gains"] == []
    latency.main(["--table", "4", "--counts", "2", "--what", "decode", *common.split()])
    data = json.loads(file.read_text())
    assert [r["case"]["implementation"] for r in data["rows"]] == ["frozen", "hydra, 2 of 2"]
    capsys.readouterr()


def test_what_a_run_spent_before_its_training_is_read_from_its_folder(tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    for stage in ("search", "score", "select", "train/main"):
        write = lambda folder: (folder / "result.json").write_text('{"trials": [1, 2]}')  # noqa: E731
        run.make(Stage(stage, {}, write))
    for stage, seconds in (("search", 30.0), ("score", 5.0), ("select", 2.0), ("train/main", 90.0)):
        done = run.path / stage / "DONE.json"
        done.write_text(json.dumps({**json.loads(done.read_text()), "seconds": seconds}))
    spent = training.preparation(run.path)
    assert (spent["trials"], spent["before_training"]) == (2, 37.0)
    assert "train/all" not in spent["seconds"]
    print(latency._spent(spent))
    assert "(search of 2 trials)" in capsys.readouterr().out
    (run.path / "score" / "DONE.json").unlink()
    with pytest.raises(ValueError, match="must hold the finished stage 'score', got"):
        training.preparation(run.path)
    (run.path / "search" / "DONE.json").write_text("{")
    with pytest.raises(FileError):
        training.preparation(run.path)


def test_the_scale_is_called_full_only_where_it_is():
    def scale(text):
        return options.parse(["--table", "4", *text.split()]).scale

    assert scale("--device cuda") == "full"
    assert scale("--device cuda --batch 4") == "reduced"
    assert scale("--device cpu") == scale("--device cpu --scale full") == "reduced"
    assert scale("--scale tiny --tokens 9") == "tiny"


def test_options_that_cannot_be_are_refused(capsys):
    for text, message in {
        "--plot a.png": "needs --json",
        "--models gpt": "got 'gpt'",
        "--batch 0": "got '0'",
        "--what sleep": "got 'sleep'",
        "--scale tiny --answer-tokens 8": "must be in [1, tokens - 1] = [1, 7], got 8",
    }.items():
        with pytest.raises(SystemExit):
            options.parse(["--table", "5", *text.split()])
        assert message in capsys.readouterr().err
    for text, message in {
        "--table 4 --counts 1,3": r"counts must be <= 2 for tiny, got \[1, 3\]",
        "--table 5 --layers 2": r"layers must be in \[0, 1\] for tiny, got \[2\]",
    }.items():
        with pytest.raises(ValueError, match=message):
            latency.main(["--scale", "tiny", *text.split()])
    with pytest.raises(ValueError, match=r"--only must name some of .* got \['nobody'\]"):
        latency.main(["--table", "op", "--scale", "tiny", "--only", "nobody"])


def test_the_papers_figures_agree_with_each_other():
    llama = paper.TABLE_4["LLaMA3.1-8B"]
    assert llama["28"] - llama[paper.SINGLE] == pytest.approx(462.78)  # printed as the difference
    assert [full is None for full, _, _ in paper.TABLE_5.values()] == [False, True, False, False]
    saved = [-3527.18, None, -3118.61, -28767.89]  # printed beside the totals
    for (full, selected, selection), printed in zip(paper.TABLE_5.values(), saved, strict=True):
        if full is not None:
            assert selected + selection - full == pytest.approx(printed, abs=0.005)


def test_a_plot_needs_records(tmp_path):
    file = tmp_path / "empty.json"
    file.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="must hold at least one record"):
        plot.draw(file, tmp_path / "picture.png")


def test_an_adapted_linear_joins_its_parameters_to_the_formulas():
    subject = _subject()
    model = _build(subject, ways.hydra, (0,))
    path, adapted = next(iter(model.linears.items()))
    linear = subject.model.get_submodule(path)
    wanted = adapted.numbers(path, linear, _adapter())
    joined = adapted.joined([p.detach() for p in adapted.parameters])
    assert all(map(torch.equal, joined, wanted))
    lora = AdaptedLinear("lora", (wanted[0],))
    assert lora.numbers(path, linear, _adapter())[1].shape == (64, 7)
