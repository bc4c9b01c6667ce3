import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: an installed floe stays first

from benchmarks import fisher, harness, implementations, kernels
from benchmarks.harness import Candidate, Check, WrongResult
from benchmarks.implementations import Adapter, Problem, registry

CPU = torch.device("cpu")


def _problem(dropout=0.0, dtype=torch.float32, adapter_dtype=None):
    return Problem.draw((33, 48, 17), Adapter(4, 3, dropout, adapter_dtype or dtype), dtype, CPU)


def _candidate(name, run=lambda: None, error=0.0):
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    check = Check("y", exact * (1 + error), exact, exact.float())
    return Candidate(name, run, lambda: [check])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_every_implementation_computes_its_formula(dtype, backward):
    problem = _problem(dtype=dtype)
    found = implementations.candidates(problem, registry(problem), backward)
    assert [c.name for c in found] == ["frozen", "floe", "peft r=4", "peft r=12", "eager", "hydra"]
    for candidate in found:
        assert 0.0 < harness.gate(candidate) < (1e-5 if dtype == torch.float32 else 0.02)
        candidate.run()


def test_an_adapter_in_float32_beside_a_bfloat16_base_passes_too():
    problem = _problem(dropout=0.25, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    for candidate in implementations.candidates(problem, registry(problem), backward=True):
        assert 0.0 < harness.gate(candidate) < 0.02
        candidate.run()


def _without_an_expert(problem):
    built = implementations.hydra(problem)
    with torch.no_grad():
        dropped = problem.expand.clone()
        dropped[:, 1] = 0.0
    wrong = implementations.hydra(replace(problem, expand=dropped))
    return replace(built, forward=wrong.forward, parameters=wrong.parameters)


def _with_a_wrong_gradient(problem):
    built = implementations.eager(problem)
    half = lambda x: built.forward(x * 0.5 + x.detach() * 0.5)  # noqa: E731
    return replace(built, forward=half)


@pytest.mark.parametrize(
    ("build", "output"), [(_without_an_expert, "y"), (_with_a_wrong_gradient, "grad_x")]
)
def test_a_wrong_implementation_is_refused_before_anything_is_timed(build, output):
    problem = _problem()
    truth = implementations.floe(problem)
    known = implementations._Truths(problem)
    known.checks(lambda p: truth)  # fixes the routed formula's truth for these parameters
    wrong = Candidate("wrong", lambda: pytest.fail("timed"), lambda: known.checks(build))
    with pytest.raises(WrongResult, match=rf"wrong: {output} has relative error .*not timed"):
        harness.measure([wrong], rounds=1, device=CPU)


def test_the_gate_refuses_nan_and_other_shapes():
    exact = torch.ones(2, dtype=torch.float64)
    for actual, text in ((torch.tensor([1.0, float("nan")]), "inf"), (torch.ones(3), "shape")):
        check = Check("y", actual, exact, exact.float())
        with pytest.raises(WrongResult, match=text):
            harness.gate(Candidate("c", lambda: None, lambda c=check: [c]))


def test_the_gate_allows_four_times_torchs_error_or_one_rounding():
    assert harness.gate(_candidate("a", error=5e-8)) == pytest.approx(5e-8)
    with pytest.raises(WrongResult, match=r"allowed 5\.96e-08"):
        harness.gate(_candidate("a", error=6.5e-8))
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)

    def candidate(error):
        check = Check("y", exact * (1 + error), exact, (exact * (1 + 1e-3)).float())
        return Candidate("b", lambda: None, lambda: [check])

    assert harness.gate(candidate(3.9e-3)) == pytest.approx(3.9e-3)
    with pytest.raises(WrongResult, match=r"allowed 0\.004"):
        harness.gate(candidate(4.1e-3))


def test_measure_interleaves_in_changing_order_and_keeps_rounds_together():
    calls, now = [], [0.0]

    def candidate(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds

        return _candidate(name, run)

    found = [candidate("frozen", 1.0), candidate("slow", 3.0), candidate("fast", 0.5)]
    seconds, errors = harness.measure(found, rounds=12, device=CPU, warmup=1, clock=lambda: now[0])
    assert errors == {"frozen": 0.0, "slow": 0.0, "fast": 0.0}
    assert calls[:3] == ["frozen", "slow", "fast"]  # warm-up
    rounds = [tuple(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert len(rounds) == 12
    assert all(sorted(one) == ["fast", "frozen", "slow"] for one in rounds)
    assert len(set(rounds)) > 2
    assert seconds == {"frozen": [1.0] * 12, "slow": [3.0] * 12, "fast": [0.5] * 12}
    with pytest.raises(ValueError, match="different names"):
        harness.measure([found[0], found[0]], rounds=1, device=CPU)
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        harness.measure(found, rounds=0, device=CPU)


def test_ratios_are_taken_within_rounds():
    # a machine that slows down tenfold half-way leaves the ratio alone
    baseline, own = [1.0, 1.0, 1.0, 10.0, 10.0], [2.0, 2.0, 2.0, 20.0, 20.0]
    found = harness.ratios(own, baseline)
    assert (found["median"], found["p20"], found["p80"], found["of_minima"]) == (2.0, 2.0, 2.0, 2.0)
    assert harness.summary(range(1, 12)) == {"median": 6, "p20": 3, "p80": 9, "min": 1, "n": 11}


def test_kernels_prints_a_table_and_writes_records(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    options = "--dtype bf16 --shapes 32x48x16 --rank 2 --experts 2 --dropout 0,0.25 --rounds 2"
    kernels.main([*options.split(), "--json", str(file)])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(("floe", "hydra"))]
    assert len(lines) == 2 * 2 * 2
    assert len({len(line) for line in lines[:4]}) == 1  # aligned
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 * 2 * 6
    for row in rows:
        assert row["case"]["scale"] == "reduced"
        assert {"cpu", "torch", "commit", "dirty", "torch_threads", "time"} <= set(
            row["environment"]
        )
        assert row["milliseconds"]["n"] == 2
        assert row["milliseconds"]["min"] > 0
        assert row["ratio"]["to"] == "frozen"
        if row["case"]["implementation"] == "frozen":
            assert row["ratio"]["median"] == 1.0
        assert row["launches"] > 0
        assert row["peak_bytes"] >= 0
        assert ("saved_bytes" in row) == (row["case"]["what"] == "forward+backward")


def test_fisher_prints_a_table_and_writes_records(tmp_path, capsys):
    file = tmp_path / "fisher.json"
    fisher.main(f"--shapes 2x70x64x16,1x5x6x1 --rounds 2 --json {file}".split())
    assert capsys.readouterr().out.count("floe accumulate_fisher_") == 2
    rows = json.loads(file.read_text())["rows"]
    names = [row["case"]["implementation"] for row in rows[:6]]
    assert names[0] == "copy"
    assert "torch bfloat16" in names
    error = {row["case"]["implementation"]: row["relative_error"] for row in rows[:6]}
    assert error["floe mask_gradients"] < 1e-6 < 1e-3 < error["torch bfloat16"]


def test_a_wrong_fisher_formula_is_refused(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(2, 9, 8, generator=generator) for _ in range(2))
    monkeypatch.setattr(
        fisher.ops, "mask_gradients", lambda a, g, n: (a * g).mean(1).unflatten(1, (-1, n)).sum(2)
    )
    with pytest.raises(WrongResult, match="floe mask_gradients: result has relative error"):
        harness.measure(fisher.candidates(fisher.Site(a, g, 2)), rounds=1, device=CPU)


def test_processor_time_is_for_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    options = harness.Timing(device="cpu", clock="processor")
    with pytest.raises(ValueError, match="--clock processor needs --device cpu and --threads 1"):
        harness.prepare(options, None)


@pytest.mark.parametrize(
    ("module", "shape"), [(kernels, "32x48"), (kernels, "0x1x1"), (fisher, "1x2x7x2")]
)
def test_shapes_are_checked(module, shape, capsys):
    with pytest.raises(SystemExit):
        module.main(["--shapes", shape])
    assert f"got '{shape}'" in capsys.readouterr().err
