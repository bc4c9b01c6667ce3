"""The way in (products with A and the routers, softmax, z) against its formula in float64."""

import pytest
import torch
from floe_triton import launch, reference
from floe_triton.group import Group, Routed
from floe_triton.kernels.shrink import route, shrink
from helpers.attack import trials
from helpers.budget import assert_within_budget, relative_error
from helpers.guarded import guarded, place
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

PHASES = (Phase.explicit, Phase.generate)  # the interpreter is too slow to shrink a failure

SEED = torch.tensor(2**40 + 77)


def formula(x, rows, router_bias, groups, rank, experts, scaling, temperature, dropout_p):
    """Hidden [G, T, r], gate [G, T, M] and z [G, T, M r], in the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dropped = x
    if dropout_p:
        keep = reference.dropout_keep(*x.shape, dropout_p, SEED)
        dropped = torch.where(keep, x.to(wide) * reference.dropout_scale(dropout_p), 0).to(x.dtype)
    a, routers = rows[: groups * rank], rows[groups * rank :]
    hidden = (dropped @ a.T).view(-1, groups, rank).transpose(0, 1)
    logits = (x @ routers.T).view(-1, groups, experts).transpose(0, 1).to(wide)
    if router_bias is not None:
        logits = logits + router_bias[:, None].to(wide)
    gate = torch.softmax(logits / temperature, dim=-1)
    z = scaling * gate[..., None] * hidden.to(wide)[..., None, :]
    return hidden.to(wide), gate, z.flatten(2).to(x.dtype)


def case(tokens, columns, groups, rank, experts, dtype=torch.float32, bias=True, gap=0):
    generator = torch.Generator().manual_seed(tokens * 1009 + columns)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x = place(draw(tokens, columns).to(dtype), gap)
    rows = place((draw(groups * (rank + experts), columns) / columns**0.5).to(dtype))
    return x, rows, place(draw(groups, experts)) if bias else None


def group_of(
    groups, rank, experts, router_bias, scaling=1.0, temperature=1.0, dropout_p=0.0, seed=SEED
):
    """A group of these sizes and settings; its rows are given apart."""
    routers = [None] * groups if router_bias is None else list(router_bias)
    expands = [torch.empty(0, experts, rank)] * groups
    shrinks = [torch.empty(rank + experts, 0)] * groups
    return Group([], [], [], shrinks, expands, routers, scaling, temperature, dropout_p, seed)


def shrink_route(x, rows, group):
    """The launch, or both."""
    found = shrink(x, rows, group)
    return found if isinstance(found, Routed) else route(found, group, x.dtype)


def check(dtype, inputs, *, device=None, **sizes):
    settings = {"scaling": 1.7, "temperature": 0.6, "dropout_p": 0.0, **sizes}
    x, rows, router_bias = inputs
    group = group_of(router_bias=router_bias, **settings)
    group.router_bias = lambda: router_bias  # as it lies, with poison around
    with guarded(), launch.assume(*(device or (0, 1))):
        routed = shrink_route(x, rows, group)
    exact = formula(*[None if t is None else t.double() for t in inputs], **settings)
    torchs = formula(*inputs, **settings)
    found = (routed.hidden, routed.gate, routed.z)
    for name, a, t, e in zip(("hidden", "gate", "z"), found, torchs, exact, strict=True):
        if dtype == torch.float32:
            assert a.dtype == dtype
            assert a.shape == e.shape
            assert relative_error(a, e) <= 1e-5, name
        else:
            assert_within_budget(a, t, e, name, rounded_to=dtype)
    return routed


@settings(max_examples=trials(500), deadline=None, derandomize=True, phases=PHASES)
@given(
    tokens=st.integers(1, 70),
    columns=st.integers(1, 200),
    groups=st.integers(1, 3),
    rank=st.integers(1, 40),
    experts=st.integers(1, 16),
    dropout_p=st.sampled_from([0.0, 0.05, 0.5]),
    bias=st.booleans(),
    gap=st.sampled_from([0, 3]),
    multiprocessors=st.sampled_from([1, 16]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_sizes(
    tokens, columns, groups, rank, experts, dropout_p, bias, gap, multiprocessors, dtype
):
    inputs = case(tokens, columns, groups, rank, experts, dtype, bias, gap)
    check(
        dtype,
        inputs,
        device=(0, multiprocessors),
        groups=groups,
        rank=rank,
        experts=experts,
        dropout_p=dropout_p,
    )


@settings(max_examples=30, deadline=None, derandomize=True, phases=PHASES)
@given(
    splits=st.integers(1, 5),
    tokens=st.integers(1, 70),
    groups=st.integers(1, 3),
    rank=st.integers(1, 128),
    experts=st.integers(1, 16),
    bias=st.booleans(),
)
def test_routing_of_given_products(splits, tokens, groups, rank, experts, bias):
    generator = torch.Generator().manual_seed(tokens)
    width = groups * (rank + experts)
    products = place(torch.randn(splits, tokens, width, generator=generator))
    router_bias = place(torch.randn(groups, experts, generator=generator)) if bias else None
    sizes = {"groups": groups, "rank": rank, "experts": experts}
    sizes |= {"scaling": 0.3, "temperature": 2.5}
    group = group_of(router_bias=router_bias, **sizes)
    group.router_bias = lambda: router_bias  # as it lies, with poison around
    with guarded():
        routed = route(products, group, torch.float16)
    # the products of x = the sums themselves with the identity are those sums
    identity = torch.eye(width, dtype=torch.float64)
    double = None if router_bias is None else router_bias.double()
    exact = formula(products.double().sum(0), identity, double, dropout_p=0.0, **sizes)
    assert relative_error(routed.hidden, exact[0]) <= 1e-5
    assert relative_error(routed.gate, exact[1]) <= 1e-5
    assert routed.z.dtype == torch.float16
    assert relative_error(routed.z, exact[2]) <= torch.finfo(torch.float16).eps / 2


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_parts_are_summed_in_one_order(dropout_p):
    inputs = case(5, 200, 2, 5, 3)
    sizes = {"groups": 2, "rank": 5, "experts": 3, "dropout_p": dropout_p}
    with launch.assume(0, 16), launch.recording(0, 16) as launches:
        x, rows, bias = (t.to("meta") for t in inputs)
        shrink_route(x, rows, group_of(router_bias=bias, seed=SEED.to("meta"), **sizes))
    assert [one.kernel.__name__ for one in launches] == ["shrink_kernel", "route_kernel"]
    assert launches[0].grid == (1, 2)
    first, second = (check(torch.float32, inputs, device=(0, 16), **sizes) for _ in range(2))
    for a, b in zip(vars(first).values(), vars(second).values(), strict=True):
        assert torch.equal(a, b)


def test_enough_tokens_are_routed_where_they_are_multiplied():
    with launch.recording(90) as launches:
        meta = torch.empty(16384, 4096, dtype=torch.bfloat16, device="meta")
        shrink_route(meta, meta[:12], group_of(1, 8, 4, None))
    (one,) = launches
    assert one.grid == (256, 1)
    assert one.flops == 2 * 16384 * 4096 * 12
    assert one.bytes == 2 * 4096 * (16384 + 12) + 16384 * (4 * 8 + 4 * 4 + 2 * 32)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_with_the_tiles_of_a_gpu(capability, dropout_p, multiprocessors):
    inputs = case(70, 200, 3, 5, 3)
    check(
        torch.float32,
        inputs,
        device=(capability, multiprocessors),
        groups=3,
        rank=5,
        experts=3,
        dropout_p=dropout_p,
    )


def test_no_tokens_are_no_launch():
    x, rows, bias = case(1, 40, 2, 3, 2)
    routed = shrink_route(x[:0], rows, group_of(2, 3, 2, bias))
    assert [tuple(t.shape) for t in vars(routed).values()] == [(2, 0, 3), (2, 0, 2), (2, 0, 6)]


def test_strided_columns_and_float_adapters_of_half_inputs():
    x, rows, bias = case(20, 80, 1, 4, 3, torch.float16)
    strided = torch.stack([x, x], dim=2)[:, :, 0]
    assert strided.stride(1) == 2
    check(torch.float16, (strided, rows, bias), groups=1, rank=4, experts=3)
    group = group_of(1, 4, 3, bias)
    half, single = (shrink_route(x, r, group) for r in (rows, rows.float()))
    assert torch.equal(half.z, single.z)


def test_dropped_elements_do_not_count_even_if_infinite():
    x, rows, bias = case(8, 64, 1, 4, 3)
    keep = reference.dropout_keep(8, 64, 0.5, SEED)
    group = group_of(1, 4, 3, bias, dropout_p=0.5)
    expected = shrink_route(x.clone(), rows, group).hidden
    x[~keep] = torch.inf
    rows[4:] = 0.0  # the router sees every element
    with pytest.warns(RuntimeWarning, match="invalid value"):  # numpy's, for the router's inf * 0
        found = shrink_route(x, rows, group).hidden
    assert torch.equal(found, expected)
