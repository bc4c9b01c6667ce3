"""How threads of OpenMP wait for each other; to be set before torch, which brings it, is loaded."""

from __future__ import annotations

import os

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def wait_policy() -> dict[str, str]:
    """What is set of it in the environment."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}
