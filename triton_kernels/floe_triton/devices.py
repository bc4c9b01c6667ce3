"""Which devices run this package's Triton kernels: a visible rule, without touching a GPU."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

LEAST_CAPABILITY = 80  # bfloat16 products and asynchronous copies


def runs_triton(device: torch.device) -> bool:
    """Whether the kernels run on ``device``: an NVIDIA GPU of capability 8.0 or newer."""
    return obstacle(device) is None


def obstacle(device: torch.device) -> str | None:
    """Why the kernels do not run on ``device``; None if they do."""
    if not _triton_installed():
        return "needs the package triton, which is not installed"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, got device {device}"
    found = _capability(device.index if device.index is not None else torch.cuda.current_device())
    if found < LEAST_CAPABILITY:
        least = LEAST_CAPABILITY / 10
        return f"needs compute capability {least} or newer, got {found / 10} on {device}"
    return None


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
