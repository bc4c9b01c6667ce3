import json

import pytest
import torch
from helpers import budget as rule

from floe import doctor, ops, selfcheck
from floe.doctor import auto_dtype, diagnose
from floe.selfcheck import Result, error_budget, relative_error, selftest


@pytest.fixture
def small(monkeypatch):
    """Enough cases to see a fault of each operator."""
    monkeypatch.setattr(selfcheck, "_TOKENS", (17,))
    monkeypatch.setattr(selfcheck, "_SHAPES", ((130, 96, 8, 4),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [2.0, 4.0])
@pytest.mark.parametrize("torchs_error", [0.0, 0.01])
def test_the_error_budget_is_a_multiple_of_torchs_error_or_one_rounding(
    dtype, factor, torchs_error
):
    exact = torch.tensor([3.0, -4.0], dtype=torch.float64)  # norm 5
    torchs = (exact + torch.tensor([5 * torchs_error, 0.0])).to(dtype)
    error = relative_error(torchs, exact)
    allowed = error_budget(torchs, exact, factor=factor)
    assert allowed == max(factor * error, torch.finfo(dtype).eps / 2)
    assert (allowed == factor * error) == (torchs_error > 0.0)
    below, above = (exact + torch.tensor([5 * allowed * f, 0.0]) for f in (0.99, 1.01))
    if factor == 2.0:  # what tests ask of a kernel
        rule.assert_within_budget(below, torchs.double(), exact, rounded_to=dtype)
        with pytest.raises(AssertionError, match="allowed"):
            rule.assert_within_budget(above, torchs.double(), exact, rounded_to=dtype)


def test_error_budget_of_empty_results_and_other_dtypes():
    empty = torch.zeros(0, 3, dtype=torch.float64)
    assert error_budget(empty.float(), empty) == 0.0
    assert error_budget(torch.ones(1), torch.ones(1).double(), torch.float16) == 2.0**-11


def test_relative_error_of_other_shapes_and_nan_is_infinite():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.zeros(3), exact) == float("inf")
    assert relative_error(torch.tensor([3.0, float("nan")]), exact) == float("inf")
    assert relative_error(torch.tensor([3.0, 3.5]), exact) == 0.1


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_dtype_on_cpu_follows_the_instructions(monkeypatch, flags, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert auto_dtype("cpu") == dtype


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((10, 0), torch.bfloat16)],
)
def test_auto_dtype_on_cuda_follows_the_capability(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert auto_dtype(torch.device("cuda", 0)) == dtype


def test_auto_dtype_refuses_other_devices():
    with pytest.raises(ValueError, match="device must be a cpu or cuda device, got meta"):
        auto_dtype("meta")


def test_diagnose_is_json_and_names_every_operator():
    facts = diagnose()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["torch"] == torch.__version__
    assert facts["memory_bytes"]["total"] > 0
    assert facts["auto_dtype"]["cpu"] == str(auto_dtype("cpu")).removeprefix("torch.")
    assert facts["native"]["_ops"] == {"loads": True}
    assert facts["native"]["_native"]["build"]["compiler"]
    paths = {entry["op"]: entry for entry in facts["ops"] if entry["device"] == "cpu"}
    assert paths["mask_gradients"]["path"] == paths["accumulate_fisher_"]["path"] == "native CPU"
    assert paths["keyed_dropout"]["path"] == paths["moe_lora_forward"]["path"] == "native C++"
    assert paths["mask solvers"]["path"] == "native C++"
    assert set(paths) > {"moe_lora_forward", "moe_lora_backward"}
    assert all(entry["why"] for entry in facts["ops"])


def test_describe_says_what_diagnose_found():
    facts = diagnose()
    text = doctor.describe(facts)
    for entry in facts["ops"]:
        assert f"{entry['op']} on {entry['device']}: {entry['path']} ({entry['why']})" in text
    assert f"torch {torch.__version__}" in text
    assert f"dtype auto on cpu: {facts['auto_dtype']['cpu']}" in text
    facts["native"]["_native"] = {"loads": False, "error": "undefined symbol: xyz"}
    facts["gpus"] = [{"name": "H200", "capability": "9.0", "memory_bytes": 2**30}]
    text = doctor.describe(facts)
    assert "floe._native: undefined symbol: xyz" in text
    assert "gpu: H200, capability 9.0, 1.0 GiB" in text


def test_results_are_json_whatever_the_error():
    fields = ("moe_lora", "y", "cpu", "torch.float32", "T=1")
    good, bad = (
        Result(*fields, 0.5, 1.0),
        Result(*fields, float("inf"), 0.0, "raised"),
    )
    found = json.loads(json.dumps([good.as_dict(), bad.as_dict()], allow_nan=False))
    assert [(one["error"], one["passed"]) for one in found] == [(0.5, True), (None, False)]
    assert found[1]["note"] == "raised"


def test_diagnose_reports_a_native_module_that_does_not_load(monkeypatch):
    real = doctor.importlib.import_module

    def missing(name):
        if name == "floe._native":
            raise ImportError("undefined symbol: xyz")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", missing)
    facts = diagnose()
    assert facts["native"]["_native"] == {"loads": False, "error": "undefined symbol: xyz"}
    solvers = next(entry for entry in facts["ops"] if entry["op"] == "mask solvers")
    assert (solvers["path"], solvers["why"]) == ("none", "undefined symbol: xyz")


def test_selftest_passes_here_and_reports_progress():
    seen = []
    results = selftest("cpu", lambda done, total, worst: seen.append((done, total, worst.passed)))
    assert [str(result) for result in results if not result.passed] == []
    assert [done for done, _, _ in seen] == list(range(1, seen[-1][1] + 1))
    assert {result.op for result in results} == {
        "moe_lora",
        "moe_lora_add",
        "moe_lora_group",
        "keyed_dropout",
        "mask_gradients",
        "accumulate_fisher_",
        "solve_mask",
        "solve_two_class",
    }
    assert {result.dtype for result in results} >= {
        "torch.float32",
        "torch.float16",
        "torch.bfloat16",
    }


def _without_last_expert(x, weight, bias, shrink, expand, **settings):
    expand = torch.cat([expand[:, :-1], torch.zeros_like(expand[:, -1:])], dim=1)
    return REAL["moe_lora"](x, weight, bias, shrink, expand, **settings)


def _rounded_to_half(base, *rest, **settings):
    return REAL["moe_lora_add"](base, *rest, **settings).half().to(base.dtype)


def _other_dropout(x, p, seed):
    return REAL["keyed_dropout"](x, p, seed + 1)


def _without_last_token(activation, gradient, group_size, token_mask=None):
    mask = token_mask if token_mask is None else token_mask[:, :-1]
    return REAL["mask_gradients"](activation[:, :-1], gradient[:, :-1], group_size, mask)


def _without_scale(fisher, activation, gradient, group_size, token_mask=None, sample_scale=None):
    return REAL["accumulate_fisher_"](fisher, activation, gradient, group_size, token_mask)


FAULTS = {
    "moe_lora": _without_last_expert,
    "moe_lora_add": _rounded_to_half,
    "keyed_dropout": _other_dropout,
    "mask_gradients": _without_last_token,
    "accumulate_fisher_": _without_scale,
}
REAL = {name: getattr(ops, name) for name in FAULTS}


@pytest.mark.parametrize("name", FAULTS)
def test_selftest_names_the_faulty_operator(monkeypatch, small, name):
    monkeypatch.setattr(ops, name, FAULTS[name])
    wrong = [result for result in selftest("cpu") if not result.passed]
    assert {result.op for result in wrong} == {name}
    for result in wrong:
        for part in (
            name,
            result.dtype,
            result.shape,
            f"{result.error:.3g}",
            f"{result.budget:.3g}",
        ):
            assert part in str(result)


def test_selftest_reports_an_operator_that_raises(monkeypatch, small):
    def broken(*args):
        raise RuntimeError("kernel launch failed")

    monkeypatch.setattr(ops, "mask_gradients", broken)
    wrong = [result for result in selftest("cpu") if not result.passed]
    assert {result.op for result in wrong} == {"mask_gradients"}
    assert all(result.note == "RuntimeError: kernel launch failed" for result in wrong)


def test_selftest_sees_a_solver_that_is_not_optimal_or_over_budget(monkeypatch, small):
    real = selfcheck.solve_mask
    monkeypatch.setattr(selfcheck, "solve_mask", lambda v, c, b: real(v, c, b / 2))
    wrong = [result for result in selftest("cpu") if not result.passed]
    assert {(result.op, result.output) for result in wrong} == {("solve_mask", "lost value")}
    monkeypatch.setattr(selfcheck, "solve_mask", lambda v, c, b: real(v, c, b * 1.5))
    wrong = [result for result in selftest("cpu") if not result.passed]
    assert ("solve_mask", "excess cost") in {(result.op, result.output) for result in wrong}
