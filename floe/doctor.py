"""What this machine has, and which path each operator takes on it, and why."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from floe.machine import environment, memory

# CPUID flags of CPUs that multiply bfloat16 matrices in hardware: tiles, then 512-bit dot products.
_BF16_FLAGS = ("amx_bf16", "avx512_bf16")
_ROUTED = ("moe_lora_forward", "moe_lora_backward", "keyed_dropout")
_MASKS = ("mask_gradients", "accumulate_fisher_")


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
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        **environment(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": memory(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bfloat16": _bf16_flags(),
        "cuda": torch.version.cuda,
        "gpus": [_gpu(index) for index in gpus],
        "auto_dtype": {name: str(auto_dtype(name)).removeprefix("torch.") for name in devices},
        "native": native,
        "native_cuda": _has_kernel("mask_gradients", "CUDA"),
        "ops": [path for name in devices for path in _paths(name, native)],
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts of `diagnose`, as lines for a reader."""
    versions = ("floe", "torch", "triton", "transformers", "peft", "optuna")
    bf16 = ", ".join(facts["cpu_bfloat16"]) or "none"
    lines = [
        f"python {facts['python']} on {facts['platform']}",
        ", ".join(f"{name} {facts[name] or 'not installed'}" for name in versions),
        f"cpu: {facts['cpu']}, {facts['threads']} cores, {facts['torch_threads']} torch threads, "
        f"{facts['memory_bytes']['total'] / 2**30:.1f} GiB, {facts['cpu_capability']}, "
        f"bfloat16 products: {bf16}",
    ]
    for gpu in facts["gpus"]:
        gib = gpu["memory_bytes"] / 2**30
        lines.append(f"gpu: {gpu['name']}, capability {gpu['capability']}, {gib:.1f} GiB")
    lines += [f"dtype auto on {name}: {dtype}" for name, dtype in facts["auto_dtype"].items()]
    for name, module in facts["native"].items():
        lines.append(f"floe.{name}: {'loads' if module['loads'] else module['error']}")
    lines.append(f"floe._ops has CUDA kernels: {'yes' if facts['native_cuda'] else 'no'}")
    for entry in facts["ops"]:
        lines.append(f"{entry['op']} on {entry['device']}: {entry['path']} ({entry['why']})")
    if "selftest" in facts:
        wrong = sum(not result["passed"] for result in facts["selftest"])
        count = len(facts["selftest"])
        lines.append(f"selftest: {count} comparisons with float64, {wrong} out of budget")
    return "\n".join(lines)


def _load(module: str) -> dict[str, Any]:
    """Whether a module with native code imports; a doctor reports that and does not die of it."""
    try:
        loaded = importlib.import_module(module)
    except (ImportError, OSError) as error:
        return {"loads": False, "error": str(error)}
    build = getattr(loaded, "build_info", None)
    return {"loads": True} if build is None else {"loads": True, "build": build()}


def _bf16_flags() -> list[str]:
    capabilities = torch.cpu.get_capabilities()
    return [flag for flag in _BF16_FLAGS if capabilities.get(flag, False)]


def _has_kernel(op: str, key: str) -> bool:
    name = f"floe::{op}"
    return name in torch._C._dispatch_get_all_op_names() and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    )


def _paths(device: str, native: dict[str, Any]) -> list[dict[str, str]]:
    """The path of every operator on a device with backend "auto", and why."""
    ops, solvers = native["_ops"], native["_native"]
    if ops["loads"]:
        paths = dict.fromkeys(_ROUTED, _routed_path(device))
        key = device.upper()
        for op in _MASKS:
            there = _has_kernel(op, key)
            why = f"a kernel is registered for {device}" if there else f"built without {key}"
            paths[op] = (f"native {key}" if there else "none", why)
    else:
        paths = dict.fromkeys((*_ROUTED, *_MASKS), ("none", ops["error"]))
    if device == "cpu":
        loads = ("native C++", "floe._native loads")
        paths["mask solvers"] = loads if solvers["loads"] else ("none", solvers["error"])
    return [
        {"op": op, "device": device, "path": path, "why": why} for op, (path, why) in paths.items()
    ]


def _routed_path(device: str) -> tuple[str, str]:
    from floe.ops import kernel_obstacle

    if device == "cpu":
        return "native C++", "floe._ops loads"
    obstacle = kernel_obstacle(torch.device(device))
    if obstacle is None:
        return "Triton kernels", "an NVIDIA GPU of capability 8.0 or newer, and triton"
    return "eager product form", f"the Triton path {obstacle}"


def _gpu(index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    capability = f"{facts.major}.{facts.minor}"
    return {"name": facts.name, "capability": capability, "memory_bytes": facts.total_memory}
