"""Which implementation a call takes: a visible rule, no trial and error.

========  =========================================================================================
backend   what runs
========  =========================================================================================
eager     the product form in plain torch (:mod:`floe_triton.eager`), on every device and dtype
native    C++ on the CPU (:mod:`floe_triton.native`), where floe's operators are loaded
gemm      Triton kernels around the BLAS library's frozen product (:mod:`floe_triton.gpu`)
fused     the same, the frozen product in Triton as well, with the experts in its accumulator
auto      float64: eager. CPU: native if loaded, else eager. CUDA of capability 8.0 and newer:
          gemm or fused by :func:`floe_triton.tuning.prefers_fused`; older: eager
========  =========================================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from floe_triton import devices, eager, native
from floe_triton.group import Gradients, Group, Needs, Routed


def forward(x: Tensor, group: Group, backend: str) -> tuple[list[Tensor], Routed]:
    """The outputs of every linear of the group by the chosen path, and what backward needs."""
    path = choose(x, backend)
    if path == "eager":
        return eager.forward(x, group)
    if path == "native":
        return native.forward(x, group)
    from floe_triton import gpu

    return gpu.forward(x, group, path)


def backward(
    grad_ys: list[Tensor], x: Tensor, group: Group, routed: Routed, needs: Needs, backend: str
) -> Gradients:
    """The gradients that are needed, by the same path as forward."""
    path = choose(x, backend)
    if path == "eager":
        return eager.backward(grad_ys, x, group, routed, needs)
    if path == "native":
        return native.backward(grad_ys, x, group, routed, needs)
    from floe_triton import gpu

    return gpu.backward(grad_ys, x, group, routed, needs, path)


def choose(x: Tensor, backend: str = "auto") -> str:
    """ "eager", "native", "gemm", "fused", or "triton": one of the last two, by the shapes.

    Raises:
        ValueError: the backend cannot run on x's device, with the reason.
    """
    if backend == "eager" or (backend == "auto" and x.dtype == torch.float64):
        return "eager"
    if backend == "auto":
        return _automatic(x)
    reason = _obstacle(x, backend)
    if reason is not None:
        raise ValueError(f"backend {backend!r} {reason}")
    return backend


def _automatic(x: Tensor) -> str:
    if x.device.type == "cpu":
        return "native" if native.available() else "eager"
    return "triton" if devices.runs_triton(x.device) else "eager"


def _obstacle(x: Tensor, backend: str) -> str | None:
    if backend == "native":
        if x.device.type != "cpu":
            return f"runs on the CPU, got x on {x.device}"
        return None if native.available() else "needs floe's operators, which are not loaded"
    if x.dtype == torch.float64:
        return "takes bfloat16, float16 and float32, got float64"
    obstacle = devices.obstacle(x.device)
    if obstacle is None or x.device.type not in ("cpu", "meta"):
        return obstacle
    from floe_triton import launch

    interpreted = x.device.type == "meta" or launch.interpreted()
    return None if interpreted else obstacle
