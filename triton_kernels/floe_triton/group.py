"""What passes between the op's parts: a group of linears, what its forward leaves, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass  # not frozen: that takes three times as long to make
class Group:
    """G frozen linears of one input x [T, K] with G adapters of one rank r and M experts.

    Packed once, by the function that a user calls, and handed whole from there on. A single linear
    is a group of one. Either ``weights`` [N_g, K] and ``biases`` ([N_g] or None) or
    ``base_outputs`` [T, N_g] are given, the others are empty. ``shrink_weights`` are [H + M, K]
    (rows of A, then of the router), ``expand_weights`` [N_g, M, r], ``router_biases`` [M] or None.
    H is r, or M r where every expert has an A of its own.

    A caller may give ``gates`` [T, M], one per linear, instead of routers: ``shrink_weights`` are
    [H, K] then. ``top_k``: how many experts a token uses, those of the largest logits; 0 is all.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    base_outputs: Sequence[Tensor]
    shrink_weights: Sequence[Tensor]
    expand_weights: Sequence[Tensor]
    router_biases: Sequence[Tensor | None]
    scaling: float
    temperature: float
    dropout_p: float
    seed: Tensor | None
    backend: str = "auto"
    gates: Sequence[Tensor] = ()
    top_k: int = 0

    def __len__(self) -> int:
        return len(self.expand_weights)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the seed: those of the adapters last, kind by kind."""
        return (
            *self.weights,
            *self.biases,
            *self.base_outputs,
            *self.shrink_weights,
            *self.expand_weights,
            *self.router_biases,
            *self.gates,
        )

    def fields(self) -> tuple[Any, ...]:
        """All of them in order, which the registered ops take."""
        return tuple(vars(self).values())

    def bias(self, g: int) -> Tensor | None:
        """Linear g's bias, [N_g]."""
        return self.biases[g] if self.biases else None

    def base_output(self, g: int) -> Tensor | None:
        """Linear g's base output, [T, N_g], where these are given."""
        return self.base_outputs[g] if self.base_outputs else None

    @property
    def experts(self) -> int:
        """M."""
        return self.expand_weights[0].shape[1]

    @property
    def rank(self) -> int:
        """R, columns of each expert."""
        return self.expand_weights[0].shape[2]

    @property
    def router_rows(self) -> int:
        """Rows of each router: M, none where gates are given."""
        return 0 if self.gates else self.experts

    @property
    def hidden_size(self) -> int:
        """H, the rows of each linear's A: r, or M r where every expert has its own."""
        return self.shrink_weights[0].shape[0] - self.router_rows

    @property
    def hidden_rows(self) -> int:
        """Rows of :meth:`shrink_rows` that are A's: G H."""
        return len(self) * self.hidden_size

    @property
    def row_count(self) -> int:
        """Rows of :meth:`shrink_rows`."""
        return len(self) * self.shrink_weights[0].shape[0]

    def shrink_rows(self) -> Tensor:
        """Every row that x is multiplied with, [G (H + M), K]: all of A's, then all routers'.

        Of one linear these are its ``shrink_weight`` itself.
        """
        if len(self) == 1:
            return self.shrink_weights[0]
        size = self.hidden_size
        a = [shrink[:size] for shrink in self.shrink_weights]
        routers = [shrink[size:] for shrink in self.shrink_weights]
        return torch.cat([*a, *routers])

    def split_rows(self, rows: Tensor) -> list[Tensor]:
        """The inverse of :meth:`shrink_rows`: what belongs to each linear, [H + M, ...]."""
        if len(self) == 1:
            return [rows]
        a = rows[: self.hidden_rows].split(self.hidden_size)
        if self.gates:
            return list(a)
        routers = rows[self.hidden_rows :].split(self.experts)
        return [torch.cat(pair) for pair in zip(a, routers, strict=True)]

    def router_bias(self) -> Tensor | None:
        """All routers' biases, [G, M]; None if there are none."""
        given = [bias for bias in self.router_biases if bias is not None]
        return torch.stack(given) if given else None

    def given_gates(self, dtype: torch.dtype) -> Tensor | None:
        """All linears' given gates, [G, T, M], new; None where routers decide."""
        return torch.stack([gate.to(dtype) for gate in self.gates]) if self.gates else None


@dataclass(frozen=True)
class Routed:
    """What the forward leaves for the backward.

    ``hidden`` [G, T, H] and ``gate`` [G, T, M] are float32 (float64 for float64 x); ``z``
    [G, T, M r] is in x's dtype: ``z[g, t, i r + j] = scaling * gate[g, t, i] * hidden[g, t, h]``,
    where h is j, or i r + j where every expert has an A of its own.
    """

    hidden: Tensor
    gate: Tensor
    z: Tensor


@dataclass(frozen=True)
class Needs:
    """Which gradients the backward is asked for."""

    x: bool
    shrink: bool
    expand: bool
    router_bias: bool
    gates: bool = False

    @property
    def products(self) -> bool:
        """Whether the gradients of what x is multiplied with are needed for any."""
        return self.x or self.shrink or self.router_bias


@dataclass(frozen=True)
class Gradients:
    """``x`` [T, K] or None; the others one per linear, or empty where they are not needed."""

    x: Tensor | None
    shrink: Sequence[Tensor]
    expand: Sequence[Tensor]
    router_bias: Sequence[Tensor]
    gates: Sequence[Tensor] = ()


class Implementation(NamedTuple):
    """One way to compute a group of linears on x [T, K].

    ``forward(x, group)`` gives the outputs [T, N_g] of every linear, and what the backward needs;
    ``backward(grad_ys, x, group, routed, needs)`` gives every gradient that ``needs`` asks for.
    """

    forward: Callable[[Tensor, Group], tuple[list[Tensor], Routed]]
    backward: Callable[[list[Tensor], Tensor, Group, Routed, Needs], Gradients]
