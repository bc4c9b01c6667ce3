"""The way back (grad_y to the experts and the routing, x to A and the routers) in float64."""

import mmap

import pytest
import torch
from floe_triton import launch, reference, tuning
from floe_triton.group import Group, Routed
from floe_triton.kernels.backward import backward_x, backward_y, route_backward
from helpers.attack import trials
from helpers.budget import assert_within_budget, relative_error
from helpers.guarded import guarded, place
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

PHASES = (Phase.explicit, Phase.generate)  # the interpreter is too slow to shrink a failure
SEED = torch.tensor(2**40 + 77)
SCALING, TEMPERATURE = 1.7, 0.6


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def agree(found, torchs, exact, name):
    """Within 1e-5 in float32 (or torch's own error there), else within the budget."""
    assert found is not None, name
    if found.dtype == torch.float32:
        assert found.shape == exact.shape, name
        allowed = max(1e-5, 2 * relative_error(torchs, exact))
        assert relative_error(found, exact) <= allowed, name
    else:
        assert_within_budget(found, torchs, exact, name)


def products_backward(grads, x, rows, hidden_rows, dropout_p):
    """Gradients of x and of the rows through ``[dropout(x) A^T, x R^T]``, by autograd."""
    x, rows = x.detach().clone().requires_grad_(), rows.detach().clone().requires_grad_()
    dropped = x
    if dropout_p:
        keep = reference.dropout_keep(*x.shape, dropout_p, SEED)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dropped = torch.where(keep, wide * reference.dropout_scale(dropout_p), 0).to(x.dtype)
    products = torch.cat([dropped @ rows[:hidden_rows].T, x @ rows[hidden_rows:].T], dim=1)
    return torch.autograd.grad(products, (x, rows), grads)


def x_case(tokens, columns, count, dtype, gap=0):
    return (
        place(randn(tokens, count).to(dtype)),
        place(randn(tokens, columns).to(dtype), gap),
        place((randn(count, columns, seed=1) / columns**0.5).to(dtype)),
    )


def group_of(rank, experts, linears=1, expand_weights=None, dropout_p=0.0, seed=SEED):
    """A group of these sizes and settings; its other tensors are given apart."""
    expands = expand_weights or [torch.empty(0, experts, rank)] * linears
    seed = seed if dropout_p else None
    shrinks = [torch.empty(rank + experts, 0)] * len(expands)
    return Group([], [], [], shrinks, expands, [], SCALING, TEMPERATURE, dropout_p, seed)


def run_x(grads, x, rows, hidden_rows, dropout_p, needs=(True, True)):
    group = group_of(hidden_rows, len(rows) - hidden_rows, dropout_p=dropout_p)
    return backward_x(grads, x, rows, group, *needs)


def check_x(inputs, hidden_rows, dropout_p, needs=(True, True), device=(0, 16)):
    with guarded(), launch.assume(*device):
        found = run_x(*inputs, hidden_rows, dropout_p, needs)
    exact = products_backward(*[t.double() for t in inputs], hidden_rows, dropout_p)
    torchs = products_backward(*inputs, hidden_rows, dropout_p)
    for name, needed, *values in zip(("x", "rows"), needs, found, torchs, exact, strict=True):
        if needed:
            agree(*values, name)
        else:
            assert values[0] is None
    return found


@settings(max_examples=trials(500), deadline=None, derandomize=True, phases=PHASES)
@given(
    tokens=st.integers(1, 70),
    columns=st.integers(1, 200),
    linears=st.integers(1, 3),
    rank=st.integers(1, 40),
    experts=st.integers(1, 16),
    dropout_p=st.sampled_from([0.0, 0.05, 0.5]),
    gap=st.sampled_from([0, 3]),
    needs=st.sampled_from([(True, True), (True, True), (True, False), (False, True)]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_x_of_any_sizes(tokens, columns, linears, rank, experts, dropout_p, gap, needs, dtype):
    inputs = x_case(tokens, columns, linears * (rank + experts), dtype, gap)
    check_x(inputs, linears * rank, dropout_p, needs)


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("hidden_rows", [5, 60, 112])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_x_with_the_tiles_of_a_gpu(capability, hidden_rows, dropout_p, dtype):
    inputs = x_case(70, 200, hidden_rows + 16, dtype)
    check_x(inputs, hidden_rows, dropout_p, device=(capability, 132))


def test_x_in_many_stripes_the_same_bits_every_time():
    inputs = x_case(300, 40, 12, torch.float32)
    first, second = (check_x(inputs, 8, 0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_x_alone_has_the_same_bits(needs, dropout_p):
    inputs = x_case(70, 90, 12, torch.float32)
    both, one = check_x(inputs, 8, dropout_p), check_x(inputs, 8, dropout_p, needs)
    index = needs.index(True)
    assert torch.equal(both[index], one[index])


def test_x_of_half_with_adapters_of_single():
    grads, x, rows = x_case(40, 90, 12, torch.float16)
    halves = run_x(grads, x, rows, 8, 0.3)
    singles = run_x(grads, x, rows.float(), 8, 0.3)
    assert torch.equal(halves[0], singles[0])
    assert singles[1].dtype == torch.float32
    assert torch.equal(halves[1], singles[1].half())


def test_dropped_elements_count_nowhere_even_if_not_finite():
    grads, x, rows = x_case(33, 64, 12, torch.float32)
    grads[:, 8:] = 0.0  # the routers see every element
    keep = reference.dropout_keep(33, 64, 0.5, SEED)
    expected = run_x(grads, x, rows, 8, 0.5)
    x[~keep] = torch.nan
    found = run_x(grads, x, rows, 8, 0.5)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1][:8], expected[1][:8])


def test_x_with_columns_that_are_not_adjacent_and_repeated_rows():
    grads, x, rows = x_case(40, 40, 12, torch.float32)
    check_x((grads, x.T, rows), 8, 0.3)
    check_x((grads, x[:1].expand(40, -1), rows), 8, 0.3)


def test_rows_far_apart():
    far = 2**31 + 64  # elements, so that int32 offsets would wrap
    memory = mmap.mmap(-1, 2 * (far + 100), flags=mmap.MAP_PRIVATE)  # untouched pages are none
    x = torch.frombuffer(memory, dtype=torch.float16).as_strided((2, 90), (far, 1))
    x.copy_(randn(2, 90))
    grads, near, rows = randn(2, 12).half(), x.clone(), randn(12, 90).half()
    found = [run_x(grads, t, rows, 8, 0.3) for t in (near, x)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    inputs = y_case(2, 90, 3, 4, torch.float16)
    found = [run_y((t, *inputs[1:])) for t in (near, x)]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_x_without_tokens():
    grads, x, rows = x_case(1, 30, 12, torch.float32)
    grad_x, grad_rows = run_x(grads[:0], x[:0], rows, 8, 0.3)
    assert grad_x.shape == (0, 30)
    assert torch.equal(grad_rows, torch.zeros(12, 30))


def y_case(tokens, columns, rank, experts, dtype, gap=0):
    """grad_y, z as the forward rounds it, expand_weight, hidden and logits."""
    hidden, logits = randn(tokens, rank), 2 * randn(tokens, experts)
    z = routed(hidden, logits).to(dtype)
    expand = (randn(columns, experts, rank) / rank**0.5).to(dtype)
    return place(randn(tokens, columns).to(dtype), gap), place(z), place(expand), hidden, logits


def routed(hidden, logits):
    gate = torch.softmax(logits / TEMPERATURE, dim=1)
    return (SCALING * gate[:, :, None] * hidden[:, None, :]).flatten(1)


def experts_backward(grad_y, z, expand, hidden, logits):
    """Gradients of the experts, of hidden and of the logits, by autograd."""
    flat = expand.detach().clone().requires_grad_()
    (grad_expand,) = torch.autograd.grad(z @ flat.flatten(1).T, flat, grad_y)
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, logits)]
    y = routed(*leaves).to(grad_y.dtype) @ expand.flatten(1).T
    return grad_expand, *torch.autograd.grad(y, leaves, grad_y)


def run_y(inputs, g=0, linears=1, needs=(True, True), device=(0, 16)):
    grad_y, z, expand, hidden, logits = inputs
    rank, experts = hidden.shape[1], logits.shape[1]
    gate = torch.softmax(logits / TEMPERATURE, dim=1)
    grads = place(torch.full((len(z), linears * (rank + experts)), torch.nan)).to(grad_y.dtype)
    routed = Routed(*(alone(tensor, g, linears) for tensor in (hidden, gate, z)))
    group = group_of(rank, experts, expand_weights=[expand] * linears)
    with guarded(), launch.assume(*device):
        grad_expand = backward_y(grad_y, group, g, routed, grads, *needs)
    return grad_expand, grads


def alone(tensor, g, linears):
    """``tensor`` as what linear g has of a group's, [G, ...]; NaN for the others and around."""
    whole = place(torch.full((linears, *tensor.shape), torch.nan).to(tensor))
    whole[g] = tensor
    return whole


def check_y(inputs, g=0, linears=1, needs=(True, True), device=(0, 16)):
    grad_y, *_, hidden, logits = inputs
    grad_expand, grads = run_y(inputs, g, linears, needs, device)
    exact = experts_backward(*[t.double() for t in inputs])
    torchs = experts_backward(*inputs)
    if needs[0]:
        agree(grad_expand, torchs[0], exact[0], "expand")
    else:
        assert grad_expand is None
    rank, experts = hidden.shape[1], logits.shape[1]
    first, second = g * rank, linears * rank + g * experts
    if needs[1]:
        mine = grads[:, first : first + rank], grads[:, second : second + experts]
        agree(mine[0], torchs[1].to(grad_y.dtype), exact[1], "hidden")
        agree(mine[1], torchs[2].to(grad_y.dtype), exact[2], "logits")
        grads[:, first : first + rank] = grads[:, second : second + experts] = torch.nan
    assert grads.isnan().all(), "another linear's columns were written"
    return grad_expand


@settings(max_examples=trials(500), deadline=None, derandomize=True, phases=PHASES)
@given(
    tokens=st.integers(1, 70),
    columns=st.integers(1, 200),
    linears=st.integers(1, 3),
    g=st.integers(0, 2),
    rank=st.integers(1, 40),
    experts=st.integers(1, 16),
    gap=st.sampled_from([0, 3]),
    needs=st.sampled_from([(True, True), (True, True), (True, False), (False, True)]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_y_of_any_sizes(tokens, columns, linears, g, rank, experts, gap, needs, dtype):
    inputs = y_case(tokens, columns, rank, experts, dtype, gap)
    check_y(inputs, g % linears, linears, needs)


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("rank", [3, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_y_with_the_tiles_of_a_gpu(capability, rank, dtype):
    check_y(y_case(150, 600, rank, 4, dtype), device=(capability, 132))


def test_y_in_many_stripes_the_same_bits_every_time():
    inputs = y_case(300, 40, 4, 3, torch.float32)
    first, second = check_y(inputs), check_y(inputs)
    assert torch.equal(first, second)


def test_y_of_half_with_adapters_of_single():
    grad_y, z, expand, *others = y_case(40, 90, 4, 3, torch.float16)
    halves = run_y((grad_y, z, expand, *others))
    singles = run_y((grad_y, z, expand.float(), *others))
    assert torch.equal(halves[1], singles[1])
    assert singles[0].dtype == torch.float32
    assert torch.equal(halves[0], singles[0].half())


def test_y_as_a_sums_backward_gives_it():
    inputs = y_case(40, 50, 4, 3, torch.float32)
    ones = torch.ones(()).expand(40, 50)
    assert ones.stride() == (0, 0)
    check_y((ones, *inputs[1:]))


def test_y_without_tokens():
    inputs = y_case(1, 30, 4, 3, torch.float32)
    grad_y, z, expand, hidden, logits = inputs
    grad_expand, _ = run_y((grad_y[:0], z[:0], expand, hidden[:0], logits[:0]))
    assert torch.equal(grad_expand, torch.zeros_like(expand))


@settings(max_examples=30, deadline=None, derandomize=True, phases=PHASES)
@given(
    splits=st.integers(1, 5),
    tokens=st.integers(1, 40),
    rank=st.integers(1, 128),
    experts=st.integers(1, 16),
)
def test_routing_of_given_parts(splits, tokens, rank, experts):
    parts = place(randn(splits, tokens, experts * rank))
    hidden, logits = randn(tokens, rank), randn(tokens, experts)
    grads = place(torch.full((tokens, rank + experts), torch.nan))
    gate = place(torch.softmax(logits / TEMPERATURE, dim=1))
    saved = Routed(place(hidden)[None], gate[None], torch.empty(0))
    route_backward(parts, group_of(rank, experts), 0, saved, grads, None)
    for name, columns, index in (("hidden", slice(rank), 0), ("logits", slice(rank, None), 1)):
        values = []
        for dtype in (torch.float32, torch.float64):
            leaves = [t.to(dtype).requires_grad_() for t in (hidden, logits)]
            total = parts.sum(0, dtype=dtype)
            values.append(torch.autograd.grad(routed(*leaves), leaves, total)[index])
        agree(grads[:, columns], *values, name)


def record(capability, tokens, features, columns, rank, experts, dropout_p=0.05):
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    count, wide = rank + experts, torch.float32
    grads, seed = meta(tokens, count), meta(dtype=torch.int64)
    with launch.recording(capability) as launches:
        expand = [meta(columns, experts, rank)]
        group = group_of(rank, experts, 1, expand, dropout_p, seed)
        hidden, gate = (meta(1, tokens, n, dtype=wide) for n in (rank, experts))
        routed = Routed(hidden, gate, meta(1, tokens, experts * rank))
        backward_y(meta(tokens, columns), group, 0, routed, grads, True, True)
        backward_x(grads, meta(tokens, features), meta(count, features), group, True, True)
    return launches


def test_grad_y_and_x_are_read_once():
    launches = record(90, 16384, 4096, 11008, 8, 4)
    assert [one.kernel.__name__ for one in launches] == [
        "grad_y_kernel",
        "route_backward_kernel",
        "sum_parts_kernel",
        "grad_x_kernel",
        "sum_parts_kernel",
    ]
    grad_y, _, _, grad_x, _ = launches
    assert grad_y.grid == (22, 6)  # at most one program on each of 132 multiprocessors
    assert grad_y.flops == 4 * 16384 * 11008 * 32
    parts = 4 * 32 * (22 * 16384 + 6 * 11008)
    assert grad_y.bytes == 2 * (16384 * (11008 + 32) + 11008 * 32) + parts
    assert grad_x.flops == 4 * 16384 * 4096 * 12
    stripes = grad_x.grid[1]
    once = 2 * (2 * 16384 * 4096 + 16384 * 12 + 12 * 4096)
    assert grad_x.bytes == once + 4 * stripes * 12 * 4096 + 8
    assert 4 * stripes * 12 * 4096 < 0.02 * once


@pytest.mark.parametrize("tokens", [1, 17, 127, 1024, 16384, 100_003])
@pytest.mark.parametrize("capability", [0, 80, 90])
def test_stripes_cover_the_tokens_in_whole_tiles(tokens, capability):
    with launch.assume(capability, 132) as device:
        blocks = tuning.grad_y_blocks(device, 32, 2)
    for columns in (1, 8, 500):
        stripe = tuning.stripe(device, tokens, columns, blocks, 8)
        assert stripe % blocks.constants["BLOCK_T"] == 0
        assert -(-tokens // stripe) * columns <= max(columns, 8 * 132 // blocks.num_warps)
        assert -(-tokens // stripe) <= max(1, tokens // 32)
