"""The benchmark of each kernel alone repeats what one call launched."""

import sys
from pathlib import Path

import torch
from floe_triton import launch

sys.path.append(str(Path(__file__).resolve().parents[3]))

from benchmarks import harness, kernels
from benchmarks.implementations import Adapter, Problem


def test_every_launch_is_repeated_and_counted():
    problem = Problem.draw((64, 48, 40), Adapter(4, 3, 0.25), torch.float32, torch.device("cpu"))
    rows = kernels.per_kernel(problem, "gemm", rounds=1)
    names = [row["kernel"].split()[1] for row in rows]
    assert names[0] == "shrink_kernel"
    assert {"expand_kernel", "grad_x_kernel", "grad_y_kernel"} <= set(names)
    assert all(row["gigabytes_per_second"] > 0 for row in rows)
    assert "shrink_kernel" in harness.show(rows, kernels.PER_KERNEL)


def test_a_repeated_launch_gives_the_same_bits():
    x, seed = torch.randn(20, 64), torch.tensor(5)
    from floe_triton.kernels.dropout import dropout

    with launch.watching() as launches:
        first = dropout(x, 0.5, seed).clone()
    (one,) = launches
    one.arguments["out"].zero_()
    launch.relaunch(one)
    assert torch.equal(one.arguments["out"], first)
