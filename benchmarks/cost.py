"""What one call costs besides time: launches, bytes kept for the backward, peak memory."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from floe.training.memory import PeakMemory

KERNELS, OPERATORS = "CUDA kernels and copies", "aten operators (views and empty tensors left out)"


def launches(run: Callable[[], object], device: torch.device) -> tuple[int, str]:
    """How many kernels ``run`` launches; off CUDA, how many aten operators, and which it is.

    An operator of another library counts as the aten operators in it, or as one where it has none.
    """
    if device.type != "cuda":
        with _Operators() as counted:
            run()
        return counted.count, OPERATORS
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize(device)
    on_gpu = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    return len(on_gpu), KERNELS


class _Operators(TorchDispatchMode):
    """Counts aten operators that compute, those inside other libraries' operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "aten":
            before = self.count
            with self:  # off within this method
                result = func.redispatch(_CPU, *args, **(kwargs or {}))
            self.count += self.count == before
            return result
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        empty = func._schema.name.startswith(("aten::empty", "aten::new_empty"))
        self.count += not (view or empty)
        return func(*args, **(kwargs or {}))


_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from ``forward`` for the backward, ``parameters`` left out.

    Memory that several saved tensors share counts once.
    """
    known = {value.untyped_storage().data_ptr() for value in parameters}
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        kept = forward()
    del kept
    return sum(found.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> tuple[int, str]:
    """How far memory rises while ``run`` runs, and which memory: allocated (CUDA) or resident."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
    else:
        _trim()
        with PeakMemory(device) as now:
            pass
        before = now.bytes
    with PeakMemory(device) as peak:
        run()
    return max(0, peak.bytes - before), f"{peak.kind}, rise"


def _trim() -> None:
    """Give free memory back to the system, or the next rise would hide in it (glibc alone)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
