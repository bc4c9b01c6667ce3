"""The MoE-LoRA ops against their definition in float64: values, gradients, bad input."""

import pytest
import torch
from floe_triton import moe_lora, moe_lora_add, reference
from helpers.budget import assert_within_budget
from helpers.lora_cases import NAMES, OPS, SEED, added, assert_equal_runs, case, draw, run
from hypothesis import given, settings
from hypothesis import strategies as st

import floe.ops  # noqa: F401  (the native dropout, which the ops then use)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    leading=st.one_of(
        st.tuples(st.integers(0, 40)),
        st.tuples(),
        st.tuples(st.integers(0, 3), st.integers(0, 9)),
        st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)),
    ),
    columns=st.integers(1, 40),
    features=st.integers(1, 40),
    rank=st.integers(1, 20),
    experts=st.integers(1, 10),
    bias=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.05, 0.5]),
    op=st.sampled_from([moe_lora, added]),
    seed=st.integers(0, 10**6),
)
def test_any_shape_equals_the_definition(
    leading, columns, features, rank, experts, bias, dropout_p, op, seed
):
    inputs = case(leading, columns, features, rank, experts, bias, seed)
    settings = {"scaling": 1.7, "dropout_p": dropout_p, "seed": torch.tensor(seed)}
    assert_equal_runs(run(op, inputs, **settings), run(reference.moe_lora, inputs, **settings))


def views(tensor):
    """The same values in other memory: transposed, every second column, at an odd offset."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
    wide[..., ::2] = tensor
    offset = torch.full((tensor.numel() + 3,), float("nan"), dtype=tensor.dtype)
    offset[3:] = tensor.flatten()
    yield "transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)
    yield "strided", wide[..., ::2]
    yield "offset", offset[3:].view(tensor.shape)


@OPS
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_memory_layout_changes_nothing(op, dropout_p):
    inputs = case((5, 6), columns=8)
    settings = {"scaling": 0.5, "dropout_p": dropout_p, "seed": SEED}
    expected = run(op, inputs, **settings)
    for index in range(len(inputs)):
        for _, view in views(inputs[index]):
            changed = [*inputs[:index], view, *inputs[index + 1 :]]
            changed[0], changed[3], changed[4] = (
                t.detach().requires_grad_() for t in (changed[0], changed[3], changed[4])
            )
            assert_equal_runs(run(op, changed, leaf=False, **settings), expected, 1e-13)


@OPS
def test_an_expanded_gradient_and_input_work(op):
    x, weight, bias, shrink, expand, _ = case((1,))
    x, grad = x.expand(6, -1), torch.ones((), dtype=torch.float64).expand(6, 10)
    inputs = (x, weight, bias, shrink, expand, grad)
    assert_equal_runs(
        run(op, inputs, scaling=1.0),
        run(reference.moe_lora, [t.contiguous() for t in inputs], scaling=1.0),
    )


@OPS
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_at_most_twice_torch_s_own(op, dtype, dropout_p):
    for seed, shape in enumerate([(33, 64, 48, 8, 4), (128, 96, 64, 5, 3), (3, 128, 40, 16, 2)]):
        inputs = [t.to(dtype).double() for t in case(shape[:1], *shape[1:], seed=100 * seed)]
        settings = {"scaling": 2.0, "dropout_p": dropout_p, "seed": SEED}
        exact = run(reference.moe_lora, inputs, **settings)
        torchs = run(reference.moe_lora, inputs, dtype, **settings)
        for name, *values in zip(
            NAMES, run(op, inputs, dtype, **settings), torchs, exact, strict=True
        ):
            assert_within_budget(*values, name=f"{name} {shape}")


@OPS
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_float32_adapter_on_half_precision_activations_stays_within_the_budget(op, dtype):
    x, weight, bias, shrink, expand, grad = case((64,), 96, 80, 8, 4)
    inputs = [
        *(t.to(dtype).double() for t in (x, weight, bias)),
        shrink,
        expand,
        grad.to(dtype).double(),
    ]
    exact = run(reference.moe_lora, inputs, scaling=2.0)
    torchs = run(reference.moe_lora, inputs, dtype, torch.float32, scaling=2.0)
    actual = run(op, inputs, dtype, torch.float32, scaling=2.0)
    assert [t.dtype for t in actual] == [dtype, dtype, torch.float32, torch.float32]
    for name, *values in zip(NAMES, actual, torchs, exact, strict=True):
        assert_within_budget(*values, name=name, rounded_to=dtype)


@pytest.mark.parametrize(
    ("leading", "rank", "experts"), [((1,), 1, 1), ((4,), 2, 3), ((2, 2), 3, 2)], ids=str
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@OPS
def test_gradcheck(op, leading, rank, experts, dropout_p):
    x, weight, bias, shrink, expand, _ = case(leading, 5, 4, rank, experts)
    leaves = [t.requires_grad_() for t in (x, shrink, expand)]
    assert torch.autograd.gradcheck(
        lambda x, s, e: op(x, weight, bias, s, e, scaling=1.3, dropout_p=dropout_p, seed=SEED),
        leaves,
    )


@pytest.mark.parametrize("wanted", ["x", "shrink", "expand"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_only_the_gradients_asked_for_are_made(wanted, dropout_p):
    x, weight, bias, shrink, expand, grad = case()
    settings = {"scaling": 1.0, "dropout_p": dropout_p, "seed": SEED}
    leaves = {"x": x, "shrink": shrink, "expand": expand}
    leaves[wanted].requires_grad_()
    moe_lora(x, weight, bias, shrink, expand, **settings).backward(grad)
    all_of_them = dict(zip(leaves, run(moe_lora, case(), **settings)[1:], strict=True))
    torch.testing.assert_close(leaves[wanted].grad, all_of_them[wanted], rtol=0, atol=1e-13)
    assert all(t.grad is None for name, t in leaves.items() if name != wanted)


def test_a_base_output_gets_its_gradient_unchanged():
    x, _, _, shrink, expand, grad = case()
    base = draw(7, 10, seed=9).requires_grad_()
    moe_lora_add(base, x, shrink, expand, scaling=3.0).backward(grad)
    assert torch.equal(base.grad, grad)


def test_a_row_alone_equals_the_row_in_a_batch():
    x, weight, bias, shrink, expand, _ = (t.float() for t in case((16, 9), 48, 40, 8, 4))
    whole = moe_lora(x, weight, bias, shrink, expand, scaling=2.0)
    for row in range(16):
        alone = moe_lora(x[row : row + 1], weight, bias, shrink, expand, scaling=2.0)
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_spoils_its_own_row_only(bad):
    x, weight, bias, shrink, expand, _ = case((6,))
    clean = moe_lora(x, weight, bias, shrink, expand, scaling=1.0)
    x[2, 3] = bad
    y = moe_lora(x, weight, bias, shrink, expand, scaling=1.0)
    assert not y[2].isfinite().any()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[others], clean[others], rtol=0, atol=1e-13)


def test_the_seed_alone_decides_the_mask():
    inputs = case((32,))
    first = run(moe_lora, inputs, scaling=1.0, dropout_p=0.5, seed=SEED)
    torch.manual_seed(99)
    assert_equal_runs(run(moe_lora, inputs, scaling=1.0, dropout_p=0.5, seed=SEED), first, 0.0)
    other = run(moe_lora, inputs, scaling=1.0, dropout_p=0.5, seed=SEED + 1)
    assert not torch.equal(other[0], first[0])


BAD = {
    "x is a list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "integer x": (
        {"x": torch.ones(7, 12, dtype=torch.int64)},
        TypeError,
        "x must be floating point, got torch.int64",
    ),
    "scalar x": (
        {"x": torch.tensor(1.0).double()},
        ValueError,
        r"for x \[\.\.\., K\], got .* and x \(\)",
    ),
    "other dtype": (
        {"weight": torch.ones(10, 12)},
        TypeError,
        "weight must have x's dtype torch.float64, got torch.float32",
    ),
    "weight shape": (
        {"weight": torch.ones(9, 12).double()},
        ValueError,
        r"weight must be \[N, K\] = \[10, 12\] .*got \(9, 12\)",
    ),
    "missing weight": ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    "trainable weight": (
        {"weight": torch.ones(10, 12).double().requires_grad_()},
        ValueError,
        "weight must be frozen",
    ),
    "trainable bias": (
        {"bias": torch.ones(10).double().requires_grad_()},
        ValueError,
        "bias must be frozen",
    ),
    "bias shape": (
        {"bias": torch.ones(1, 10).double()},
        ValueError,
        r"bias must be \[N\] = \[10\], got \(1, 10\)",
    ),
    "bias dtype": ({"bias": torch.ones(10)}, TypeError, "bias must have x's dtype"),
    "flat experts": (
        {"expand_weight": torch.ones(10, 12).double()},
        ValueError,
        r"expand_weight must be \[N, M, r\], got \(10, 12\)",
    ),
    "no expert": (
        {"expand_weight": torch.ones(10, 0, 3).double()},
        ValueError,
        r"needs M >= 1 and r >= 1, got \(10, 0, 3\)",
    ),
    "rank 0": (
        {"expand_weight": torch.ones(10, 4, 0).double()},
        ValueError,
        r"needs M >= 1 and r >= 1, got \(10, 4, 0\)",
    ),
    "shrink shape": (
        {"shrink_weight": torch.ones(6, 12).double()},
        ValueError,
        r"shrink_weight must be \[r \+ M, K\] = \[7, K\] .*got \(6, 12\) and x \(7, 12\)",
    ),
    "scaling": ({"scaling": float("nan")}, ValueError, "scaling must be a finite number, got nan"),
    "dropout": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "no seed": (
        {"dropout_p": 0.5, "seed": None},
        TypeError,
        "seed must be a 0-dim int64 tensor when dropout_p > 0, got NoneType",
    ),
    "number as seed": (
        {"dropout_p": 0.5, "seed": 3},
        TypeError,
        "seed must be a 0-dim int64 tensor when dropout_p > 0, got int",
    ),
    "seed shape": (
        {"dropout_p": 0.5, "seed": torch.tensor([3])},
        ValueError,
        r"seed must be a 0-dim int64 tensor, got torch.int64 \(1,\)",
    ),
    "seed dtype": (
        {"dropout_p": 0.5, "seed": torch.tensor(3.0)},
        ValueError,
        "seed must be a 0-dim int64 tensor, got torch.float32",
    ),
    "other device": (
        {"weight": torch.ones(10, 12, device="meta").double()},
        ValueError,
        "weight must be on x's device cpu, got meta",
    ),
    "seed's device": (
        {"dropout_p": 0.5, "seed": torch.tensor(3, device="meta")},
        ValueError,
        "seed must be on x's device cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, error, text = BAD[name]
    names = ("x", "weight", "bias", "shrink_weight", "expand_weight")
    arguments = dict(zip(names, case(), strict=False)) | {"scaling": 1.0} | change
    with pytest.raises(error, match=text):
        moe_lora(**arguments)


def test_a_base_output_of_another_shape_is_refused():
    x, _, _, shrink, expand, _ = case()
    with pytest.raises(ValueError, match=r"base_output must be \(7, 10\), got \(7, 11\)"):
        moe_lora_add(torch.ones(7, 11).double(), x, shrink, expand, scaling=1.0)
    with pytest.raises(TypeError, match="base_output must have x's dtype"):
        moe_lora_add(torch.ones(7, 10), x, shrink, expand, scaling=1.0)
