"""The experts' product and grad_x, alone and fused with the frozen product, in float64."""

import pytest
import torch
from floe_triton import launch, reference
from floe_triton.group import Group
from floe_triton.kernels.backward import fused_grad_x
from floe_triton.kernels.expand import expand, fused_linear
from helpers.budget import assert_within_budget, relative_error
from helpers.guarded import guarded, place
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

PHASES = (Phase.explicit, Phase.generate)  # the interpreter is too slow to shrink a failure

SEED = torch.tensor(2**40 + 77)
DTYPES = st.sampled_from([torch.float32, torch.float16])
MANY = settings(max_examples=60, deadline=None, derandomize=True, phases=PHASES)
SIZES = {
    "tokens": st.integers(1, 70),
    "columns": st.integers(1, 200),
    "features": st.integers(1, 200),
    "dtype": DTYPES,
    "gap": st.sampled_from([0, 5]),
}


def drawer(*seeds):
    generator = torch.Generator().manual_seed(hash(seeds) % 2**31)

    def draw(*shape, over=1, dtype=torch.float32, gap=0):
        values = torch.randn(*shape, generator=generator) / over**0.5
        return place(values.to(dtype), gap)

    return draw


def double(value):
    """Floats in float64, whatever else as it is."""
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if is_float else value


def check(function, formula, inputs, dtype, name):
    with guarded():
        actual = function(*inputs)
    exact = formula(*[double(value) for value in inputs])
    if dtype == torch.float32:
        assert actual.dtype == dtype
        assert actual.shape == exact.shape
        assert relative_error(actual, exact) <= 1e-5, name
    else:
        assert_within_budget(actual, formula(*inputs), exact, name)


def expand_formula(z, expand_weight, bias, base):
    y = z @ expand_weight.flatten(1).T.to(z.dtype)
    y = y if bias is None else y + bias
    return y if base is None else base + y


def linear_formula(x, weight, bias, z, expand_weight):
    return torch.nn.functional.linear(x, weight, bias) + z @ expand_weight.flatten(1).T.to(z.dtype)


def grad_x_formula(grad_y, weight, grads, rows, group):
    rows, hidden_rows = rows.to(grads.dtype), group.hidden_rows
    hidden = grads[:, :hidden_rows] @ rows[:hidden_rows]
    keep = reference.dropout_keep(*hidden.shape, group.dropout_p, SEED)
    hidden = torch.where(keep, hidden * reference.dropout_scale(group.dropout_p), 0)
    return grad_y @ weight + hidden + grads[:, hidden_rows:] @ rows[hidden_rows:]


def group_of(rank, experts, dropout_p):
    """A group of one linear of these sizes; its tensors are given apart."""
    expand_weights = [torch.empty(0, experts, rank)]
    shrink_weights = [torch.empty(rank + experts, 0)]
    return Group([], [], [], shrink_weights, expand_weights, [], 1.0, 1.0, dropout_p, SEED)


@MANY
@given(
    experts=st.integers(1, 16),
    rank=st.integers(1, 40),
    bias=st.booleans(),
    base=st.booleans(),
    adapter=DTYPES,
    **SIZES,
)
def test_expand(tokens, columns, features, dtype, gap, experts, rank, bias, base, adapter):
    draw = drawer(tokens, features, experts, rank)
    inputs = (
        draw(tokens, experts * rank, dtype=dtype),
        draw(features, experts, rank, over=experts * rank, dtype=adapter),
        draw(features, dtype=dtype) if bias else None,
        draw(tokens, features, dtype=dtype, gap=gap) if base else None,
    )
    check(expand, expand_formula, inputs, dtype, "y")


@MANY
@given(
    experts=st.integers(1, 16), rank=st.integers(1, 40), bias=st.booleans(), adapter=DTYPES, **SIZES
)
def test_fused_linear(tokens, columns, features, dtype, gap, experts, rank, bias, adapter):
    draw = drawer(tokens, columns, features, experts, rank)
    inputs = (
        draw(tokens, columns, dtype=dtype, gap=gap),
        draw(features, columns, over=columns, dtype=dtype, gap=gap),
        draw(features, dtype=dtype) if bias else None,
        draw(tokens, experts * rank, dtype=dtype),
        draw(features, experts, rank, over=experts * rank, dtype=adapter),
    )
    check(fused_linear, linear_formula, inputs, dtype, "y")


@MANY
@given(
    hidden_rows=st.integers(1, 60),
    logit_rows=st.integers(1, 40),
    adapter=DTYPES,
    dropout_p=st.sampled_from([0.0, 0.05, 0.5]),
    **SIZES,
)
def test_fused_grad_x(
    tokens, columns, features, dtype, gap, hidden_rows, logit_rows, adapter, dropout_p
):
    draw = drawer(tokens, columns, features, hidden_rows, logit_rows)
    count = hidden_rows + logit_rows
    inputs = (
        draw(tokens, features, dtype=dtype, gap=gap),
        draw(features, columns, over=features, dtype=dtype, gap=gap),
        draw(tokens, count, dtype=dtype, gap=gap),
        draw(count, columns, over=count, dtype=adapter),
        group_of(hidden_rows, logit_rows, dropout_p),
    )
    check(fused_grad_x, grad_x_formula, inputs, dtype, "grad_x")


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_with_the_tiles_of_a_gpu(capability):
    draw = drawer(capability)
    x, weight, bias = draw(140, 80), draw(270, 80, over=80), draw(270)
    z, expand_weight = draw(140, 15), draw(270, 3, 5, over=15)
    grads, rows = draw(140, 8), draw(8, 80, over=8)
    with launch.assume(capability):
        check(expand, expand_formula, (z, expand_weight, bias, None), x.dtype, "y")
        check(fused_linear, linear_formula, (x, weight, bias, z, expand_weight), x.dtype, "y")
        inputs = (draw(140, 270), weight, grads, rows, group_of(5, 3, 0.3))
        check(fused_grad_x, grad_x_formula, inputs, x.dtype, "grad_x")


def test_base_is_left_as_it_is_and_any_strides_will_do():
    draw = drawer(1)
    base = torch.stack([draw(9, 24), draw(9, 24)], dim=2)[:, :, 0]
    before = base.clone()
    check(expand, expand_formula, (draw(9, 6), draw(24, 2, 3), None, base), base.dtype, "y")
    assert torch.equal(base, before)
    x, weight = draw(40, 9).T, draw(40, 24).T
    check(fused_linear, linear_formula, (x, weight, None, draw(9, 6), draw(24, 2, 3)), x.dtype, "y")
    grad_y, weight = draw(24, 9).T, draw(40, 24).T
    inputs = (grad_y, weight, draw(5, 9).T, draw(40, 5).T, group_of(2, 3, 0.0))
    check(fused_grad_x, grad_x_formula, inputs, x.dtype, "grad_x")


def test_no_tokens_are_no_launch():
    draw = drawer(2)
    z, expand_weight, weight = draw(1, 6)[:0], draw(24, 2, 3), draw(24, 40)
    assert expand(z, expand_weight, None, None).shape == (0, 24)
    assert fused_linear(weight[:0], weight, None, z, expand_weight).shape == (0, 24)
    nothing = draw(1, 24)[:0], weight, draw(1, 5)[:0], draw(5, 40), group_of(2, 3, 0.0)
    assert fused_grad_x(*nothing).shape == (0, 40)


def test_operations_and_bytes_are_those_of_the_product():
    x, weight = torch.empty(512, 256, device="meta"), torch.empty(128, 256, device="meta")
    z, expand_weight = torch.empty(512, 32, device="meta"), torch.empty(128, 4, 8, device="meta")
    with launch.recording(90) as launches:
        fused_linear(x, weight, None, z, expand_weight)
    (one,) = launches
    assert one.flops == 2 * 512 * 128 * (256 + 32)
    assert one.bytes == 4 * (512 * 256 + 128 * 256 + 512 * 32 + 128 * 32 + 512 * 128)
