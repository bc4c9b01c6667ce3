"""The MoE-LoRA ops against their definition in float64: values, gradients, compilers, bad input."""

import threading

import pytest
import torch
from budget import assert_within_budget
from floe_triton import draw_seed, moe_lora, moe_lora_add, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import floe.ops  # noqa: F401  (the native dropout, which the ops then use)

SEED = torch.tensor(2**61 + 12345)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def case(leading=(7,), columns=12, features=10, rank=3, experts=4, bias=True, seed=0):
    """float64 inputs of one call: x, weight, bias, shrink_weight, expand_weight, gradient of y."""
    return (
        draw(*leading, columns, seed=seed),
        draw(features, columns, seed=seed + 1, scale=columns**-0.5),
        draw(features, seed=seed + 2) if bias else None,
        draw(rank + experts, columns, seed=seed + 3, scale=columns**-0.5),
        draw(features, experts, rank, seed=seed + 4, scale=rank**-0.5),
        draw(*leading, features, seed=seed + 5),
    )


def run(function, inputs, dtype=torch.float64, adapter=None, leaf=True, **settings):
    """y and the gradients of x, shrink_weight and expand_weight, with everything cast to ``dtype`` first."""
    x, weight, bias, shrink, expand, grad = inputs
    x, shrink, expand = x.to(dtype), shrink.to(adapter or dtype), expand.to(adapter or dtype)
    x, shrink, expand = (t.detach().clone().requires_grad_() if leaf else t for t in (x, shrink, expand))
    bias = None if bias is None else bias.to(dtype)
    y = function(x, weight.to(dtype), bias, shrink, expand, **settings)
    torch.autograd.backward(y, grad.to(y.dtype))
    return [y.detach(), x.grad, shrink.grad, expand.grad]


def added(x, weight, bias, shrink, expand, **settings):
    """The same through moe_lora_add, the base output computed outside."""
    return moe_lora_add(torch.nn.functional.linear(x, weight, bias), x, shrink, expand, **settings)


OPS = pytest.mark.parametrize("op", [moe_lora, added], ids=["moe_lora", "moe_lora_add"])
NAMES = ("y", "grad x", "grad shrink_weight", "grad expand_weight")


def assert_equal_runs(actual, expected, tolerance=1e-10):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.shape == e.shape, name
        scale = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * (1 + scale), msg=lambda m, n=name: f"{n}: {m}")


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
    settings = dict(scaling=1.7, dropout_p=dropout_p, seed=torch.tensor(seed))
    assert_equal_runs(run(op, inputs, **settings), run(reference.moe_lora, inputs, **settings))


def views(tensor):
    """The same values in other memory: transposed, every second column of a wider one, at an odd offset."""
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
    settings = dict(scaling=0.5, dropout_p=dropout_p, seed=SEED)
    expected = run(op, inputs, **settings)
    for index in range(len(inputs)):
        for _, view in views(inputs[index]):
            changed = [*inputs[:index], view, *inputs[index + 1 :]]
            changed[0], changed[3], changed[4] = (t.detach().requires_grad_() for t in (changed[0], changed[3], changed[4]))
            assert_equal_runs(run(op, changed, leaf=False, **settings), expected, 1e-13)


@OPS
def test_an_expanded_gradient_and_input_work(op):
    x, weight, bias, shrink, expand, _ = case((1,))
    x, grad = x.expand(6, -1), torch.ones((), dtype=torch.float64).expand(6, 10)
    inputs = (x, weight, bias, shrink, expand, grad)
    assert_equal_runs(
        run(op, inputs, scaling=1.0), run(reference.moe_lora, [t.contiguous() for t in inputs], scaling=1.0)
    )


@OPS
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_at_most_twice_torch_s_own(op, dtype, dropout_p):
    for seed, shape in enumerate([(33, 64, 48, 8, 4), (128, 96, 64, 5, 3), (3, 128, 40, 16, 2)]):
        inputs = [t.to(dtype).double() for t in case(shape[:1], *shape[1:], seed=100 * seed)]
        settings = dict(scaling=2.0, dropout_p=dropout_p, seed=SEED)
        exact = run(reference.moe_lora, inputs, **settings)
        torchs = run(reference.moe_lora, inputs, dtype, **settings)
        for name, *values in zip(NAMES, run(op, inputs, dtype, **settings), torchs, exact, strict=True):
            assert_within_budget(*values, name=f"{name} {shape}")


@OPS
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_float32_adapter_on_half_precision_activations_stays_within_the_budget(op, dtype):
    x, weight, bias, shrink, expand, grad = case((64,), 96, 80, 8, 4)
    inputs = [*(t.to(dtype).double() for t in (x, weight, bias)), shrink, expand, grad.to(dtype).double()]
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
        lambda x, s, e: op(x, weight, bias, s, e, scaling=1.3, dropout_p=dropout_p, seed=SEED), leaves
    )


def test_a_second_derivative_is_refused():
    x, weight, bias, shrink, expand, _ = case()
    y = moe_lora(x.requires_grad_(), weight, bias, shrink, expand, scaling=1.0)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("wanted", ["x", "shrink", "expand"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_only_the_gradients_asked_for_are_made(wanted, dropout_p):
    x, weight, bias, shrink, expand, grad = case()
    settings = dict(scaling=1.0, dropout_p=dropout_p, seed=SEED)
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


OP_CASES = [
    dict(leading=(5,), dropout_p=0.0),
    dict(leading=(5,), dropout_p=0.3),
    dict(leading=(1,), rank=1, experts=1, dropout_p=0.0, bias=False),
    dict(leading=(0,), dropout_p=0.0),
    dict(leading=(0,), dropout_p=0.3, bias=False),
    dict(leading=(3,), rank=7, experts=2, dropout_p=0.3, base=True),
]


def op_arguments(leading, dropout_p, base=False, dtype=torch.float32, adapter=torch.float32, **sizes):
    x, weight, bias, shrink, expand, grad = case(leading, **sizes)
    x, weight, grad, bias = (None if t is None else t.to(dtype) for t in (x, weight, grad, bias))
    seed = SEED if dropout_p else None
    base_output = draw(*grad.shape).to(dtype) if base else None
    weight, bias = (None, None) if base else (weight, bias)
    parameters = (shrink.to(adapter), expand.to(adapter))
    forward = (x, weight, bias, base_output, *parameters, 1.5, dropout_p, seed)
    _, hidden, gate, z = torch.ops.floe.moe_lora_forward(*forward)
    backward = (grad, x, weight, *parameters, hidden, gate, z, 1.5, dropout_p, seed)
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arguments", OP_CASES, ids=str)
def test_opcheck_forward(arguments, dtype):
    forward, _ = op_arguments(**arguments, dtype=dtype)
    torch.library.opcheck(torch.ops.floe.moe_lora_forward, forward)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("arguments", OP_CASES, ids=str)
def test_opcheck_backward(arguments, needs):
    _, backward = op_arguments(**arguments)
    torch.library.opcheck(torch.ops.floe.moe_lora_backward, (*backward, *needs))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_in_one_graph_it_gives_the_same_gradients(dynamic):
    settings = dict(scaling=2.0, dropout_p=0.4, seed=SEED)
    torch._dynamo.reset()

    def layer(op, x, weight, bias, shrink, expand, **settings):
        return torch.tanh(op(x, weight, bias, shrink, expand, **settings))

    for op in (moe_lora, added):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for leading in [(4, 5), (4, 7)] if dynamic else [(4, 5)]:
            inputs = case(leading)
            actual = run(lambda *a, op=op, **s: compiled(op, *a, **s), inputs, **settings)
            assert_equal_runs(actual, run(lambda *a, op=op, **s: layer(op, *a, **s), inputs, **settings))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_mask_again(use_reentrant):
    inputs = case((9,))

    def fresh(x, weight, bias, shrink, expand):
        seed = draw_seed(x.device)
        return moe_lora(x, weight, bias, shrink, expand, scaling=1.0, dropout_p=0.5, seed=seed)

    torch.manual_seed(4)
    expected = run(fresh, inputs)
    torch.manual_seed(4)
    actual = run(lambda *a: checkpoint(fresh, *a, use_reentrant=use_reentrant), inputs)
    assert_equal_runs(actual, expected, 0.0)


@OPS
def test_autocast_computes_in_its_dtype_and_leaves_gradients_in_the_leaves(op):
    inputs = [t.float() for t in case((16,), 32, 24)]

    def cast(*args, **settings):
        with torch.autocast("cpu", torch.bfloat16):
            return op(*args, **settings)

    actual = run(cast, inputs, torch.float32, scaling=1.0)
    assert [t.dtype for t in actual] == [torch.bfloat16, *[torch.float32] * 3]
    halved = [t.bfloat16() for t in inputs]
    exact = run(reference.moe_lora, [t.double() for t in inputs], scaling=1.0)
    torchs = run(reference.moe_lora, halved, torch.bfloat16, scaling=1.0)
    for name, a, t, e in zip(NAMES, actual, torchs, exact, strict=True):
        assert_within_budget(a.bfloat16(), t, e, name=name)


def test_autocast_leaves_float64_alone_as_torch_does():
    inputs = case((4,))
    with torch.autocast("cpu", torch.bfloat16):
        y = moe_lora(*inputs[:5], scaling=1.0)
        assert torch.nn.functional.linear(*inputs[:3]).dtype == torch.float64
    assert y.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_keeps_a_few_numbers_a_token_beside_its_inputs(dtype):
    """hidden and gate in float32 and z in x's dtype: never a mask, a dropped copy or an output per expert."""
    tokens, rank, experts = 256, 8, 4
    x, weight, bias, shrink, expand, _ = (t.to(dtype) for t in case((tokens,), 64, 48, rank, experts))
    inputs = [x, weight, shrink.requires_grad_(), expand.requires_grad_()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        moe_lora(*inputs[:2], bias, *inputs[2:], scaling=1.0, dropout_p=0.05, seed=SEED)
    known = {t.data_ptr() for t in inputs}
    extra = sum(t.nbytes for t in saved if t.data_ptr() not in known)
    assert extra == tokens * (4 * rank + 4 * experts + dtype.itemsize * rank * experts) + 8
    assert len(saved) == 8


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


def test_threads_get_what_one_thread_gets():
    inputs = [case((5 + i,), seed=i) for i in range(8)]
    settings = dict(scaling=1.0, dropout_p=0.3, seed=SEED)
    expected = [run(moe_lora, one, **settings) for one in inputs]
    failures = []

    def work(index):
        for _ in range(20):
            for actual, wanted in zip(run(moe_lora, inputs[index], **settings), expected[index], strict=True):
                if not torch.equal(actual, wanted):
                    failures.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def test_the_seed_alone_decides_the_mask():
    inputs = case((32,))
    first = run(moe_lora, inputs, scaling=1.0, dropout_p=0.5, seed=SEED)
    torch.manual_seed(99)
    assert_equal_runs(run(moe_lora, inputs, scaling=1.0, dropout_p=0.5, seed=SEED), first, 0.0)
    other = run(moe_lora, inputs, scaling=1.0, dropout_p=0.5, seed=SEED + 1)
    assert not torch.equal(other[0], first[0])


BAD = {
    "x is a list": (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "integer x": (dict(x=torch.ones(7, 12, dtype=torch.int64)), TypeError, "x must be floating point, got torch.int64"),
    "scalar x": (dict(x=torch.tensor(1.0).double()), ValueError, r"for x \[\.\.\., K\], got .* and x \(\)"),
    "other dtype": (dict(weight=torch.ones(10, 12)), TypeError, "weight must have x's dtype torch.float64, got torch.float32"),
    "weight shape": (dict(weight=torch.ones(9, 12).double()), ValueError, r"weight must be \[N, K\] = \[10, 12\] .*got \(9, 12\)"),
    "missing weight": (dict(weight=None), TypeError, "weight must be a tensor, got NoneType"),
    "trainable weight": (dict(weight=torch.ones(10, 12).double().requires_grad_()), ValueError, "weight must be frozen"),
    "trainable bias": (dict(bias=torch.ones(10).double().requires_grad_()), ValueError, "bias must be frozen"),
    "bias shape": (dict(bias=torch.ones(1, 10).double()), ValueError, r"bias must be \[N\] = \[10\], got \(1, 10\)"),
    "bias dtype": (dict(bias=torch.ones(10)), TypeError, "bias must have x's dtype"),
    "flat experts": (dict(expand_weight=torch.ones(10, 12).double()), ValueError, r"expand_weight must be \[N, M, r\], got \(10, 12\)"),
    "no expert": (dict(expand_weight=torch.ones(10, 0, 3).double()), ValueError, r"needs M >= 1 and r >= 1, got \(10, 0, 3\)"),
    "rank 0": (dict(expand_weight=torch.ones(10, 4, 0).double()), ValueError, r"needs M >= 1 and r >= 1, got \(10, 4, 0\)"),
    "shrink shape": (dict(shrink_weight=torch.ones(6, 12).double()), ValueError, r"shrink_weight must be \[r \+ M, K\] = \[7, K\] .*got \(6, 12\) and x \(7, 12\)"),
    "scaling": (dict(scaling=float("nan")), ValueError, "scaling must be a finite number, got nan"),
    "dropout": (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "no seed": (dict(dropout_p=0.5, seed=None), TypeError, "seed must be a 0-dim int64 tensor when dropout_p > 0, got NoneType"),
    "number as seed": (dict(dropout_p=0.5, seed=3), TypeError, "seed must be a 0-dim int64 tensor when dropout_p > 0, got int"),
    "seed shape": (dict(dropout_p=0.5, seed=torch.tensor([3])), ValueError, r"seed must be a 0-dim int64 tensor, got torch.int64 \(1,\)"),
    "seed dtype": (dict(dropout_p=0.5, seed=torch.tensor(3.0)), ValueError, "seed must be a 0-dim int64 tensor, got torch.float32"),
    "other device": (dict(weight=torch.ones(10, 12, device="meta").double()), ValueError, "weight must be on x's device cpu, got meta"),
    "seed's device": (dict(dropout_p=0.5, seed=torch.tensor(3, device="meta")), ValueError, "seed must be on x's device cpu, got meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, error, text = BAD[name]
    names = ("x", "weight", "bias", "shrink_weight", "expand_weight")
    arguments = dict(zip(names, case(), strict=False)) | dict(scaling=1.0) | change
    with pytest.raises(error, match=text):
        moe_lora(**arguments)


def test_a_base_output_of_another_shape_is_refused():
    x, _, _, shrink, expand, _ = case()
    with pytest.raises(ValueError, match=r"base_output must be \(7, 10\), got \(7, 11\)"):
        moe_lora_add(torch.ones(7, 11).double(), x, shrink, expand, scaling=1.0)
    with pytest.raises(TypeError, match="base_output must have x's dtype"):
        moe_lora_add(torch.ones(7, 10), x, shrink, expand, scaling=1.0)
