"""What one call costs besides time: launches, bytes kept for the backward, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Row
from floe.training.memory import PeakMemory

KERNELS, OPERATORS = "CUDA kernels and copies", "aten operators (views and empty tensors left out)"
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def costs(run: Callable[[], object], device: torch.device, is_compiled: bool) -> Row:
    """Launches and peak memory of one run; a compiled one's launches are known on CUDA alone."""
    count, kind = None, "not counted"
    if not is_compiled or device.type == "cuda":
        count, kind = launches(run, device)
    memory, memory_kind = peak_bytes(run, device)
    peak = {"peak_bytes": memory, "peak_kind": memory_kind}
    return {"launches": count, "launches_kind": kind, **peak}


def launches(run: Callable[[], object], device: torch.device) -> tuple[int, str]:
    """How many kernels ``run`` launches; off CUDA, how many aten operators, and which it is."""
    if device.type != "cuda":
        with _Operators() as counted:
            run()
        return counted.count, OPERATORS
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize(device)
    on_gpu = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
    return len(on_gpu), KERNELS


class _Operators(TorchDispatchMode):
    """Counts aten operators that compute, those inside another library's operator too.

    One that has none inside counts as one.
    """

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


def saved_bytes(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from ``forward``, shared memory once, ``parameters`` left out."""
    known = {value.untyped_storage().data_ptr() for value in parameters}
    sizes: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        kept = forward()
    del kept
    return sum(sizes.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> tuple[int, str]:
    """How far memory rises while ``run`` runs, and which memory: allocated (CUDA) or resident."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
    else:
        with PeakMemory(device) as now:
            pass
        before = now.bytes
    with PeakMemory(device) as peak:
        run()
    return max(0, peak.bytes - before), f"{peak.kind}, rise"
