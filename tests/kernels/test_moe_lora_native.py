"""The native products of the MoE-LoRA linear, each against float64 in plain torch."""

import pytest
import torch
from floe_triton import reference
from helpers.budget import assert_within_budget, relative_error
from helpers.lora_cases import draw

import floe.ops  # noqa: F401 - loads the operators

OPS = torch.ops.floe
SEED = torch.tensor(2**61 + 12345)
SCALING, TEMPERATURE = 2.0, 0.7
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DTYPES = pytest.mark.parametrize(
    ("dtype", "adapter"),
    [*((dtype, dtype) for dtype in FLOATS), *((dtype, torch.float32) for dtype in FLOATS[:2])],
    ids=["bf16", "fp16", "fp32", "fp64", "bf16-fp32-adapter", "fp16-fp32-adapter"],
)
# T, K, N of each linear, r, M: one of everything, odd sizes, groups, tiles and chunks that end in
# the middle
SHAPES = [
    (1, 1, [1], 1, 1),
    (0, 20, [7], 3, 2),
    (5, 40, [33], 3, 5),
    (33, 257, [300, 5, 64], 8, 4),
    (70, 129, [260, 31], 2, 1),
    (37, 600, [48], 17, 3),
    (1050, 64, [34], 8, 10),
]
SHAPED = pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)).replace(" ", "")
)
DROPPED = pytest.mark.parametrize("p", [0.0, 0.3], ids=["kept", "dropped"])


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def drawn(dtype, *shape, seed=0, scale=1.0):
    """Numbers of ``dtype``, and the same numbers in float64."""
    values = draw(*shape, seed=seed, scale=scale).to(dtype)
    return values, values.double()


def parameters(adapter, dtype, shapes, seed, scale=1.0):
    """Parameters kept in ``adapter``, and in float64 what computing in ``dtype`` makes of them."""
    stored = [
        draw(*shape, seed=seed + g, scale=scale).to(adapter) for g, shape in enumerate(shapes)
    ]
    return stored, [one.to(dtype).double() for one in stored]


def keep_of(tokens, columns, p):
    """What the dropout multiplies by, [T, K], float64."""
    if p == 0.0:
        return torch.ones(tokens, columns, dtype=torch.float64)
    keep = reference.dropout_keep(tokens, columns, p, SEED)
    return keep.double() * reference.dropout_scale(p)


def check(actual, plain, exact, name, rounded_to=None):
    """``plain``: the same formula in plain torch, computed in ``rounded_to``."""
    assert actual.is_contiguous(), name
    if actual.dtype == torch.float64:  # the truth's own dtype: sums in another order
        assert actual.shape == exact.shape, name
        assert relative_error(actual, exact) <= 1e-14, name
        return
    assert_within_budget(actual, plain.to(actual.dtype), exact, name, rounded_to)


def shrinks_of(shape, dtype, adapter):
    _, columns, features, rank, experts = shape
    shapes = [(rank + experts, columns)] * len(features)
    return parameters(adapter, dtype, shapes, seed=20, scale=columns**-0.5)


def expands_of(shape, dtype, adapter):
    _, _, features, rank, experts = shape
    shapes = [(count, experts, rank) for count in features]
    return parameters(adapter, dtype, shapes, seed=30, scale=rank**-0.5)


def experts(x, shrinks, expands, *, routers=(), biases=(), bases=(), p=0.0, gates=(), top_k=0):
    seed = SEED if p else None
    numbers = SCALING, TEMPERATURE, p, seed
    added = [*routers], [*biases], [*bases]
    return OPS.moe_lora_experts(x, shrinks, expands, *added, *numbers, [*gates], top_k)


def gated(logits, router):
    return torch.softmax((logits if router is None else logits + router) / TEMPERATURE, -1)


def spread(gate, hidden):
    """z [T, M r]."""
    return (SCALING * gate[..., None] * hidden[..., None, :]).flatten(-2)


@SHAPED
@DTYPES
@DROPPED
@pytest.mark.parametrize("biased", [False, True])
def test_hidden_gate_and_z(shape, dtype, adapter, p, biased):
    tokens, columns, features, rank, count = shape
    x, x_exact = drawn(dtype, tokens, columns, seed=1)
    shrinks, exact = shrinks_of(shape, dtype, adapter)
    expands, _ = expands_of(shape, dtype, adapter)
    routers, routers_exact = parameters(adapter, adapter, [(count,)] * len(features), seed=4)
    keep = keep_of(tokens, columns, p)
    _, hidden, gate, z = experts(x, shrinks, expands, routers=routers if biased else (), p=p)
    assert [one.dtype for one in (hidden, gate, z)] == [wide(dtype), wide(dtype), dtype]
    for g in range(len(features)):
        shrink = shrinks[g].to(dtype)
        plain = (x * keep.to(dtype)) @ shrink[:rank].T, (x @ shrink[rank:].T).to(wide(dtype))
        truth = (x_exact * keep) @ exact[g][:rank].T, x_exact @ exact[g][rank:].T
        router = routers[g].to(wide(dtype)) if biased else None
        right = gated(truth[1], routers_exact[g] if biased else None)
        check(hidden[g], plain[0], truth[0], "hidden")
        check(gate[g], gated(plain[1], router), right, "gate")
        # of what was found: only z's own arithmetic and its one rounding
        check(z[g], spread(gate[g], hidden[g]), spread(gate[g].double(), hidden[g].double()), "z")


def test_gate_of_large_logits_is_finite():
    shrink = torch.tensor([[1.0], [2e38], [-2e38]])
    _, _, gate, _ = experts(torch.ones(1, 1), [shrink], [torch.ones(1, 2, 1)])
    assert gate.tolist() == [[[1.0, 0.0]]]


@SHAPED
@DTYPES
@pytest.mark.parametrize("added", ["nothing", "bias", "base", "both"])
def test_output(shape, dtype, adapter, added):
    tokens, columns, features, _, _ = shape
    x, _ = drawn(dtype, tokens, columns, seed=5)
    shrinks, _ = shrinks_of(shape, dtype, adapter)
    expands, exact = expands_of(shape, dtype, adapter)
    none = [(None, None)] * len(features)
    biases = [drawn(dtype, n, seed=7) for n in features] if added in ("bias", "both") else none
    bases = (
        [drawn(dtype, tokens, n, seed=8) for n in features] if added in ("base", "both") else none
    )
    ys, _, _, z = experts(
        x,
        shrinks,
        expands,
        biases=[bias for bias, _ in biases],
        bases=[base for base, _ in bases if base is not None],
    )

    def product(z, weight, bias, base):
        y = z @ weight.flatten(1).T
        y = y if bias is None else y + bias
        return y if base is None else y + base

    for g, y in enumerate(ys):
        assert y.dtype == dtype
        (bias, bias_exact), (base, base_exact) = biases[g], bases[g]
        plain = product(z[g], expands[g].to(dtype), bias, base)
        check(y, plain, product(z[g].double(), exact[g], bias_exact, base_exact), "y")


def backward_case(shape, dtype, adapter):
    """x, shrinks, expands, what forward leaves, and the outputs' gradients."""
    tokens, columns, features, rank, count = shape
    x, _ = drawn(dtype, tokens, columns, seed=9)
    shrinks, _ = shrinks_of(shape, dtype, adapter)
    expands, _ = expands_of(shape, dtype, adapter)
    hidden, _ = drawn(wide(dtype), len(features), tokens, rank, seed=10)
    gate = torch.softmax(draw(len(features), tokens, count, seed=11), -1).to(wide(dtype))
    z = spread(gate, hidden).to(dtype)
    grads = [drawn(dtype, tokens, n, seed=12 + g, scale=n**-0.5)[0] for g, n in enumerate(features)]
    return x, shrinks, expands, (hidden, gate, z), grads


def grad_products(grad_ys, expands, hidden, gate):
    """[T, P] in the dtype of all of them: gradients of hidden, then of the logits."""
    hiddens, logits = [], []
    for g, (grad_y, expand) in enumerate(zip(grad_ys, expands, strict=True)):
        grad_z = SCALING * (grad_y @ expand.flatten(1)).unflatten(1, expand.shape[1:])
        hiddens.append((gate[g][:, :, None] * grad_z).sum(1))
        grad_gate = (grad_z * hidden[g][:, None]).sum(2)
        mean = (gate[g] * grad_gate).sum(1, keepdim=True)
        logits.append(gate[g] * (grad_gate - mean) / TEMPERATURE)
    return torch.cat([*hiddens, *logits], 1)


@SHAPED
@DTYPES
@DROPPED
@pytest.mark.parametrize(
    ("needs_x", "needs_shrink", "needs_expand"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True)],
)
def test_backward(shape, dtype, adapter, p, needs_x, needs_shrink, needs_expand):
    tokens, columns, features, rank, _ = shape
    x, shrinks, expands, saved, grad_ys = backward_case(shape, dtype, adapter)
    grad_x, grad_shrink, grad_expand, grads, _ = OPS.moe_lora_experts_backward(
        grad_ys,
        x,
        shrinks,
        expands,
        *saved,
        SCALING,
        TEMPERATURE,
        p,
        SEED if p else None,
        needs_x,
        needs_shrink,
        needs_expand,
        False,
    )
    hidden, gate, z = saved
    plain = grad_products(
        grad_ys, [e.to(dtype) for e in expands], *(s.to(dtype) for s in saved[:2])
    )
    rounded = [e.to(dtype).double() for e in expands]
    truth = grad_products([g.double() for g in grad_ys], rounded, hidden.double(), gate.double())
    assert grads.dtype == wide(dtype)
    check(grads, plain, truth, "grads")
    assert grad_x.numel() == needs_x * x.numel()
    assert [len(grad_shrink), len(grad_expand)] == [
        needs_shrink * len(features),
        needs_expand * len(features),
    ]
    # the rest, of the grads found
    for g, found in enumerate(grad_expand):
        grad, weight = grad_ys[g], expands[g]
        assert found.dtype == adapter
        exact = (grad.double().T @ z[g].double()).view(weight.shape)
        check(found, (grad.T @ z[g]).view(weight.shape), exact, "grad_expand")
    keep, split = keep_of(tokens, columns, p), len(features) * rank

    def rows(parameters):
        return torch.cat([s[:rank] for s in parameters]), torch.cat([s[rank:] for s in parameters])

    def of_x(grads, parameters, keep):
        a, routers = rows(parameters)
        return keep * (grads[:, :split] @ a) + grads[:, split:] @ routers

    def of_rows(grads, x, keep):
        both = grads[:, :split].T @ (keep * x), grads[:, split:].T @ x
        parts = [part.split(len(part) // len(features)) for part in both]
        return [torch.cat(pair) for pair in zip(*parts, strict=True)]

    here, exact_shrinks = grads.to(dtype), [s.to(dtype).double() for s in shrinks]
    if needs_x:
        assert grad_x.dtype == dtype
        narrow = of_x(here, [s.to(dtype) for s in shrinks], keep.to(dtype))
        check(grad_x, narrow, of_x(grads.double(), exact_shrinks, keep), "grad_x")
    if needs_shrink:
        exact = of_rows(grads.double(), x.double(), keep)
        narrow = of_rows(here, x, keep.to(dtype))
        for found, one, right in zip(grad_shrink, narrow, exact, strict=True):
            assert found.dtype == adapter
            check(found, one, right, "grad_shrink", rounded_to=dtype)  # the grads are


def one_hot(dtype, tokens, columns):
    """x of ones and an A that shows each of its columns; nothing else matters."""
    x, a = torch.ones(tokens, columns, dtype=dtype), torch.eye(columns, dtype=dtype)
    shrink = torch.cat([a, torch.zeros(1, columns, dtype=dtype)])
    return x, shrink, torch.ones(1, 1, columns, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_dropout_is_that_of_the_definition(dtype):
    """Ones through a one-hot A show every keep bit; a group's linears share them."""
    tokens, columns, p = 40, 300, 0.3
    x, shrink, expand = one_hot(dtype, tokens, columns)
    expected = keep_of(tokens, columns, p).float()
    _, hidden, gate, z = experts(x, [shrink] * 2, [expand] * 2, p=p)
    assert torch.equal(hidden.float(), torch.stack([expected, expected]))
    grad_ys = [torch.ones(tokens, 1, dtype=dtype)] * 2
    grad_x, *_ = OPS.moe_lora_experts_backward(
        grad_ys,
        x,
        [shrink] * 2,
        [expand] * 2,
        hidden,
        gate,
        z,
        1.0,
        1.0,
        p,
        SEED,
        True,
        False,
        False,
        False,
    )
    assert torch.equal(grad_x != 0, expected != 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dropped_values_may_be_infinite(dtype):
    tokens, columns, p = 9, 200, 0.5
    keep = keep_of(tokens, columns, p) != 0
    x = torch.randn(tokens, columns).to(dtype)
    infinite, zeros = (x.masked_fill(~keep, value) for value in (float("inf"), 0.0))
    shrink = torch.randn(4, columns).to(dtype)
    shrink[3] = 0  # the router sees x undropped: its logits would be infinite
    expand = torch.randn(5, 1, 3).to(dtype)
    _, expected, gate, z = experts(zeros, [shrink], [expand], p=p)
    assert torch.equal(experts(infinite, [shrink], [expand], p=p)[1], expected)
    grads = [torch.randn(tokens, 5).to(dtype)]
    found, right = (
        OPS.moe_lora_experts_backward(
            grads,
            one,
            [shrink],
            [expand],
            expected,
            gate,
            z,
            1.0,
            1.0,
            p,
            SEED,
            False,
            True,
            False,
            False,
        )[1][0][:3]
        for one in (infinite, zeros)
    )
    assert torch.equal(found, right)


def test_strides_do_not_matter():
    x, shrink, expand = (
        torch.randn(64, 30).T,
        torch.randn(64, 8).T,
        torch.randn(3, 5, 20).permute(2, 1, 0),
    )
    grad_y = torch.ones(20, 30).T
    runs = []
    for given in (
        (x, shrink, expand, grad_y),
        [t.contiguous() for t in (x, shrink, expand, grad_y)],
    ):
        x, shrink, expand, grad_y = given
        ys, *saved = experts(x, [shrink], [expand], p=0.2)
        grad_x, grad_shrink, grad_expand, grads, _ = OPS.moe_lora_experts_backward(
            [grad_y], x, [shrink], [expand], *saved, 1.0, 1.0, 0.2, SEED, True, True, True, False
        )
        runs.append([*ys, *saved, grad_x, *grad_shrink, *grad_expand, grads])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
