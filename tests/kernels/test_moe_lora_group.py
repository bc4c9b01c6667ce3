"""Groups of linears, router bias, temperature, per-expert masks and backends of the op."""

import functools

import pytest
import torch
from floe_triton import (
    dispatch,
    moe_lora,
    moe_lora_add,
    moe_lora_group,
    moe_lora_group_add,
    reference,
)
from helpers.budget import relative_error
from helpers.lora_cases import SEED, case, draw
from hypothesis import given, settings
from hypothesis import strategies as st

import floe.ops  # noqa: F401  (floe's operators, which backend "native" is)

FEATURES = (10, 6, 8)


def group_case(linears=3, leading=(7,), rank=3, experts=4, columns=12, seed=0, dtype=torch.float64):
    """float64 x, then per linear: weights, biases, shrinks, expands, router biases, gradients."""
    drawn = [
        case(leading, columns, FEATURES[g], rank, experts, bias=g != 1, seed=seed + 10 * g)
        for g in range(linears)
    ]
    x = drawn[0][0].to(dtype)
    lists = [
        [None if t is None else t.to(dtype) for t in each] for each in zip(*drawn, strict=True)
    ]
    routers = [draw(experts, seed=seed + g).to(dtype) for g in range(linears)]
    return x, *lists[1:5], routers, lists[5]


def leaf(values):
    return [value.detach().clone().requires_grad_() for value in values]


def run(function, inputs, **settings):
    """Outputs and gradients of ``function(x, weights, biases, shrinks, expands, routers)``."""
    x, weights, biases, shrinks, expands, routers, grads = inputs
    (x,), shrinks, expands, routers = leaf([x]), leaf(shrinks), leaf(expands), leaf(routers)
    ys = function(x, weights, biases, shrinks, expands, router_biases=routers, **settings)
    torch.autograd.backward(ys, grads)
    return [*(y.detach() for y in ys), x.grad, *(t.grad for t in [*shrinks, *expands, *routers])]


def one_by_one(op, x, weights, biases, shrinks, expands, *, router_biases, **settings):
    each = zip(weights, biases, shrinks, expands, router_biases, strict=True)
    return [op(x, *linear, router_bias=router, **settings) for *linear, router in each]


def added(x, weights, biases, shrinks, expands, **settings):
    bases = [torch.nn.functional.linear(x, *frozen) for frozen in zip(weights, biases, strict=True)]
    return moe_lora_group_add(bases, x, shrinks, expands, **settings)


def assert_close(actual, expected, tolerance=1e-10):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        scale = 1 + (e.abs().max().item() if e.numel() else 0.0)
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * scale)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    linears=st.integers(1, 3),
    leading=st.sampled_from([(0,), (1,), (9,), (2, 3), ()]),
    rank=st.integers(1, 9),
    experts=st.integers(1, 6),
    columns=st.integers(1, 40),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    dropout_p=st.sampled_from([0.0, 0.4]),
    function=st.sampled_from([moe_lora_group, added]),
    backend=st.sampled_from(["eager", "native"]),
    seed=st.integers(0, 1000),
)
def test_a_group_equals_the_definition_of_each_linear(
    linears, leading, rank, experts, columns, temperature, dropout_p, function, backend, seed
):
    inputs = group_case(linears, leading, rank, experts, columns, seed)
    common = {"scaling": 1.7, "temperature": temperature, "dropout_p": dropout_p, "seed": SEED}
    expected = run(functools.partial(one_by_one, reference.moe_lora), inputs, **common)
    assert_close(run(function, inputs, backend=backend, **common), expected)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("function", [moe_lora_group, added])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [(5, 0), (0, 6), (0, 0)], ids=str)
def test_no_columns_or_no_features(sizes, dropout_p, function, backend):
    columns, features = sizes
    x, weights, biases, shrinks, expands, routers, grads = group_case(leading=(2, 3))
    inputs = (
        x[..., :columns],
        [w[:features, :columns] for w in weights],
        [b if b is None else b[:features] for b in biases],
        [s[:, :columns] for s in shrinks],
        [e[:features] for e in expands],
        routers,
        [grad[..., :features] for grad in grads],
    )
    common = {"scaling": 1.7, "dropout_p": dropout_p, "seed": SEED}
    expected = run(functools.partial(one_by_one, reference.moe_lora), inputs, **common)
    assert_close(run(function, inputs, backend=backend, **common), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradcheck(dropout_p):
    x, weights, biases, shrinks, expands, routers, _ = group_case(2, (4,), 2, 3, 5)
    flat = leaf([x, *shrinks, *expands, *routers])

    def outputs(x, *adapters):
        return tuple(
            moe_lora_group(
                x,
                weights,
                biases,
                adapters[:2],
                adapters[2:4],
                router_biases=adapters[4:],
                scaling=1.3,
                temperature=0.7,
                dropout_p=dropout_p,
                seed=SEED,
            )
        )

    assert torch.autograd.gradcheck(outputs, flat)


@pytest.mark.parametrize("unused", [0, 2])
def test_an_output_that_nothing_uses_gives_no_gradient(unused):
    x, weights, biases, shrinks, expands, _, grads = group_case()
    (x,), shrinks = leaf([x]), leaf(shrinks)
    ys = moe_lora_group(x, weights, biases, shrinks, expands, scaling=1.0)
    used = [g for g in range(3) if g != unused]
    torch.autograd.backward([ys[g] for g in used], [grads[g] for g in used])
    assert torch.count_nonzero(shrinks[unused].grad) == 0
    assert torch.count_nonzero(shrinks[used[0]].grad) > 0


def test_only_the_linears_asked_for_get_gradients():
    x, weights, biases, shrinks, expands, routers, grads = group_case()
    shrinks[1].requires_grad_()
    routers[2].requires_grad_()
    ys = moe_lora_group(x, weights, biases, shrinks, expands, scaling=1.0, router_biases=routers)
    torch.autograd.backward(ys, grads)
    given = [t.grad is not None for t in [x, *shrinks, *expands, *routers]]
    assert given == [False, *[False, True, False], *[False] * 3, *[False, False, True]]


def test_a_mask_for_each_expert_is_hydra_lora_s_loop():
    x, weight, bias, shrink, expand, grad = case((6,), 40, 9, 3, 4)
    x, shrink, expand = leaf([x, shrink, expand])
    common = {"scaling": 1.5, "dropout_p": 0.5, "seed": SEED}
    y = moe_lora(x, weight, bias, shrink, expand, dropout_mode="per_expert", **common)
    gate = torch.softmax(x @ shrink[3:].T, -1)
    loop = x @ weight.T + bias
    for i in range(4):
        kept = x * reference.dropout_keep(6, 40, 0.5, SEED + i) * 2
        loop = loop + 1.5 * gate[:, i, None] * (kept @ shrink[:3].T @ expand[:, i].T)
    assert_close([y], [loop])
    grads = [torch.autograd.grad(one, (x, shrink, expand), grad) for one in (y, loop)]
    assert_close(*grads)
    shared = moe_lora(x, weight, bias, shrink, expand, **common)
    assert not torch.allclose(y, shared)
    base = x @ weight.T + bias
    on_base = moe_lora_add(base, x, shrink, expand, dropout_mode="per_expert", **common)
    assert_close([on_base], [y])


def test_at_most_two_mebibytes_are_saved_for_16384_tokens():
    x, weight, _, shrink, expand, _ = (
        t if t is None else t.bfloat16() for t in case((16384,), 32, 48, 8, 4)
    )
    shrink, expand = leaf([shrink, expand])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        moe_lora(x, weight, None, shrink, expand, scaling=1.0, dropout_p=0.05, seed=SEED)
    known = {t.data_ptr() for t in (x, weight, shrink, expand)}
    assert 0 < sum(t.nbytes for t in saved if t.data_ptr() not in known) <= 2 * 2**20


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_experts_cost_the_output_no_second_rounding(backend):
    """At most 1.05 times the error of rounding the exact result once; adding after: 1.4 times."""
    x, weight, _, shrink, expand, _ = case((256,), 1024, 1024, 8, 4, bias=False)
    x, weight, shrink, expand = (t.bfloat16() for t in (x, weight, shrink, 0.1 * expand))
    wide = [t.double() for t in (x, shrink, expand)]
    base = x.double() @ weight.double().T
    exact = base + reference.moe_lora_delta(*wide, scaling=2.0)
    assert 0.05 < relative_error(base, exact) < 0.15  # the adapter's share of y
    once = relative_error(exact.bfloat16(), exact)
    y = moe_lora(x, weight, None, shrink, expand, scaling=2.0, backend=backend)
    assert relative_error(y, exact) <= 1.05 * once
    added = x @ weight.T + reference.moe_lora_delta(x, shrink, expand, scaling=2.0)
    assert relative_error(added, exact) > 1.3 * once


def bad(**changes):
    x, weights, biases, shrinks, expands, routers, _ = group_case(2)
    arguments = {
        "x": x,
        "weights": weights,
        "biases": biases,
        "shrink_weights": shrinks,
        "expand_weights": expands,
        "router_biases": routers,
        "scaling": 1.0,
    }
    return {**arguments, **changes}


X, WEIGHTS, _, SHRINKS, EXPANDS, ROUTERS, _ = group_case(2)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"expand_weights": []}, ValueError, "expand_weights must name at least one linear"),
        ({"biases": [None]}, ValueError, "biases must have one entry per linear, 2, got 1"),
        ({"router_biases": [ROUTERS[0], None]}, ValueError, "all given or all None"),
        ({"router_biases": [ROUTERS[0], ROUTERS[1][:2]]}, ValueError, "router_bias of linear 1"),
        (
            {
                "shrink_weights": [SHRINKS[0], SHRINKS[1][1:]],
                "expand_weights": [EXPANDS[0], EXPANDS[1][..., 1:]],
            },
            ValueError,
            "one number of experts and one rank",
        ),
        ({"weights": [WEIGHTS[0], WEIGHTS[1].float()]}, TypeError, "weight of linear 1 must have"),
        ({"shrink_weights": [SHRINKS[0], SHRINKS[1].float()]}, TypeError, "must have one dtype"),
        (
            {"temperature": 0.0},
            ValueError,
            "temperature must be a finite number of at least 1e-06, got 0.0",
        ),
        ({"dropout_mode": "each"}, ValueError, "dropout_mode must be one of"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"backend": "gemm"}, ValueError, "backend 'gemm' takes bfloat16, float16 and float32"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:40],
)
def test_bad_input_is_named(changes, error, text):
    with pytest.raises(error, match=text):
        moe_lora_group(**bad(**changes))


def test_a_backend_that_cannot_run_here_says_why():
    x, weight, bias, shrink, expand, _ = (t.float() for t in case())
    with pytest.raises(ValueError, match="backend 'fused' needs an NVIDIA GPU, got device cpu"):
        moe_lora(x, weight, bias, shrink, expand, scaling=1.0, backend="fused")
    with pytest.raises(ValueError, match="backend 'native' runs on the CPU, got x on meta"):
        dispatch.choose(x.to("meta"), "native")


def plain(**changes):
    """The usual call, without any bias; ``on_base`` gives base outputs in place of weights."""
    x, weights, _, shrinks, expands, _, _ = group_case(2, (4,))
    arguments = {"x": x, "weights": weights, "shrink_weights": shrinks, "expand_weights": expands}
    return {**arguments, "biases": [None, None], "scaling": 1.0, **changes}


ROWS = SHRINKS[0]


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"shrink_weights": [ROWS, ROWS.to("meta")]}, ValueError, "must be on x's device"),
        ({"weights": [WEIGHTS[0], WEIGHTS[1].float()]}, TypeError, "weight of linear 1 must have"),
        ({"shrink_weights": [ROWS, ROWS.float()]}, TypeError, "must have one dtype"),
        ({"expand_weights": [EXPANDS[0], EXPANDS[1].float()]}, TypeError, "must have one dtype"),
        (
            {
                "shrink_weights": [ROWS, ROWS[1:]],
                "expand_weights": [EXPANDS[0], EXPANDS[1][..., 1:]],
            },
            ValueError,
            "one number of experts and one rank",
        ),
        (  # r + M agree
            {"expand_weights": [EXPANDS[0], EXPANDS[1].transpose(1, 2)]},
            ValueError,
            "one number of experts and one rank",
        ),
        ({"shrink_weights": [ROWS, ROWS[1:]]}, ValueError, "shrink_weight of linear 1 must be"),
        ({"weights": [WEIGHTS[0], WEIGHTS[1][1:]]}, ValueError, "weight of linear 1 must be"),
        (
            {"weights": [WEIGHTS[0], WEIGHTS[1].clone().requires_grad_()]},
            ValueError,
            "weight of linear 1 must be frozen",
        ),
        (
            {"shrink_weights": [ROWS.int()] * 2, "expand_weights": [one.int() for one in EXPANDS]},
            TypeError,
            "must be floating point",
        ),
        (
            {"shrink_weights": [ROWS[:4]] * 2, "expand_weights": [one[..., :0] for one in EXPANDS]},
            ValueError,
            "needs M >= 1 and r >= 1",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:40],
)
def test_bad_input_of_the_usual_call_is_named(changes, error, text):
    moe_lora_group(**plain())
    with pytest.raises(error, match=text):
        moe_lora_group(**plain(**changes))


def test_a_base_output_of_another_shape_is_named():
    x, _, _, shrinks, expands, _, grads = group_case(2, (4,))
    moe_lora_group_add(grads, x, shrinks, expands, scaling=1.0)
    with pytest.raises(ValueError, match="base_output of linear 1 must be"):
        moe_lora_group_add([grads[0], grads[1][1:]], x, shrinks, expands, scaling=1.0)


def test_router_biases_of_some_linears_only_are_named():
    with pytest.raises(ValueError, match="all given or all None"):
        moe_lora_group(**plain(router_biases=[None, ROUTERS[1]]))
