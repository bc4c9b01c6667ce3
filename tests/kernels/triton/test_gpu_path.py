"""The whole op on the kernels' path, forward and backward, against its definition in float64."""

import functools

import pytest
import torch
from floe_triton import (
    gpu,
    keyed_dropout,
    launch,
    moe_lora_add,
    moe_lora_group,
    moe_lora_group_add,
    reference,
)
from helpers.attack import trials
from helpers.budget import assert_within_budget, relative_error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

PHASES = (Phase.explicit, Phase.generate)  # the interpreter is too slow to shrink a failure
SEED = torch.tensor(2**61 + 12345)
WIDTHS = (24, 40, 17)


def group(tokens, columns, rank, experts, linears, seed, biased=True, routed=True):
    """float64 x, and per linear weights, biases, shrinks, expands, router biases, gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    widths = WIDTHS[:linears]
    return (
        draw(tokens, columns),
        [draw(width, columns, scale=columns**-0.5) for width in widths],
        [draw(width) if biased and width != 40 else None for width in widths],
        [draw(rank + experts, columns, scale=columns**-0.5) for _ in widths],
        [draw(width, experts, rank, scale=rank**-0.5) for width in widths],
        [draw(experts) if routed else None for _ in widths],
        [draw(tokens, width) for width in widths],
    )


def run(function, inputs, dtype, adapter, **common):
    """Outputs and every gradient of ``function`` on ``inputs`` cast to ``dtype``."""

    def cast(values, dtype):
        return [None if v is None else v.to(dtype).detach() for v in values]

    x, weights, biases, shrinks, expands, routers, grads = inputs
    (x,), weights, biases = cast([x], dtype), cast(weights, dtype), cast(biases, dtype)
    adapters = [cast(values, adapter) for values in (shrinks, expands, routers)]
    leaves = [x, *(t for values in adapters for t in values if t is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    shrinks, expands, routers = adapters
    ys = function(x, weights, biases, shrinks, expands, router_biases=routers, **common)
    torch.autograd.backward(ys, cast(grads, dtype))
    return [*(y.detach() for y in ys), *(leaf.grad for leaf in leaves)]


def definition(x, weights, biases, shrinks, expands, *, router_biases, **common):
    each = zip(weights, biases, shrinks, expands, router_biases, strict=True)
    return [
        reference.moe_lora(x, *linear, router_bias=router, **common) for *linear, router in each
    ]


def on_base(x, weights, biases, shrinks, expands, **common):
    bases = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    return moe_lora_group_add(bases, x, shrinks, expands, **common)


def check(function, inputs, dtype, adapter, backend, **common):
    common = {"scaling": 1.7, "seed": SEED, **common}
    exact = run(definition, inputs, torch.float64, torch.float64, **common)
    actual = run(functools.partial(function, backend=backend), inputs, dtype, adapter, **common)
    torchs = run(definition, inputs, dtype, adapter, **common)
    for place, (a, t, e) in enumerate(zip(actual, torchs, exact, strict=True)):
        if dtype == torch.float32:
            assert a.shape == e.shape
            # a single number may be the difference of larger ones, for torch as well
            assert relative_error(a, e) <= max(1e-5, 2 * relative_error(t, e)), place
        else:
            assert_within_budget(a, t, e, f"result {place}", rounded_to=dtype)


@settings(max_examples=trials(500), deadline=None, derandomize=True, phases=PHASES)
@given(
    tokens=st.integers(0, 50),
    columns=st.integers(1, 100),
    rank=st.integers(1, 20),
    experts=st.integers(1, 9),
    linears=st.integers(1, 3),
    biased=st.booleans(),
    routed=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.3]),
    temperature=st.sampled_from([1.0, 0.6]),
    backend=st.sampled_from(["gemm", "fused"]),
    function=st.sampled_from([moe_lora_group, on_base]),
)
def test_any_shape_in_float32(
    tokens, columns, rank, experts, linears, biased, routed, backend, function, **common
):
    inputs = group(tokens, columns, rank, experts, linears, tokens + columns, biased, routed)
    check(function, inputs, torch.float32, torch.float32, backend, **common)


@pytest.mark.parametrize("adapter", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["gemm", "fused"])
@pytest.mark.parametrize("tokens", [1, 16, 65])
def test_float16_is_within_twice_torch_s_error(tokens, backend, dropout_p, adapter):
    halves = [
        [None if v is None else v.half().double() for v in values]
        if isinstance(values, list)
        else values.half().double()
        for values in group(tokens, 96, 8, 4, 2, 7)
    ]
    check(moe_lora_group, halves, torch.float16, adapter, backend, dropout_p=dropout_p)


LAZY = {
    "negated": lambda t: torch._neg_view(-t),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}
APART = {
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("backend", ["gemm", "fused"])
@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("odd", [*LAZY, *APART])
def test_tensors_whose_memory_is_not_as_they_look(odd, tokens, backend):
    def outputs(x, weight, bias, shrink, expand, router, above):
        x = x.detach().requires_grad_()
        (y,) = moe_lora_group(
            x,
            [weight],
            [bias],
            [shrink],
            [expand],
            router_biases=[router],
            scaling=1.7,
            backend=backend,
        )
        return y.detach(), *torch.autograd.grad(y, x, above)

    x, *lists = group(tokens, 12, 2, 3, 1, 1)
    plain = [x.float(), *(values[0].float() for values in lists)]
    every = range(len(plain))
    for places in [[i] for i in every] if odd in LAZY else [every]:
        given = [{**LAZY, **APART}[odd](t) if i in places else t for i, t in enumerate(plain)]
        copies = [torch.zeros(t.shape).copy_(t) for t in given]
        torch.testing.assert_close(outputs(*given), outputs(*copies), msg=f"arguments {places}")


@pytest.mark.parametrize("function", [moe_lora_group, on_base])
@pytest.mark.parametrize("tokens", [2, 20])
def test_no_columns_and_no_features(tokens, function):
    x, weights, biases, shrinks, expands, routers, grads = group(tokens, 12, 2, 3, 2, 1)
    none = (
        x[:, :0],
        [w[:, :0] for w in weights],
        biases,
        [s[:, :0] for s in shrinks],
        expands,
        routers,
        grads,
    )
    check(function, none, torch.float32, torch.float32, "gemm")
    first = [[values[0][:0], values[1]] for values in (weights, expands)]
    few = (
        x,
        first[0],
        [biases[0][:0], None],
        shrinks,
        first[1],
        routers,
        [grads[0][:, :0], grads[1]],
    )
    check(function, few, torch.float32, torch.float32, "gemm")


@pytest.mark.parametrize("rank", [40, 128])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_ranks_beyond_the_kernels_take_the_library_s_products(rank, dropout_p):
    inputs = group(19, 48, rank, 4, 2, 3)
    check(moe_lora_group, inputs, torch.float32, torch.float32, "gemm", dropout_p=dropout_p)


def test_two_runs_give_the_same_bits():
    inputs = group(70, 96, 8, 4, 2, 5)
    common = {"scaling": 2.0, "dropout_p": 0.2, "seed": SEED, "backend": "gemm"}
    once, again = (
        run(moe_lora_group, inputs, torch.float16, torch.float32, **common) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_dropout_alone_is_the_definition_bit_for_bit():
    x = torch.randn(37, 50, dtype=torch.float16)
    from floe_triton.kernels.dropout import dropout

    assert torch.equal(dropout(x, 0.3, SEED), reference.dropout(x, 0.3, SEED))
    assert torch.equal(keyed_dropout(x, 0.3, SEED), reference.dropout(x, 0.3, SEED))


def launches(tokens, linears, backend, backward=False, dropout_p=0.0, base=False):
    """Names of the kernels that one call launches on an H100, and how many library products."""
    x, weights, _, shrinks, expands, _, grads = group(tokens, 256, 8, 4, linears, 0)
    to = functools.partial(torch.Tensor.to, device="meta", dtype=torch.bfloat16)
    arguments = [[None if t is None else to(t) for t in v] for v in (shrinks, expands)]
    frozen = [] if base else [to(w) for w in weights]
    bases = [to(g) for g in grads] if base else []
    given = gpu.Group(
        frozen,
        [None] * linears,
        bases,
        *arguments,
        [None] * linears,
        2.0,
        1.0,
        dropout_p,
        SEED.to("meta") if dropout_p else None,
        backend,
    )
    with launch.recording(90) as found:
        _, routed = gpu.forward(to(x), given)
    if not backward:
        return [one.kernel.__name__ for one in found]
    with launch.recording(90) as found:
        needs = gpu.Needs(True, True, True, False)
        gpu.backward([to(g) for g in grads], to(x), given, routed, needs)
    return [one.kernel.__name__ for one in found]


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("linears", [1, 2, 3])
def test_decoding_adds_two_launches_to_a_group(tokens, linears):
    assert len(launches(tokens, linears, "auto")) == 2


def test_a_group_reads_its_input_once_each_way():
    forward = launches(4096, 3, "gemm", dropout_p=0.05)
    assert sum(name.startswith("shrink") for name in forward) == 1
    backward = launches(4096, 3, "gemm", backward=True, dropout_p=0.05)
    assert sum(name.startswith("grad_x") or "backward_x" in name for name in backward) == 1


def test_a_foreign_base_is_passed_over_once():
    assert len(launches(4096, 1, "gemm", base=True)) <= 3
    x = torch.randn(20, 32)
    base, shrink, expand = torch.randn(20, 24), torch.randn(12, 32), torch.randn(24, 4, 8)
    before = base.clone()
    y = moe_lora_add(base, x, shrink, expand, scaling=1.0, backend="gemm")
    assert torch.equal(base, before)
    exact = base.double() + reference.moe_lora_delta(
        x.double(), shrink.double(), expand.double(), scaling=1.0
    )
    assert relative_error(y, exact) <= 1e-5
