"""Estimates of issue time, from launches and reports made up by hand."""

from types import SimpleNamespace

import pytest
import torch
from floe_triton import launch
from floe_triton.aot import Report

from benchmarks.issue import PARTS, issue_time, issue_to_memory


def made_up(kernel, main_loop=128, outside=0, grid=(4,), **arguments):
    """A launch in tiles of [32, 64] by 8 warps, and its report."""
    blocks = {"BLOCK_T": 32, "BLOCK_K": 64}
    device = launch.Device(90, 132)
    made = launch.Launch(
        SimpleNamespace(__name__=kernel), grid, arguments, blocks, 8, 3, device, flops=0
    )
    return made, Report(64, 0, 0, {}, 0, 0, main_loop, outside, num_warps=8, capability=90)


def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def test_the_main_loop_is_held_against_the_bytes_it_streams():
    h100 = PARTS[90]
    bytes_per_second = h100.bandwidth / h100.multiprocessors
    issue = 128 * 8 / 4 / h100.clock
    x = bf16(128, 64)
    ratio = issue_to_memory(*made_up("shrink_kernel", x=x))
    assert ratio == pytest.approx(issue / (32 * 64 * 2 / bytes_per_second))
    both = issue_to_memory(*made_up("grad_x_kernel", x=x, grad_x=bf16(128, 64)))
    assert both == pytest.approx(ratio / 2)
    assert issue_to_memory(*made_up("grad_x_kernel", x=x, grad_x=None)) == pytest.approx(ratio)
    assert issue_to_memory(*made_up("shrink_kernel", x=x.float())) == pytest.approx(ratio / 2)


def test_the_whole_launch_adds_what_is_outside_the_loop():
    x = bf16(128, 640)  # 40 tiles
    instructions = (40 * 128 + 4 * 100) * 8
    seconds = instructions / (4 * PARTS[90].multiprocessors * PARTS[90].clock)
    assert issue_time(*made_up("shrink_kernel", outside=100, x=x)) == pytest.approx(seconds)


def test_a_kernel_that_memory_does_not_bind_has_no_figure():
    found = made_up("fused_linear_kernel", x=bf16(128, 64))
    assert issue_to_memory(*found) is None
    assert issue_time(*found) is None
