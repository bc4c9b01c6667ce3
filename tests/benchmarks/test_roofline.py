"""The roofline's bookkeeping: what counts as a step, as traffic, and as a workspace."""

import json

import pytest
import torch
from floe_triton import launch

from benchmarks import roofline
from benchmarks.roofline import DEVICES, Layer, Pass, Recorder, Setting, Step, size

SETTING = Setting(tokens=256, rank=8, experts=4, dropout=0.05, backend="fused")
LAYER = Layer("linear", 512, 1024)


def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(roofline, "_issue_time", lambda step: 0.0)


def test_views_and_allocations_are_no_steps_and_products_count_their_flops():
    x, weight, z = bf16(32, 64), bf16(48, 64), bf16(32, 8)
    with Recorder([]) as recorder:
        y = torch.mm(z, bf16(48, 8).T)
        y.addmm_(x, weight.T)
        torch.empty_like(y).view(48, 32)
        y.split(16)[0].float()
    names = [step.name for step in recorder.steps]
    assert names == ["mm", "addmm_", "_to_copy"]
    assert [step.flops for step in recorder.steps] == [2 * 32 * 8 * 48, 2 * 32 * 64 * 48, 0]
    bytes_of = [sum(map(size, step.tensors)) for step in recorder.steps]
    assert bytes_of[0] == 2 * (32 * 8 + 48 * 8 + 32 * 48)
    assert bytes_of[1] == 2 * (2 * 32 * 48 + 32 * 64 + 48 * 64)  # y is read and written
    assert bytes_of[2] == 16 * 48 * (2 + 4)


def test_launches_stand_between_the_library_calls_around_them():
    a = bf16(16, 16)

    def kernel():
        """Stands for a Triton kernel: recording does not look into it."""

    with launch.recording(90) as launches, Recorder(launches) as recorder:
        torch.mm(a, a)
        launch.launch(kernel, (1,), {"x": a, "T": 16}, {}, launch.Blocks(), flops=7)
        torch.mm(a, a)
        recorder.take_launches()
    assert [(step.name, step.flops) for step in recorder.steps] == [
        ("mm", 2 * 16**3),
        ("kernel", 7),
        ("mm", 2 * 16**3),
    ]


def test_a_bound_is_the_longest_of_arithmetic_and_memory():
    device, x = DEVICES["h100"], bf16(1000, 1000)
    slow, fast = Step("a", 0, (x,)), Step("b", 10**15, (x,))
    bounds = Pass([slow, fast], [x]).bounds(device, workspaces_are_free=True)
    assert [bound.seconds for bound in bounds] == pytest.approx([2e6 / 3.35e12, 1e15 / 989.4e12])


def test_only_small_workspaces_soon_read_again_are_free():
    kept, near, far, large = bf16(10), bf16(20), bf16(40), bf16(20, 2**20)
    steps = [
        Step("write", 0, (kept, near, far, large)),
        Step("read", 0, (kept, near, large)),
        Step("other", 0, (kept,)),
        Step("late", 0, (kept, far)),
    ]
    one = Pass(steps, [kept])
    bounds = one.bounds(DEVICES["h100"], workspaces_are_free=True)
    assert [bound.bytes for bound in bounds] == [100 + 40 * 2**20, 20 + 40 * 2**20, 20, 100]
    everything = one.bounds(DEVICES["h100"], workspaces_are_free=False)
    assert [bound.bytes for bound in everything] == [140 + 40 * 2**20, 60 + 40 * 2**20, 20, 100]


@pytest.mark.parametrize("backend", ["gemm", "fused"])
def test_both_passes_hold_the_frozen_products(backend):
    found = roofline.passes(LAYER, Setting(256, 8, 4, 0.05, backend), DEVICES["h100"])
    product = 2 * 256 * 512 * 1024
    for what in ("forward", "backward"):
        assert sum(step.flops for step in found[f"frozen {what}"].steps) == product
        flops = sum(step.flops for step in found[f"floe {what}"].steps)
        assert product < flops < 1.2 * product
    kernels = [step.name for step in found["floe forward"].steps]
    assert ("fused_linear_kernel" in kernels) == (backend == "fused")
    assert ("addmm_" in kernels) == (backend == "gemm")


def test_the_table_says_on_every_line_that_it_is_an_estimate(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(roofline.SHAPES, "4096 -> 4096", (LAYER,))
    file = tmp_path / "rows.json"
    arguments = ["--shapes", "4096 -> 4096", "--tokens", "256", "--steps", "--json", str(file)]
    roofline.main(arguments)
    text = capsys.readouterr().out
    assert text.startswith("ESTIMATE")
    assert text.count("ESTIMATE") >= 1 + 1 + 4  # the note, the table, each list of steps
    rows = json.loads(file.read_text())
    assert all(row["estimate"] for row in rows)
    assert {row["device"] for row in rows} == {"H100 SXM", "A100 SXM 80 GB"}
    with pytest.raises(SystemExit):
        roofline.main(["--device", "h200"])
    assert "must be of h100, a100" in capsys.readouterr().err
