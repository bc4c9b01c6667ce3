"""The one door to the GPU: which devices have one, and every Triton kernel's launch or record.

Recording turns the launchers into a description of what they would do on a named GPU: on tensors
of the ``meta`` device nothing is computed, and each call leaves a `Launch`. The static checks
compile exactly those, and the roofline counts exactly their bytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

LEAST_CAPABILITY = 80  # bfloat16 products and asynchronous copies

# Streaming multiprocessors of a usual part of each architecture, for what is not running on one.
_MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


def runs_triton(device: torch.device) -> bool:
    """Whether the kernels run on ``device``: an NVIDIA GPU of capability 8.0 or newer."""
    return obstacle(device) is None


def obstacle(device: torch.device) -> str | None:
    """Why the kernels do not run on ``device``; None if they do. Touches no GPU's memory."""
    if not _triton_installed():
        return "needs the package triton, which is not installed"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, got device {device}"
    index = device.index if device.index is not None else torch.cuda.current_device()
    capability = _properties(index).capability
    if capability < LEAST_CAPABILITY:
        least = LEAST_CAPABILITY / 10
        return f"needs compute capability {least} or newer, got {capability / 10} on {device}"
    return None


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Device:
    """What block sizes depend on.

    ``capability`` is 10 * major + minor (90 for sm_90), 0 for Triton's interpreter.
    """

    capability: int
    multiprocessors: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch: ``kernel[grid](**arguments, **constants)``.

    ``flops`` counts multiplications and additions of products. Each tensor among ``arguments`` is
    read or written once, by design of the kernels.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    device: Device
    flops: int = 0
    registers: int | None = None

    @property
    def blocks(self) -> Blocks:
        """How it is cut, beside its ``constants``."""
        return Blocks({}, self.num_warps, self.num_stages, self.registers)

    @property
    def bytes(self) -> int:
        """Memory traffic if every tensor is moved once."""
        tensors = [a for a in self.arguments.values() if isinstance(a, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class _State:
    assumed: Device | None = None
    launches: list[Launch] | None = None
    runs: bool = True  # whether what is recorded is launched as well


_state = _State()


@dataclass(frozen=True)
class Blocks:
    """How a launch is cut: block sizes and the like by name, warps, pipeline stages.

    ``registers`` is what a thread may take. None lets the assembler aim at a number of blocks that
    share a multiprocessor, for which it spills a few bytes where that is one register short.
    """

    constants: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told at a launch, by its own names."""
        told = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return told if self.registers is None else {**told, "maxnreg": self.registers}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    blocks: Blocks,
    flops: int = 0,
) -> None:
    """Launch ``kernel`` on the device of its tensors (or record the launch).

    ``constants`` are the kernel's compile-time arguments beside those of ``blocks``. A grid with a
    zero is no launch.
    """
    if 0 in grid:
        return
    constants = {**constants, **blocks.constants}
    first = next(a for a in arguments.values() if isinstance(a, Tensor))
    if _state.launches is not None:
        device = device_of(first)
        cut = (blocks.num_warps, blocks.num_stages, device, flops, blocks.registers)
        _state.launches.append(Launch(kernel, grid, dict(arguments), constants, *cut))
    if not _state.runs:
        return
    # Triton launches on the current device, which need not be the tensors'
    elsewhere = first.is_cuda and first.get_device() != torch.cuda.current_device()
    with torch.cuda.device(first.device) if elsewhere else nullcontext():
        kernel[grid](**arguments, **constants, **blocks.options, enable_fp_fusion=True)


def device_of(tensor: Tensor) -> Device:
    """The device block sizes are to be chosen for."""
    if _state.assumed is not None:
        return _state.assumed
    return _properties(tensor.get_device()) if tensor.is_cuda else Device(0, 1)


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, so that they take CPU tensors.

    ``TRITON_INTERPRET=1`` when this package's kernels are first imported decides.
    """
    import triton

    return bool(triton.knobs.runtime.interpret)


@contextmanager
def assume(capability: int, multiprocessors: int | None = None) -> Iterator[Device]:
    """Within it, block sizes are those of the named GPU, whatever the tensors are on."""
    before = _state.assumed
    count = multiprocessors or _MULTIPROCESSORS.get(capability, 108)
    _state.assumed = Device(capability, count)
    try:
        yield _state.assumed
    finally:
        _state.assumed = before


@contextmanager
def recording(capability: int, multiprocessors: int | None = None) -> Iterator[list[Launch]]:
    """Within it, launches are only recorded, for the named GPU; tensors may be on ``meta``."""
    before = _state.launches, _state.runs
    _state.launches, _state.runs = [], False
    try:
        with assume(capability, multiprocessors):
            yield _state.launches
    finally:
        _state.launches, _state.runs = before


@contextmanager
def watching() -> Iterator[list[Launch]]:
    """Within it, launches are recorded and run; :func:`relaunch` repeats one."""
    before = _state.launches
    _state.launches = []
    try:
        yield _state.launches
    finally:
        _state.launches = before


def relaunch(recorded: Launch) -> None:
    """Launch what was recorded once more, on the same tensors."""
    launch(recorded.kernel, recorded.grid, recorded.arguments, recorded.constants, recorded.blocks)


@cache
def _properties(index: int) -> Device:
    gpu = torch.cuda.get_device_properties(index)
    return Device(10 * gpu.major + gpu.minor, gpu.multi_processor_count)
