"""Whether a kernel's instructions hide behind its memory traffic: estimates, of usual GPUs.

A multiprocessor's schedulers issue one instruction each per clock, and its share of the memory's
bandwidth moves so many bytes per clock. A main loop that takes longer to issue than its bytes take
to move makes memory wait. The estimate is a lower bound: some instructions occupy their pipeline
longer than they take to issue.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from floe_triton.aot import Report
from floe_triton.launch import Launch
from torch import Tensor

SCHEDULERS = 4  # of a multiprocessor, on every architecture here


@dataclass(frozen=True)
class Part:
    """A usual GPU of an architecture, by its data sheet.

    ``clock`` is the boost clock in Hz, ``bandwidth`` the memory's in bytes per second.
    """

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float

    @property
    def bytes_per_clock(self) -> float:
        """What one multiprocessor's share of the bandwidth moves in a clock."""
        return self.bandwidth / self.multiprocessors / self.clock


PARTS = {
    80: Part("A100 SXM 80 GB", 108, 1.410e9, 2.039e12),
    86: Part("A40", 84, 1.740e9, 0.696e12),
    89: Part("GeForce RTX 4090", 128, 2.520e9, 1.008e12),
    90: Part("H100 SXM", 132, 1.755e9, 3.350e12),
    100: Part("B200", 148, 1.965e9, 8.000e12),
    120: Part("GeForce RTX 5090", 170, 2.407e9, 1.792e12),
}

# The [T, ...] arguments that a memory-bound kernel's main loop walks through, tile by tile; what
# else it touches is small enough to stay in a cache.
_STREAMED = {
    "shrink_kernel": ("x",),
    "grad_x_kernel": ("x", "grad_x"),
    "grad_y_kernel": ("grad_y",),
    "dropout_kernel": ("x", "out"),
}


def streams(launch: Launch) -> bool:
    """Whether the launch is bound by memory, so that its issue time matters."""
    return bool(_streamed(launch))


def issue_to_memory(launch: Launch, report: Report) -> float | None:
    """Clocks to issue a block's main loop once over clocks to move what it streams meanwhile.

    None for kernels that are not bound by memory.
    """
    moved = _streamed(launch)
    if not moved:
        return None
    part = PARTS[launch.device.capability]
    clocks = report.main_loop * report.num_warps / SCHEDULERS
    bytes_per_iteration = _tile(launch) * sum(tensor.element_size() for tensor in moved)
    return clocks / (bytes_per_iteration / part.bytes_per_clock)


def issue_time(launch: Launch, report: Report) -> float | None:
    """Seconds to issue the whole launch, on all multiprocessors evenly; None as above."""
    moved = _streamed(launch)
    if not moved:
        return None
    part = PARTS[launch.device.capability]
    iterations = moved[0].numel() / _tile(launch)
    instructions = iterations * report.main_loop + prod(launch.grid) * report.outside
    per_second = SCHEDULERS * part.multiprocessors * part.clock
    return instructions * report.num_warps / per_second


def _streamed(launch: Launch) -> list[Tensor]:
    names = _STREAMED.get(launch.kernel.__name__, ())
    given = [launch.arguments[name] for name in names]
    return [tensor for tensor in given if isinstance(tensor, Tensor)]


def _tile(launch: Launch) -> int:
    """Elements of each streamed tensor in one iteration."""
    sizes = launch.constants
    wide = sizes["BLOCK_K"] if "BLOCK_K" in sizes else sizes["BLOCK_N"]
    return int(sizes["BLOCK_T"] * wide)
