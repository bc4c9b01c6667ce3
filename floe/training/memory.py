"""Peak memory of a stretch of code, and what kind of number it is."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """``with PeakMemory(device) as peak: ...``; then ``peak.bytes`` and ``peak.kind``.

    ``kind`` is ``"cuda allocated"`` (by torch, on that device), ``"resident set"`` (of the process,
    its peak within the block; Linux) or ``"resident set since process start"`` where the system
    cannot reset the peak. Peaks share one counter per process: blocks must not be nested.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes = 0
        self.kind = ""

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.kind = "cuda allocated"
        else:
            _release_free_memory()
            reset = _reset_resident_peak()
            self.kind = "resident set" if reset else "resident set since process start"
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.kind == "resident set":
            self.bytes = _status("VmHWM")
        else:
            self.bytes = _lifetime_peak()


def _release_free_memory() -> None:
    """Hand what earlier work has freed back to the system, so that it counts for no later block."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc's
        trim(0)


def _reset_resident_peak() -> bool:
    """Ask Linux to set VmHWM back to the present size; False where that does not happen."""
    if not os.access(_CLEAR, os.W_OK):
        return False
    try:
        _CLEAR.write_text("5")
        high, now = _status("VmHWM"), _status("VmRSS")
    except (OSError, KeyError):  # sandboxes show the file but refuse the write or the counter
        return False
    return high <= now * 1.05 + (8 << 20)


def _status(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _lifetime_peak() -> int:
    if sys.platform == "win32":
        raise RuntimeError("peak memory of a CPU run cannot be measured on Windows")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
