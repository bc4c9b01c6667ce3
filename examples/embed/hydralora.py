"""A HydraLoRA layer, `lora_A`, `lora_B0` ... and `lora_route`, on floe_triton's op.

The layer keeps its modules, so optimisers, checkpoints and their names stay what they were.

    python examples/embed/hydralora.py [--time]
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from floe_triton import draw_seed, moe_lora
from side_by_side import options, show
from torch import Tensor, nn


class HydraLinear(nn.Linear):
    """A frozen linear with one A, several B and a router, named and computed as in HydraLoRA."""

    def __init__(
        self, columns: int, features: int, rank: int, experts: int, alpha: float, dropout: float
    ) -> None:
        super().__init__(columns, features, bias=False)
        self.weight.requires_grad_(False)
        self.experts, self.scaling = experts, alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(columns, rank, bias=False)
        self.lora_route = nn.Linear(columns, experts, bias=False)
        for i in range(experts):
            self.add_module(f"lora_B{i}", nn.Linear(rank, features, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]; an expert at a time."""
        y = super().forward(x)
        route = self.lora_route(x).softmax(-1)
        for i in range(self.experts):
            expert = self.get_submodule(f"lora_B{i}")(self.lora_A(self.lora_dropout(x)))
            y = y + route[..., i, None] * expert * self.scaling
        return y


def embed(layer: HydraLinear) -> HydraLinear:
    """Let ``layer`` compute through the op; its parameters stay where they are.

    Dropout draws one mask for all experts, where the loop draws one for each.
    """
    layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    return layer


def _forward(layer: HydraLinear, x: Tensor) -> Tensor:
    experts = [layer.get_submodule(f"lora_B{i}").weight for i in range(layer.experts)]
    p = layer.lora_dropout.p if layer.training else 0.0
    return moe_lora(
        x,
        layer.weight,
        layer.bias,
        torch.cat([layer.lora_A.weight, layer.lora_route.weight]),  # [r + M, K]
        torch.stack(experts, dim=1),  # [N, M, r]
        scaling=layer.scaling,
        dropout_p=p,
        seed=draw_seed(x.device) if p > 0.0 else None,
    )


def main(arguments: list[str] | None = None) -> None:
    """Compare the two layers; with ``--time``, time them."""
    parser = options(__doc__)
    parser.add_argument("--experts", type=int, default=4)
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    before = HydraLinear(given.size, given.size, 8, given.experts, 32.0, given.dropout)
    after = embed(copy.deepcopy(before))
    show(before, after, given)


if __name__ == "__main__":
    main()
