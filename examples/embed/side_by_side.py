"""Are two layers the same function, and which is faster? For the two examples beside it."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output [T, N] of ``layer`` for x [T, K], and the gradients of x and all it trains."""
    x = x.detach().requires_grad_()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    y = layer(x)
    found = torch.autograd.grad(y, [x, *trained.values()], grad)
    return {"y": y.detach(), "x": found[0], **dict(zip(trained, found[1:], strict=True))}


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Largest relative RMS difference of what :func:`gradients` found."""
    return max(
        float((one[name] - two[name]).norm() / one[name].norm().clamp_min(1e-30)) for name in one
    )


def ratio(before: Callable[[], object], after: Callable[[], object], rounds: int) -> list[float]:
    """Time of ``before`` over that of ``after`` in every round; the order changes."""
    calls, order = {"before": before, "after": after}, ["before", "after"]
    for call in calls.values():
        call()
    found, shuffle = [], random.Random(0)
    for _ in range(rounds):
        seconds = {}
        shuffle.shuffle(order)
        for name in order:
            began = time.perf_counter()
            calls[name]()
            seconds[name] = time.perf_counter() - began
        found.append(seconds["before"] / seconds["after"])
    return found


def options(doc: str | None) -> argparse.ArgumentParser:
    """What both scripts can be asked."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--time", action="store_true", help="print the gain on this machine")
    parser.add_argument("--size", type=int, default=1024, help="K and N")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=15)
    return parser


def show(before: nn.Module, after: nn.Module, given: argparse.Namespace) -> None:
    """Print how far the two differ without dropout and, if asked, how much faster one is."""
    x, grad = torch.randn(2, given.tokens, given.size)
    same = [gradients(layer.eval(), x, grad) for layer in (before, after)]
    print(f"largest relative difference without dropout: {difference(*same):.1e}")
    if given.time:
        half = torch.bfloat16
        print(report(before.train().to(half), after.train().to(half), x.to(half), given.rounds))


def report(before: nn.Module, after: nn.Module, x: Tensor, rounds: int) -> str:
    """One line: forward and backward of ``after`` beside ``before``, dropout as it is set."""
    grad = torch.randn(after(x).shape, dtype=x.dtype)
    found = sorted(
        ratio(lambda: gradients(before, x, grad), lambda: gradients(after, x, grad), rounds)
    )
    low, high = found[round(0.2 * (rounds - 1))], found[round(0.8 * (rounds - 1))]
    return (
        f"forward and backward, x {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}: "
        f"{statistics.median(found):.2f} times as fast (p20 {low:.2f}, p80 {high:.2f} of {rounds} "
        f"rounds, {torch.get_num_threads()} threads)"
    )
