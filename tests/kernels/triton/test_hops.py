"""From the adapted layer's forward to a kernel's launch: at most 8 calls through 6 files."""

import sys
from pathlib import Path

import floe_triton
import pytest
import torch
from torch import nn

import floe
from floe.adapters import MoELoRALinear
from floe.adapters.linear import AdapterSettings
from floe.adapters.shared_input import SharedInput, link

PACKAGES = [str(Path(package.__file__).parent) for package in (floe, floe_triton)]
CALLS, FILES = 8, 6
FORWARD = MoELoRALinear.forward.__code__
COLUMNS, FEATURES = 32, 16


def layer(rank):
    made = MoELoRALinear(nn.Linear(COLUMNS, FEATURES).requires_grad_(False))
    made.set_adapter("default")
    generator = torch.Generator().manual_seed(0)
    made.update_layer("default", AdapterSettings(rank, 4, 2.0, 0.1, "gemm"), generator)
    return made


class Block(nn.Module):
    """Two layers of one input."""

    def __init__(self, rank):
        super().__init__()
        self.first, self.second = layer(rank), layer(rank)
        self.first.shared = self.second.shared = SharedInput([self.first, self.second])
        link(self)

    def forward(self, x):
        return self.first(x), self.second(x)


def on_a_hooked_base(rank):
    made = layer(rank)
    made.base_layer.register_forward_hook(lambda *_: None)
    return made


def paths_to_kernels(call):
    """The frames of floe at each launch: from after the layer's forward to ``launch``."""
    found = []

    def watch(frame, event, argument):
        caller = frame.f_back
        if event != "call" or caller is None or caller.f_code.co_name != "launch":
            return
        if "triton" not in Path(frame.f_code.co_filename).parts:  # kernel[grid](...)
            return
        path = []
        while caller.f_code is not FORWARD:
            if caller.f_code.co_filename.startswith(tuple(PACKAGES)):
                path.append((caller.f_code.co_filename, caller.f_code.co_name))
            caller = caller.f_back
        found.append(path[::-1])

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


# decoding in two launches, and in three; all in kernels, and with the library's products
SETTINGS = [(4, 8, False), (4, 20, False), (20, 8, True), (20, 40, True)]


@pytest.mark.parametrize(("tokens", "rank", "trains"), SETTINGS)
@pytest.mark.parametrize("build", [layer, Block, on_a_hooked_base, "mixed"])
def test_eight_calls_through_six_files(build, tokens, rank, trains):
    model = (layer if build == "mixed" else build)(rank).train(trains)
    names = ["default", "__base__"] * (tokens // 2)
    arguments = {"adapter_names": names} if build == "mixed" else {}
    paths = paths_to_kernels(lambda: model(torch.randn(tokens, COLUMNS), **arguments))
    assert paths
    for path in paths:
        assert len(path) + 1 <= CALLS, path  # and the kernel's own
        files = {FORWARD.co_filename, *(file for file, _ in path)}
        assert len(files) <= FILES, files
        assert {Path(file).stem for file in files} >= {"functions", "gpu", "launch"}
