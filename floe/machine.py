"""The machine, its versions, and how threads wait for each other on it; loads no torch."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_PACKAGES = ("torch", "triton", "transformers", "peft", "optuna", "datasets", "numpy")


def wait_policy() -> dict[str, str]:
    """What the environment says of how threads of OpenMP wait."""
    return {name: os.environ[name] for name in WAITING if name in os.environ}


def share_cores() -> None:
    """Let threads spin briefly before they sleep, unless the user has said how they wait.

    To be called before torch, which brings OpenMP. By default threads spin for long: beside another
    busy process they then wait for a core that the spinning of their own kind holds.
    benchmarks/LOG.md has the times.
    """
    if not wait_policy():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def environment() -> dict[str, Any]:
    """Machine and versions, for ``env.json``; None for a package that is not installed."""
    from importlib import metadata  # takes time that `floe --help` does not have

    versions: dict[str, Any] = {}
    for name in (*_PACKAGES, "floe-lora"):
        try:
            versions[name.removesuffix("-lora")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name.removesuffix("-lora")] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": os.cpu_count(),
        "commit": _commit(),
        **versions,
    }


def memory() -> dict[str, int | None]:
    """Total and available memory of the machine in bytes; available where the kernel tells."""
    lines = dict(line.split(":", 1) for line in _lines("/proc/meminfo") if ":" in line)
    available = lines.get("MemAvailable", "").split()
    return {
        "total": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "available": int(available[0]) * 1024 if available else None,
    }


def _cpu_name() -> str:
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    if names:
        return names[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text().splitlines()
    except OSError:
        return []


def _commit() -> str | None:
    """Commit of the source tree floe runs from; None where it is none, or git cannot tell."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None
