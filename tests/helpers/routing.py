"""Every way to route, by a definition in plain loops: what ops are compared with."""

from dataclasses import dataclass

import torch
from floe_triton import moe_lora_group, moe_lora_group_add, reference
from hypothesis import strategies as st

from helpers.budget import assert_within_budget, relative_error

SEED = torch.tensor(2**61 + 12345)
WIDTHS = (24, 40, 17)
KINDS = ("softmax", "top_k", "own_a", "own_a top_k", "gates", "own_a gates", "rank gates")


@dataclass
class Case:
    """Inputs of one group in float64: what differentiates first, by name."""

    kind: str
    leaves: dict  # name -> one tensor, or one per linear
    weights: list
    biases: list
    grads: list
    settings: dict

    def run(self, function, dtype, adapter, **more):
        """Outputs, and the gradient of every leaf, of ``function`` on the case in ``dtype``."""

        def cast(name, values):
            to = dtype if name == "x" else adapter
            if isinstance(values, list):
                return [t.to(to).detach().requires_grad_() for t in values]
            return values.to(to).detach().requires_grad_()

        leaves = {name: cast(name, values) for name, values in self.leaves.items()}
        weights = [weight.to(dtype) for weight in self.weights]
        biases = [bias.to(dtype) for bias in self.biases]
        ys = function(
            leaves["x"],
            weights,
            biases,
            leaves["shrink"],
            leaves["expand"],
            gates=leaves.get("gates"),
            router_biases=leaves.get("router_bias"),
            **self.settings,
            **more,
        )
        torch.autograd.backward(ys, [grad.to(dtype) for grad in self.grads])
        flat = [t for v in leaves.values() for t in (v if isinstance(v, list) else [v])]
        return [*(y.detach() for y in ys), *(leaf.grad for leaf in flat)]


def case(kind, tokens, columns, rank, experts, linears=1, dropout_p=0.0, seed=0):
    """A group of ``linears`` for ``kind`` of routing, drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    widths = WIDTHS[:linears]
    gated, own = "gates" in kind, kind.startswith(("own_a", "rank"))
    rows = (experts * rank if own else rank) + (0 if gated else experts)
    leaves = {
        "x": draw(tokens, columns),
        "shrink": [draw(rows, columns, scale=columns**-0.5) for _ in widths],
        "expand": [draw(width, experts, rank, scale=rank**-0.5) for width in widths],
    }
    settings = {"scaling": 1.7, "dropout_p": dropout_p, "seed": SEED}
    if gated:
        count = experts * rank if kind == "rank gates" else experts
        leaves["gates"] = [draw(tokens, count) for _ in widths]
    else:
        leaves["router_bias"] = [draw(experts) for _ in widths]
        settings |= {"temperature": 0.6, "top_k": 1 + seed % experts if "top_k" in kind else 0}
    return Case(
        kind,
        leaves,
        [draw(width, columns, scale=columns**-0.5) for width in widths],
        [draw(width) for width in widths],
        [draw(tokens, width) for width in widths],
        settings,
    )


def definition(x, weights, biases, shrinks, expands, *, gates, router_biases, **settings):
    """What `moe_lora_group` computes, expert by expert and rank by rank."""
    ys = []
    for g, (weight, bias, shrink, expand) in enumerate(
        zip(weights, biases, shrinks, expands, strict=True)
    ):
        _, experts, rank = expand.shape
        shrink, expand = shrink.to(x.dtype), expand.to(x.dtype)
        given = None if gates is None else gates[g].to(x.dtype)
        routed = experts if gates is None else 0
        a, router = shrink[: len(shrink) - routed], shrink[len(shrink) - routed :]
        if given is None:
            given = gate_of(x, router, router_biases[g], settings)
        p = settings["dropout_p"]
        hidden = (reference.dropout(x, p, settings["seed"]) if p else x) @ a.T
        y = torch.zeros((), dtype=x.dtype)
        for i in range(experts):
            for j in range(rank):
                column = i * rank + j if len(a) != rank else j
                weight_of = given[:, i if given.shape[1] == experts else i * rank + j]
                y = y + (weight_of * hidden[:, column])[:, None] * expand[:, i, j]
        ys.append(torch.nn.functional.linear(x, weight, bias) + settings["scaling"] * y)
    return ys


def gate_of(x, router, bias, settings):
    """Softmax over the chosen experts; the others get an exact zero."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = ((x @ router.T).to(wide) + bias.to(wide)) / settings["temperature"]
    experts = logits.shape[1]
    if settings["top_k"]:
        place = torch.arange(experts)
        above = logits[:, None, :] > logits[:, :, None]
        tied = (logits[:, None, :] == logits[:, :, None]) & (place[None, :] < place[:, None])
        logits = torch.where((above | tied).sum(2) < settings["top_k"], logits, -torch.inf)
    return torch.softmax(logits, dim=1).to(x.dtype)


def on_base(x, weights, biases, shrinks, expands, **settings):
    """`moe_lora_group_add` as if it had the frozen weights."""
    bases = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    return moe_lora_group_add(bases, x, shrinks, expands, **settings)


def check(given, dtype, adapter, backend, function=moe_lora_group):
    """``function``'s outputs and every gradient, against the definition in float64."""
    exact = given.run(definition, torch.float64, torch.float64)
    torchs = given.run(definition, dtype, adapter)
    actual = given.run(function, dtype, adapter, backend=backend)
    for place, (a, t, e) in enumerate(zip(actual, torchs, exact, strict=True)):
        if dtype in (torch.float32, torch.float64):
            assert a.shape == e.shape
            # a single number may be the difference of larger ones, a hundred or more times its size
            least = 1e-4 if dtype == torch.float32 else 1e-9
            error, torchs_error = relative_error(a, e), relative_error(t, e)
            assert error <= max(least, 2 * torchs_error), (place, error, torchs_error, given)
        else:
            assert_within_budget(a, t, e, f"{given.kind}, result {place}", rounded_to=dtype)


shapes = {
    "tokens": st.integers(1, 40),
    "columns": st.integers(1, 80),
    "rank": st.integers(1, 12),
    "experts": st.integers(1, 9),
    "linears": st.integers(1, 3),
    "dropout_p": st.sampled_from([0.0, 0.3]),
    "seed": st.integers(0, 2**20),
}
