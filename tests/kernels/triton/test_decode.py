"""Few tokens, a group in two launches: against the definition in float64."""

import dataclasses

import pytest
import torch
from floe_triton import launch, tuning
from floe_triton.group import Group
from floe_triton.kernels.expand import decode_expand
from floe_triton.kernels.expand import expand as expand_alone
from floe_triton.kernels.shrink import MAX_TOKENS, decode_shrink, route
from helpers.budget import assert_within_budget, relative_error
from helpers.guarded import guarded, place
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

PHASES = (Phase.explicit, Phase.generate)  # the interpreter is too slow to shrink a failure


def group_of(columns, features, rank, experts, dtype, adapter, router_bias, bias, tokens=None):
    generator = torch.Generator().manual_seed(columns * 31 + sum(features))

    def draw(*shape, over=1, to=adapter):
        return place((torch.randn(*shape, generator=generator) / over**0.5).to(to))

    return Group(
        weights=[] if tokens else [draw(n, columns, over=columns, to=dtype) for n in features],
        biases=[]
        if tokens
        else [draw(n, to=dtype) if bias >> g & 1 else None for g, n in enumerate(features)],
        base_outputs=[draw(tokens, n, to=dtype) for n in features] if tokens else [],
        shrink_weights=[draw(rank + experts, columns, over=columns) for _ in features],
        expand_weights=[draw(n, experts, rank, over=rank) for n in features],
        router_biases=[draw(experts) if router_bias else None for _ in features],
        scaling=1.7,
        temperature=0.6,
        dropout_p=0.0,
        seed=None,
    )


def decode(x, group):
    """The launches: two, or with wide float32 experts one that routes and one per linear."""
    products = decode_shrink(x, group)
    pads = tuning.decode_pads(group.rank, group.experts)
    if not tuning.decode_expands_apart(pads, x.element_size()):
        return decode_expand(products, group, x.dtype)
    routed = route(products, group, x.dtype)
    added = [(group.bias(g), group.base_output(g)) for g in range(len(group))]
    each = zip(routed.z, group.expand_weights, added, strict=True)
    return [expand_alone(z, weight, *both) for z, weight, both in each], routed


def formula(x, group):
    """Per linear: hidden, gate, z and y, in x's dtype and its wide one."""
    wide = torch.promote_types(x.dtype, torch.float32)
    none = [None] * len(group)
    biases, bases = group.biases or none, group.base_outputs or none
    for g, (shrink, expand) in enumerate(
        zip(group.shrink_weights, group.expand_weights, strict=True)
    ):
        products = (x @ shrink.to(x.dtype).T).to(wide)
        hidden, logits = products[:, : group.rank], products[:, group.rank :]
        if group.router_biases[g] is not None:
            logits = logits + group.router_biases[g]
        gate = torch.softmax(logits / group.temperature, dim=-1)
        z = (group.scaling * gate[:, :, None] * hidden[:, None, :]).flatten(1).to(x.dtype)
        y = z @ expand.flatten(1).to(x.dtype).T
        added = bases[g] if bases[g] is not None else biases[g]
        yield hidden, gate, z, y if added is None else y + added


def in_double(group):
    def double(value):
        if isinstance(value, torch.Tensor):
            return value.double()
        return [double(v) for v in value] if isinstance(value, list) else value

    return dataclasses.replace(group, **{k: double(v) for k, v in vars(group).items()})


def check(x, group, device=(0, 1)):
    with guarded(), launch.assume(*device):
        outputs, routed = decode(x, group)
    exact, torchs = formula(x.double(), in_double(group)), formula(x, group)
    for g, (exacts, theirs) in enumerate(zip(exact, torchs, strict=True)):
        ours = (routed.hidden[g], routed.gate[g], routed.z[g], outputs[g])
        for name, a, t, e in zip(("hidden", "gate", "z", "y"), ours, theirs, exacts, strict=True):
            if x.dtype == torch.float32:
                assert a.shape == e.shape
                assert a.dtype == t.dtype
                assert relative_error(a, e) <= 1e-5, (name, g)
            else:
                assert_within_budget(a, t, e, f"{name} of {g}", rounded_to=x.dtype)


@settings(max_examples=60, deadline=None, derandomize=True, phases=PHASES)
@given(
    tokens=st.integers(1, MAX_TOKENS),
    columns=st.integers(1, 200),
    features=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    rank=st.integers(1, 40),
    experts=st.integers(1, 16),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    adapter=st.sampled_from([torch.float32, torch.float16]),
    router_bias=st.booleans(),
    bias=st.integers(0, 15),
    base=st.booleans(),
    gap=st.sampled_from([0, 3]),
)
def test_any_sizes(
    tokens, columns, features, rank, experts, dtype, adapter, router_bias, bias, base, gap
):
    group = group_of(
        columns, features, rank, experts, dtype, adapter, router_bias, bias, base and tokens
    )
    generator = torch.Generator().manual_seed(tokens)
    x = place(torch.randn(tokens, columns, generator=generator).to(dtype), gap)
    check(x, group)


def test_with_the_tiles_of_a_gpu():
    group = group_of(200, [70, 300], 5, 3, torch.float32, torch.float32, True, 1)
    x = torch.randn(3, 200)
    for device in ((80, 108), (90, 132), (90, 4)):
        check(x, group, device)


def test_it_is_two_launches_without_a_copy():
    group = group_of(4096, [4096, 1024, 1024], 8, 4, torch.float32, torch.float32, True, 7)
    on_meta = {
        key: [t.to("meta") for t in value] if isinstance(value, list) else value
        for key, value in vars(group).items()
    }
    with launch.recording(90) as launches:
        decode(torch.empty(1, 4096, device="meta"), dataclasses.replace(group, **on_meta))
    assert [(one.kernel.__name__, one.grid[1]) for one in launches] == [
        ("decode_shrink_kernel", 3),
        ("decode_expand_kernel", 3),
    ]
    rows = 3 * 12 * 4096
    products = launches[0].arguments["products"].numel()
    assert launches[0].bytes == 4 * (4096 + rows + products)


def test_what_it_does_not_serve_it_names():
    group = group_of(32, [8], 4, 2, torch.float32, torch.float32, False, 0)
    with pytest.raises(ValueError, match="x must have at most 16 tokens, got 17"):
        decode(torch.zeros(17, 32), group)
    with pytest.raises(ValueError, match=r"dropout_p must be 0, got 0\.5"):
        decode(torch.zeros(1, 32), dataclasses.replace(group, dropout_p=0.5))
    five = group_of(32, [8] * 5, 4, 2, torch.float32, torch.float32, False, 0)
    with pytest.raises(ValueError, match="a group must have at most 4 linears, got 5"):
        decode(torch.zeros(1, 32), five)
