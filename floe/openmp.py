"""How threads of OpenMP wait for each other; to be set before torch, which brings it, is loaded."""

from __future__ import annotations

import os

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def wait_policy() -> dict[str, str]:
    """What is set of it in the environment."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def share_cores() -> None:
    """Let threads spin briefly before they sleep, unless the user has said how they wait.

    By default they spin for long: beside another busy process they then wait for a core that the
    spinning of their own kind holds. benchmarks/LOG.md has the times.
    """
    if not wait_policy():
        os.environ["GOMP_SPINCOUNT"] = "1000"
