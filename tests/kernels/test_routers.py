"""Every way to route: any shape against plain loops, what torch makes of it, and other routers."""

import floe_triton
import pytest
import torch
from floe_triton import reference
from helpers import routing
from helpers.attack import trials
from hypothesis import given, settings
from hypothesis import strategies as st

import floe.ops  # noqa: F401  (the native operators)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("kind", routing.KINDS)
@settings(max_examples=trials(500, share=40), deadline=None, derandomize=True)
@given(function=st.sampled_from([routing.moe_lora_group, routing.on_base]), **routing.shapes)
def test_any_shape(kind, backend, function, **shape):
    given = routing.case(kind, **shape)
    routing.check(given, torch.float64, torch.float64, backend, function)
    routing.check(given, torch.float32, torch.float32, backend, function)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in routing.KINDS if "top_k" not in kind])
def test_every_dtype(kind, dtype, backend):
    """Without top_k: which logits are the largest depends on the dtype."""
    given = routing.case(kind, 65, 96, 8, 4, linears=2, dropout_p=0.3, seed=7)
    for name, values in given.leaves.items():
        rounded = [v.to(dtype).double() for v in (values if name != "x" else [values])]
        given.leaves[name] = rounded[0] if name == "x" else rounded
    adapter = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    routing.check(given, dtype, adapter, backend)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_top_k_uses_exactly_k_experts_and_ties_go_to_the_lower_index(backend):
    x, weight, shrink = torch.randn(5, 6), torch.zeros(4, 6), torch.randn(3 + 5, 6)
    shrink[3:] = 0.0  # the bias alone decides
    bias = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0])
    expand = torch.randn(4, 5, 3)
    call = {"scaling": 1.0, "router_bias": bias, "backend": backend}
    y = floe_triton.moe_lora(x, weight, None, shrink, expand, top_k=2, **call)
    weights = torch.softmax(bias[[1, 2]], 0)
    hidden = x @ shrink[:3].T
    expected = sum(w * (hidden @ expand[:, i].T) for w, i in zip(weights, (1, 2), strict=True))
    torch.testing.assert_close(y, expected)
    expand[:, [0, 3, 4]] = torch.nan  # 0 * NaN is NaN: only the two are read into the sum
    expand_zero = expand.nan_to_num(1e30)
    y = floe_triton.moe_lora(x, weight, None, shrink, expand_zero, top_k=2, **call)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_the_largest_k_of_all_is_the_softmax(backend):
    x, weight, shrink = torch.randn(9, 6), torch.randn(4, 6), torch.randn(3 + 5, 6)
    expand, call = torch.randn(4, 5, 3), {"scaling": 1.0, "backend": backend}
    every = floe_triton.moe_lora(x, weight, None, shrink, expand, top_k=5, **call)
    assert torch.equal(every, floe_triton.moe_lora(x, weight, None, shrink, expand, **call))


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_not_a_number_stays_one(backend):
    x, weight, shrink = torch.randn(3, 6), torch.randn(4, 6), torch.randn(3 + 5, 6)
    x[1, 2] = torch.nan
    y = floe_triton.moe_lora(
        x, weight, None, shrink, torch.randn(4, 5, 3), scaling=1.0, top_k=2, backend=backend
    )
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", routing.KINDS)
def test_gradients_and_those_of_gradients_are_those_of_finite_differences(kind):
    given = routing.case(kind, 4, 5, 2, 3, seed=4)
    leaves = [
        t.requires_grad_()
        for values in given.leaves.values()
        for t in (values if isinstance(values, list) else [values])
    ]
    names = [name for name in given.leaves if name != "x"]

    def call(x, *tensors):
        lists = {name: [tensor] for name, tensor in zip(names, tensors, strict=True)}
        return floe_triton.moe_lora_group(
            x,
            given.weights,
            given.biases,
            lists["shrink"],
            lists["expand"],
            gates=lists.get("gates"),
            router_biases=lists.get("router_bias"),
            **given.settings,
        )[0]

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo's own
@pytest.mark.parametrize("kind", routing.KINDS)
def test_a_compiled_call_is_one_op_and_the_same(kind):
    given = routing.case(kind, 7, 12, 3, 4, linears=2, dropout_p=0.3, seed=5)
    compiled = torch.compile(routing.moe_lora_group, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        given.run(compiled, torch.float32, torch.float32),
        given.run(routing.moe_lora_group, torch.float32, torch.float32),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_gates_alone_may_learn():
    x, weight, shrink = torch.randn(9, 6), torch.randn(4, 6), torch.randn(3, 6)
    expand = torch.randn(4, 5, 3)
    for backend in ("eager", "native"):
        gates = torch.randn(9, 5, requires_grad=True)
        y = floe_triton.moe_lora(
            x, weight, None, shrink, expand, scaling=2.0, gates=gates, backend=backend
        )
        (grad,) = torch.autograd.grad(y.sum(), gates)
        expected = 2.0 * torch.einsum("tr,nmr->tm", x @ shrink.T, expand)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 6}, r"top_k must be 0 \(all\) or in \[1, M\] = \[1, 5\], got 6"),
        ({"top_k": -1}, r"top_k must be 0 \(all\)"),
        ({"top_k": 2.0}, "top_k must be an int, got float"),
        ({"top_k": True}, "top_k must be an int, got bool"),
        ({"gates": torch.ones(9, 5)}, r"as gates are given"),
        ({"gates": torch.ones(9, 4), "shrink_weight": torch.ones(3, 6)}, r"gates must be \[..., M"),
        ({"gates": torch.ones(9, 5).long(), "shrink_weight": torch.ones(3, 6)}, "floating point"),
        (
            {"gates": torch.ones(9, 15), "shrink_weight": torch.ones(3, 6)},
            r"\[M r, K\]",
        ),
        (
            {"gates": torch.ones(9, 5), "shrink_weight": torch.ones(3, 6), "top_k": 2},
            "top_k must be 0 where gates are given, got 2",
        ),
        (
            {"gates": torch.ones(9, 5), "shrink_weight": torch.ones(3, 6), "temperature": 2.0},
            "temperature must be 1 where gates are given, got 2.0",
        ),
        (
            {
                "gates": torch.ones(9, 5),
                "shrink_weight": torch.ones(3, 6),
                "router_bias": torch.ones(5),
            },
            "router_bias must be None where gates are given",
        ),
        ({"shrink_weight": torch.ones(9, 6)}, r"\[8, K\] or \[M r \+ M, K\] = \[20, K\]"),
    ],
    ids=str,
)
def test_what_makes_no_routing_is_refused(changes, message):
    given = {
        "x": torch.ones(9, 6),
        "weight": torch.ones(4, 6),
        "bias": None,
        "shrink_weight": torch.ones(8, 6),
        "expand_weight": torch.ones(4, 5, 3),
        "scaling": 1.0,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        floe_triton.moe_lora(**{**given, **changes})


# Routers of other works, each a few lines before the op, against a loop over tokens.


def loop(x, weight, a, expand, gates):
    """One token after the other, one expert after the other."""
    rows = []
    for token, gate in zip(x, gates, strict=True):
        y = weight @ token
        for i, factor in enumerate(gate):
            y = y + factor * (expand[:, i] @ (a @ token))
        rows.append(y)
    return torch.stack(rows)


def layer(tokens=9, columns=6, features=4, experts=5, rank=3):
    shapes = (tokens, columns), (features, columns), (rank, columns), (features, experts, rank)
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def test_routing_on_the_previous_layer_s_scores():
    """HiLoMoE (arXiv 2510.10432): a layer's router sees the scores that the one before gave."""
    x, weight, a, expand = layer()
    before = torch.softmax(torch.randn(9, 7, dtype=torch.float64), -1).requires_grad_()
    router = torch.randn(5, 7, dtype=torch.float64)
    gates = torch.softmax(before @ router.T, -1)
    y = floe_triton.moe_lora(x, weight, None, a, expand, scaling=1.0, gates=gates)
    torch.testing.assert_close(y, loop(x, weight, a, expand, gates))
    (grad,) = torch.autograd.grad(y.square().sum(), before)
    (expected,) = torch.autograd.grad(
        loop(x, weight, a, expand, torch.softmax(before @ router.T, -1)).square().sum(), before
    )
    torch.testing.assert_close(grad, expected)


def test_nested_experts_of_which_a_token_uses_the_first_k():
    """Adaptive computation modules (arXiv 2312.10193): how many learners each token gets."""
    x, weight, a, expand = layer()
    k = torch.randint(0, 6, (9,))
    gates = (torch.arange(5) < k[:, None]).double()
    y = floe_triton.moe_lora(x, weight, None, a, expand, scaling=1.0, gates=gates)
    for token, count in enumerate(k):
        expected = weight @ x[token]
        for i in range(count):
            expected = expected + expand[:, i] @ (a @ x[token])
        torch.testing.assert_close(y[token], expected)


def test_an_expert_by_task_or_hash():
    x, weight, a, expand = layer()
    task = torch.randint(0, 5, (9,))
    gates = torch.nn.functional.one_hot(task, 5).double()
    y = floe_triton.moe_lora(x, weight, None, a, expand, scaling=1.0, gates=gates)
    for token, i in enumerate(task):
        torch.testing.assert_close(y[token], weight @ x[token] + expand[:, i] @ (a @ x[token]))


def test_a_deep_router_with_an_a_per_expert():
    """X-LoRA (arXiv 2402.07148): a small network scales whole LoRA adapters for each token."""
    x, weight, _, expand = layer()
    a = torch.randn(5, 3, 6, dtype=torch.float64)
    router = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)
    ).double()
    gates = torch.softmax(router(x), -1)
    y = floe_triton.moe_lora(x, weight, None, a.flatten(0, 1), expand, scaling=1.0, gates=gates)
    expected = x @ weight.T
    for i in range(5):
        expected = expected + gates[:, i, None] * (x @ a[i].T @ expand[:, i].T)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in router[2].parameters())


def test_rank_wise_routing():
    """SMoRA (arXiv 2501.15103): every rank is an expert with its own row of A, top-k of them."""
    x, weight, _, _ = layer()
    rows, expand = torch.randn(8 + 8, 6).double(), torch.randn(4, 8, 1).double()
    y = floe_triton.moe_lora(x, weight, None, rows, expand, scaling=1.0, top_k=3)
    gates = reference.gate(x, rows[8:], top_k=3)
    assert ((gates > 0).sum(1) == 3).all()
    expected = x @ weight.T + (gates * (x @ rows[:8].T)) @ expand[:, :, 0].T
    torch.testing.assert_close(y, expected)
