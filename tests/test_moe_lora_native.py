"""The native products of the MoE-LoRA linear, each against float64 in plain torch."""

import pytest
import torch
from budget import assert_within_budget, relative_error
from floe_triton import reference
from lora_cases import draw

import floe.ops  # noqa: F401 - loads the operators

OPS = torch.ops.floe
SEED = torch.tensor(2**61 + 12345)
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DTYPES = pytest.mark.parametrize(
    ("dtype", "adapter"),
    [*((dtype, dtype) for dtype in FLOATS), *((dtype, torch.float32) for dtype in FLOATS[:2])],
    ids=["bf16", "fp16", "fp32", "fp64", "bf16-fp32-adapter", "fp16-fp32-adapter"],
)
# T, K, N, r, M, G: one of everything, odd sizes, groups, tiles and chunks that end in the middle
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (0, 20, 7, 3, 2, 1),
    (5, 40, 33, 3, 5, 1),
    (33, 257, 300, 8, 4, 3),
    (70, 129, 260, 2, 1, 2),
    (37, 600, 48, 17, 3, 1),
    (1050, 64, 34, 8, 10, 1),
]
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
DROPPED = pytest.mark.parametrize("p", [0.0, 0.3], ids=["kept", "dropped"])


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def drawn(dtype, *shape, seed=0, scale=1.0):
    """Numbers of ``dtype``, and the same numbers in float64."""
    values = draw(*shape, seed=seed, scale=scale).to(dtype)
    return values, values.double()


def parameter(adapter, dtype, *shape, seed=0, scale=1.0):
    """A parameter kept in ``adapter``; computing rounds it to ``dtype`` first."""
    values = draw(*shape, seed=seed, scale=scale).to(adapter)
    return values, values.to(dtype).double()


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


def shrink_case(shape, dtype, adapter):
    tokens, columns, _, rank, experts, groups = shape
    x, x_exact = drawn(dtype, tokens, columns, seed=1)
    count = groups * (rank + experts)
    rows, rows_exact = parameter(
        adapter, dtype, count, columns, seed=2, scale=max(columns, 1) ** -0.5
    )
    return x, rows, x_exact, rows_exact, groups * rank


@SHAPED
@DTYPES
@DROPPED
def test_shrink(shape, dtype, adapter, p):
    x, rows, x_exact, rows_exact, hidden = shrink_case(shape, dtype, adapter)
    keep = keep_of(*x.shape, p)

    def products(x, rows, keep):
        return torch.cat([(x * keep) @ rows[:hidden].T, x @ rows[hidden:].T], 1)

    actual = OPS.shrink(x, rows, hidden, p, SEED if p else None)
    assert actual.dtype == wide(dtype)
    plain = products(x, rows.to(dtype), keep.to(dtype))
    check(actual, plain, products(x_exact, rows_exact, keep), "products")


def routed(products, bias, shape, scaling, temperature):
    tokens, _, _, rank, experts, groups = shape
    hidden = products[:, : groups * rank].view(tokens, groups, rank).transpose(0, 1)
    logits = products[:, groups * rank :].view(tokens, groups, experts).transpose(0, 1)
    if bias is not None:
        logits = logits + bias[:, None]
    gate = torch.softmax(logits / temperature, -1)
    z = (scaling * gate[..., None] * hidden[..., None, :]).flatten(2)
    return hidden, gate, z


@SHAPED
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_route(shape, dtype, biased):
    tokens, _, _, rank, experts, groups = shape
    products, exact = drawn(wide(dtype), tokens, groups * (rank + experts), seed=3, scale=2.0)
    bias, exact_bias = drawn(wide(dtype), groups, experts, seed=4) if biased else (None, None)
    found = OPS.route(products, bias, groups, rank, experts, 2.0, 0.7, dtype)
    plain = routed(products, bias, shape, 2.0, 0.7)
    truth = routed(exact, exact_bias, shape, 2.0, 0.7)
    for name, actual, one, right in zip(("hidden", "gate", "z"), found, plain, truth, strict=True):
        check(actual, one.to(dtype) if name == "z" else one, right, name)
    assert torch.equal(found[0], plain[0])
    assert [one.dtype for one in found] == [wide(dtype), wide(dtype), dtype]


def test_gate_of_large_logits_is_finite():
    products = torch.tensor([[1.0, 3e38, -3e38]])
    _, gate, _ = OPS.route(products, None, 1, 1, 2, 1.0, 1.0, torch.float32)
    assert gate.tolist() == [[[1.0, 0.0]]]


@SHAPED
@DTYPES
@pytest.mark.parametrize("added", ["nothing", "bias", "base", "both"])
def test_expand(shape, dtype, adapter, added):
    tokens, _, features, rank, experts, _ = shape
    z, z_exact = drawn(dtype, tokens, experts * rank, seed=5)
    weight, weight_exact = parameter(adapter, dtype, features, experts, rank, seed=6)
    bias = drawn(dtype, features, seed=7) if added in ("bias", "both") else (None, None)
    base = drawn(dtype, tokens, features, seed=8) if added in ("base", "both") else (None, None)

    def product(z, weight, bias, base):
        y = z @ weight.flatten(1).T
        y = y if bias is None else y + bias
        return y if base is None else y + base

    actual = OPS.expand(z, weight, bias[0], base[0])
    assert actual.dtype == dtype
    plain = product(z, weight.to(dtype), bias[0], base[0])
    check(actual, plain, product(z_exact, weight_exact, bias[1], base[1]), "y")


@SHAPED
@DTYPES
@pytest.mark.parametrize("needs_expand", [True, False])
def test_grad_y(shape, dtype, adapter, needs_expand):
    tokens, _, features, rank, experts, _ = shape
    grad, grad_exact = drawn(dtype, tokens, features, seed=9)
    z, z_exact = drawn(dtype, tokens, experts * rank, seed=10)
    weight, weight_exact = parameter(adapter, dtype, features, experts, rank, seed=11)

    def gradients(grad, z, weight):
        return grad @ weight.flatten(1), (grad.T @ z).view(features, experts, rank)

    grad_z, grad_expand = OPS.moe_lora_grad_y(grad, z, weight, needs_expand)
    plain = gradients(grad, z, weight.to(dtype))
    truth = gradients(grad_exact, z_exact, weight_exact)
    assert grad_z.dtype == wide(dtype)
    assert grad_expand.dtype == adapter
    check(grad_z, plain[0], truth[0], "grad_z")
    if needs_expand:
        check(grad_expand, plain[1], truth[1], "grad_expand")
    else:
        assert grad_expand.shape == (0,)


@SHAPED
@pytest.mark.parametrize("dtype", FLOATS[2:], ids=str)
def test_route_backward(shape, dtype):
    tokens, _, _, rank, experts, groups = shape
    products, _ = drawn(dtype, tokens, groups * (rank + experts), seed=12)
    grad_z = [drawn(dtype, tokens, experts * rank, seed=13 + g)[0] for g in range(groups)]
    hidden, gate, _ = OPS.route(products, None, groups, rank, experts, 2.0, 0.7, dtype)

    def gradients(dtype):
        leaf = products.to(dtype).clone().requires_grad_()
        z = routed(leaf, None, shape, 2.0, 0.7)[2]
        z.backward(torch.stack(grad_z).to(dtype))
        return leaf.grad

    grads = OPS.route_backward(grad_z, hidden, gate, 2.0, 0.7)
    check(grads, gradients(dtype), gradients(torch.float64), "grads")


def grad_x_case(shape, dtype, adapter):
    x, rows, x_exact, rows_exact, hidden = shrink_case(shape, dtype, adapter)
    grads, grads_exact = drawn(wide(dtype), x.shape[0], rows.shape[0], seed=14)
    return (grads, x, rows), (grads_exact, x_exact, rows_exact), hidden


@SHAPED
@DTYPES
@DROPPED
@pytest.mark.parametrize(("needs_x", "needs_rows"), [(True, True), (True, False), (False, True)])
def test_grad_x(shape, dtype, adapter, p, needs_x, needs_rows):
    (grads, x, rows), exact, hidden = grad_x_case(shape, dtype, adapter)
    keep = keep_of(*x.shape, p)

    def gradients(grads, x, rows, keep):
        of_hidden, of_logits = grads[:, :hidden], grads[:, hidden:]
        grad_x = keep * (of_hidden @ rows[:hidden]) + of_logits @ rows[hidden:]
        return grad_x, torch.cat([of_hidden.T @ (keep * x), of_logits.T @ x])

    found = OPS.moe_lora_grad_x(grads, x, rows, hidden, p, SEED if p else None, needs_x, needs_rows)
    plain = gradients(grads.to(dtype), x, rows.to(dtype), keep.to(dtype))
    truth = gradients(*exact, keep)
    assert [one.dtype for one in found] == [dtype, adapter]
    if needs_x:
        check(found[0], plain[0], truth[0], "grad_x")
    if needs_rows:
        check(found[1], plain[1], truth[1], "grad_rows")
    sizes = [one.numel() for one in found]
    assert sizes == [needs_x * x.numel(), needs_rows * rows.numel()]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_dropout_is_that_of_the_definition(dtype):
    """Ones through a one-hot A show every keep bit; a group's linears share them."""
    tokens, columns, p = 40, 300, 0.3
    x, rows = torch.ones(tokens, columns, dtype=dtype), torch.eye(columns, dtype=dtype)
    expected = keep_of(tokens, columns, p).float()
    products = OPS.shrink(x, rows, columns, p, SEED)
    assert torch.equal(products.float(), expected)
    grads = torch.ones(tokens, columns, dtype=wide(dtype)) / reference.dropout_scale(p)
    grad_x, _ = OPS.moe_lora_grad_x(grads, x, rows, columns, p, SEED, True, False)
    assert torch.equal(grad_x != 0, expected != 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dropped_values_may_be_infinite(dtype):
    tokens, columns, p = 9, 200, 0.5
    keep = keep_of(tokens, columns, p) != 0
    x = torch.randn(tokens, columns).to(dtype)
    infinite = x.masked_fill(~keep, float("inf"))
    zeros = x.masked_fill(~keep, 0.0)
    rows = torch.randn(3, columns).to(dtype)
    arguments = rows, 3, p, SEED
    assert torch.equal(OPS.shrink(infinite, *arguments), OPS.shrink(zeros, *arguments))
    grads = torch.randn(tokens, 3, dtype=wide(dtype))
    found, expected = (
        OPS.moe_lora_grad_x(grads, one, *arguments, False, True)[1] for one in (infinite, zeros)
    )
    assert torch.equal(found, expected)


def test_strides_do_not_matter():
    x, rows = torch.randn(64, 30).T, torch.randn(64, 9).T
    assert torch.equal(
        OPS.shrink(x, rows, 4, 0.2, SEED),
        OPS.shrink(x.contiguous(), rows.contiguous(), 4, 0.2, SEED),
    )
    grads = torch.randn(9, 30).T
    for found, expected in zip(
        OPS.moe_lora_grad_x(grads, x, rows, 4, 0.2, SEED, True, True),
        OPS.moe_lora_grad_x(
            grads.contiguous(), x.contiguous(), rows.contiguous(), 4, 0.2, SEED, True, True
        ),
        strict=True,
    ):
        assert torch.equal(found, expected)
