"""Plain-torch definition of every op: what the kernels must equal.

Also the shortest exact documentation there is. Runs on any device in any dtype; in float64 it is
the oracle of the tests. ``T`` tokens, ``K`` in features, ``N`` out features, ``r`` rank, ``M``
experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
DROPOUT_ROUNDS = 7
COLUMNS_PER_CALL = 16  # one Philox call gives four words = sixteen bytes = sixteen decisions


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor, rounds: int
) -> list[Tensor]:
    """Philox-4x32 (Salmon et al. 2011): four pseudo-random 32-bit words per counter.

    ``counter`` holds four int64 tensors of one (broadcast) shape with values in [0, 2^32); so do
    the words. ``seed`` is a 0-dim int64 tensor whose low and high words are the key.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, which is what the two 32-bit halves need
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((odd >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((even >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = odd & _WORD, even & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def dropout_threshold(p: float) -> int:
    """An element is dropped when its byte is below this.

    Decisions are bytes, so p counts in steps of 1/256.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p}")
    return min(255, round(256 * p))


def dropout_scale(p: float) -> float:
    """Factor of the kept elements: exactly one over the probability of keeping, so unbiased."""
    return 256.0 / (256 - dropout_threshold(p))


def dropout_keep(rows: int, cols: int, p: float, seed: Tensor, first_row: int = 0) -> Tensor:
    """Keep-mask [rows, cols] (bool): a pure function of (seed, row, column), on the seed's device.

    Element (t, c) takes byte c mod 16 of the Philox-4x32-7 words at counter
    (c div 16, t low, t high, 0); rows count from ``first_row``.
    """
    device = seed.device
    last = first_row + rows
    row = torch.arange(first_row, last, dtype=torch.int64, device=device)[:, None]
    block = torch.arange(-(-cols // COLUMNS_PER_CALL), dtype=torch.int64, device=device)[None, :]
    words = philox((block, row & _WORD, row >> 32, torch.zeros_like(row)), seed, DROPOUT_ROUNDS)
    words = [word.expand(rows, block.shape[1]) for word in words]
    shifts = torch.arange(0, 32, 8, dtype=torch.int64, device=device)
    # [rows, blocks, 4 words, 4 bytes]
    bytes_ = (torch.stack(words, dim=-1)[..., None] >> shifts) & 0xFF
    return bytes_.flatten(1)[:, :cols] >= dropout_threshold(p)


def dropout(x: Tensor, p: float, seed: Tensor, first_row: int = 0) -> Tensor:
    """``x * keep / (1 - p)``: columns are the last dimension's, rows count over all others."""
    rows = x.numel() // max(x.shape[-1], 1)
    keep = dropout_keep(rows, x.shape[-1], p, seed, first_row).view(x.shape)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(
        keep, wide * dropout_scale(p), torch.zeros((), dtype=wide.dtype, device=x.device)
    ).to(x.dtype)


def gate(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
) -> Tensor:
    """``softmax((x R^T + bias) / temperature)`` over the experts: [..., M].

    In float32 (float64 for float64 input). With ``top_k`` > 0, over the ``top_k`` experts of the
    largest logits alone, equal ones by the lower index; the others' weights are exactly 0.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = (x @ router_weight.to(x.dtype).T).to(wide)
    if router_bias is not None:
        logits = logits + router_bias.to(wide)
    return torch.softmax(largest(logits / temperature, top_k), dim=-1)


def largest(logits: Tensor, top_k: int) -> Tensor:
    """``logits`` [..., M], all but the ``top_k`` largest -inf, equal ones by the lower index.

    As they are for ``top_k`` 0. NaN counts as the largest.
    """
    if top_k == 0:
        return logits
    others = logits.argsort(dim=-1, descending=True, stable=True)[..., top_k:]
    return logits.scatter(-1, others, float("-inf"))


def moe_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    router_bias: Tensor | None = None,
    gates: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    dropout_mode: str = "shared",
) -> Tensor:
    """``y = x W^T + b + scaling * sum_i gate_i(x) * (dropout(x) A^T) B_i^T`` (FLoE Eq. 1).

    HydraLoRA's layout: x [..., K]; weight [N, K]; bias [N] or None; shrink_weight [r + M, K] = rows
    of A, then of the router; expand_weight [N, M, r]; router_bias [M] or None. The router sees x
    without dropout. One dropout mask serves all experts; with dropout_mode "per_expert", as in
    HydraLoRA's code, expert i draws its own, that of seed + i.

    shrink_weight [M r + M, K] holds an A for each expert, one below the other, then the router.
    With gates [..., M] there is no router: gate_i(x) is gates[..., i], shrink_weight is without its
    rows. top_k as in :func:`gate`.
    """
    y = torch.nn.functional.linear(x, weight, bias)
    return y + moe_lora_delta(
        x,
        shrink_weight,
        expand_weight,
        scaling=scaling,
        dropout_p=dropout_p,
        seed=seed,
        router_bias=router_bias,
        gates=gates,
        temperature=temperature,
        top_k=top_k,
        dropout_mode=dropout_mode,
    )


def moe_lora_delta(
    x: Tensor,
    shrink_weight: Tensor,
    expand_weight: Tensor,
    *,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    router_bias: Tensor | None = None,
    gates: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    dropout_mode: str = "shared",
) -> Tensor:
    """The adapter's part of :func:`moe_lora`, expert by expert as the formula is written."""
    _, experts, rank = expand_weight.shape
    router_rows = experts if gates is None else 0
    a, router = shrink_weight.to(x.dtype).tensor_split([len(shrink_weight) - router_rows])
    if gates is None:
        gates = gate(x, router, router_bias, temperature, top_k)
    weights = gates.to(x.dtype)
    hidden = _dropped(x, dropout_p, seed, 0) @ a.T  # [..., r], or [..., M r]
    delta = torch.zeros((), dtype=x.dtype, device=x.device)
    for i in range(experts):
        if dropout_mode == "per_expert" and i > 0:
            hidden = _dropped(x, dropout_p, seed, i) @ a.T
        of_expert = hidden if len(a) == rank else hidden[..., i * rank : (i + 1) * rank]
        delta = delta + weights[..., i, None] * (of_expert @ expand_weight[:, i].to(x.dtype).T)
    return delta * scaling


def _dropped(x: Tensor, p: float, seed: Tensor | None, expert: int) -> Tensor:
    if p == 0.0:
        return x
    if seed is None:
        raise ValueError("seed must be a 0-dim int64 tensor when dropout_p > 0, got None")
    return dropout(x, p, seed + expert)
