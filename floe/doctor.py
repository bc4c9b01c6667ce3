"""What this machine has, which path each operator takes on it, and whether they are right on it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from floe.numerics import Result, error_budget, relative_error
from floe.pipeline.run_folder import environment

__all__ = [
    "Result",
    "auto_dtype",
    "describe",
    "diagnose",
    "error_budget",
    "relative_error",
    "selftest",
]

# CPUID flags of CPUs that multiply bfloat16 matrices in hardware: tiles, then 512-bit dot products.
_BF16_FLAGS = ("amx_bf16", "avx512_bf16")
_OPS = (
    "moe_lora_forward",
    "moe_lora_backward",
    "keyed_dropout",
    "mask_gradients",
    "accumulate_fisher_",
)


def auto_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype that ``dtype: auto`` means on ``device``: bfloat16 where hardware multiplies it.

    bfloat16 on CUDA devices of compute capability 8.0 and above and on CPUs with AMX or AVX512
    bfloat16 instructions, else float32. Decided by what the hardware says of itself, not by timing.
    """
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        fast = bool(_bf16_flags())
    else:
        raise ValueError(f"device must be a cpu or cuda device, got {device}")
    return torch.bfloat16 if fast else torch.float32


def diagnose() -> dict[str, Any]:
    """Facts about this machine and installation, ready for JSON. Times nothing, computes nothing.

    ``ops`` lists for every operator and device the path it takes and why; ``native`` says whether
    the two native modules load, with the loader's message where they do not.
    """
    native = {"_ops": _load("floe.ops"), "_native": _load("floe._native")}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        **environment(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bfloat16": _bf16_flags(),
        "cuda": torch.version.cuda,
        "gpus": _gpus(),
        "auto_dtype": {name: str(auto_dtype(name)).removeprefix("torch.") for name in devices},
        "native": native,
        "native_cuda": _has_kernel("mask_gradients", "CUDA"),
        "ops": [path for name in devices for path in _paths(name, native)],
    }


def describe(facts: dict[str, Any]) -> str:
    """What `diagnose` found, as lines for a reader."""
    versions = ("floe", "torch", "triton", "transformers", "peft", "optuna")
    memory, bf16 = facts["memory_bytes"], ", ".join(facts["cpu_bfloat16"]) or "none"
    lines = [
        f"python {facts['python']} on {facts['platform']}",
        ", ".join(f"{name} {facts[name] or 'not installed'}" for name in versions),
        f"cpu: {facts['cpu']}, {facts['threads']} cores, {facts['torch_threads']} torch threads, "
        f"{memory['total'] / 2**30:.1f} GiB, {facts['cpu_capability']}, bfloat16 products: {bf16}",
    ]
    lines += [
        f"gpu: {gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.1f} GiB"
        for gpu in facts["gpus"]
    ]
    lines += [f"dtype auto on {name}: {dtype}" for name, dtype in facts["auto_dtype"].items()]
    for name, module in facts["native"].items():
        lines.append(f"floe.{name}: {'loads' if module['loads'] else module['error']}")
    lines.append(f"floe._ops has CUDA kernels: {'yes' if facts['native_cuda'] else 'no'}")
    for entry in facts["ops"]:
        lines.append(f"{entry['op']} on {entry['device']}: {entry['path']} ({entry['why']})")
    results = facts.get("selftest")
    if results is not None:
        wrong = sum(not result["passed"] for result in results)
        lines.append(f"selftest: {len(results)} comparisons with float64, {wrong} out of budget")
    return "\n".join(lines)


def selftest(
    device: torch.device | str | None = None,
    progress: Callable[[int, int, Result], None] | None = None,
) -> list[Result]:
    """Run every operator on this machine against float64; seconds on two cores.

    Allowed error: `error_budget`. Dropout must equal its definition bit for bit, and the mask
    solvers a search through all masks. An operator that raises is a failed result, its message in
    the note.

    Args:
        device: The device to test; None tests the CPU and, where there is one, the CUDA device.
        progress: Called as ``progress(done, total, worst_result)`` after each case.
    Returns:
        Every result, in a fixed order; ``result.passed`` tells.
    """
    from floe import selfcheck

    devices = [torch.device(device)] if device is not None else [torch.device("cpu")]
    if device is None and torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    cases = [case for one in devices for case in selfcheck.cases(one)]
    results: list[Result] = []
    for done, case in enumerate(cases, 1):
        outcome = case.run()
        results += outcome
        if progress is not None:
            progress(done, len(cases), max(outcome, key=_excess))
    return results


def _excess(result: Result) -> float:
    if result.error <= 0.0:
        return 0.0
    return result.error / result.budget if result.budget > 0.0 else float("inf")


def _load(module: str) -> dict[str, Any]:
    """Whether a module with native code imports; a doctor reports that and does not die of it."""
    try:
        loaded = importlib.import_module(module)
    except (ImportError, OSError) as error:
        return {"loads": False, "error": str(error)}
    build = getattr(loaded, "build_info", None)
    return {"loads": True, **({"build": build()} if build is not None else {})}


def _bf16_flags() -> list[str]:
    capabilities = torch.cpu.get_capabilities()
    return [flag for flag in _BF16_FLAGS if capabilities.get(flag, False)]


def _has_kernel(op: str, key: str) -> bool:
    name = f"floe::{op}"
    return name in torch._C._dispatch_get_all_op_names() and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    )


def implementation(device: torch.device) -> tuple[str, str]:
    """The path of the routed linear on ``device`` with backend "auto", and why."""
    from floe.ops import kernel_obstacle

    if device.type == "cpu":
        return "native C++", "floe._ops loads"
    obstacle = kernel_obstacle(device)
    if obstacle is None:
        return "Triton kernels", "an NVIDIA GPU of capability 8.0 or newer, and triton"
    return "eager product form", f"the Triton path {obstacle}"


def _paths(device: str, native: dict[str, Any]) -> list[dict[str, str]]:
    key = device.upper()
    found = []
    for op in _OPS:
        if not native["_ops"]["loads"]:
            path, why = "none", native["_ops"]["error"]
        elif op in ("moe_lora_forward", "moe_lora_backward", "keyed_dropout"):
            path, why = implementation(torch.device(device))
        elif _has_kernel(op, key):
            path, why = f"native {key}", f"a kernel is registered for {device}"
        else:
            path, why = "none", f"built without {key}"
        found.append({"op": op, "device": device, "path": path, "why": why})
    if device == "cpu":
        loads = native["_native"]["loads"]
        why = "floe._native loads" if loads else native["_native"]["error"]
        path = "native C++" if loads else "none"
        found.append({"op": "mask solvers", "device": device, "path": path, "why": why})
    return found


def _memory() -> dict[str, int | None]:
    """Total and available memory of the machine in bytes; available where the kernel tells."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = Path("/proc/meminfo")
    if not info.is_file():
        return {"total": total, "available": None}
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    available = lines.get("MemAvailable", "").split()
    return {"total": total, "available": int(available[0]) * 1024 if available else None}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "memory_bytes": facts.total_memory,
            }
        )
    return found
