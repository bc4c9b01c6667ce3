"""Derivatives of every order and mode through the ops: those of the definition, or an error."""

import functools

import pytest
import torch
from floe_triton import (
    keyed_dropout,
    moe_lora,
    moe_lora_add,
    moe_lora_group,
    moe_lora_group_add,
    reference,
)
from helpers.budget import relative_error
from helpers.lora_cases import SEED, case, draw
from helpers.small_adapters import IDS, adapted
from torch.autograd import forward_ad
from torch.autograd import functional as classic
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from floe import ops

# torch's own, at its first forward-mode derivative
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

BACKENDS = pytest.mark.parametrize("backend", ["eager", "native"])
SMALL = draw(3, 4)
LINEAR = case()[1:5]  # weight, bias, shrink_weight, expand_weight
SETTINGS = {"scaling": 1.3, "temperature": 0.7, "dropout_p": 0.4, "seed": SEED}


def group(x, shrink0, shrink1, expand0, expand1, router0, router1, *, backend):
    return tuple(
        moe_lora_group(
            x,
            [SMALL] * 2,
            [SMALL[:, 0], None],
            [shrink0, shrink1],
            [expand0, expand1],
            router_biases=[router0, router1],
            backend=backend,
            **SETTINGS,
        )
    )


def on_base(x, base0, base1, shrink0, shrink1, expand0, expand1, *, backend):
    return tuple(
        moe_lora_group_add(
            [base0, base1], x, [shrink0, shrink1], [expand0, expand1], backend=backend, **SETTINGS
        )
    )


def leaves(*shapes):
    return [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


CASES = [
    (group, leaves((2, 4), (3, 4), (3, 4), (3, 2, 1), (3, 2, 1), (2,), (2,))),
    (on_base, leaves((2, 4), (2, 3), (2, 3), (3, 4), (3, 4), (3, 2, 1), (3, 2, 1))),
]


@BACKENDS
@pytest.mark.parametrize(("function", "inputs"), CASES, ids=["group", "on base"])
def test_first_derivatives_in_every_mode(function, inputs, backend):
    outputs = functools.partial(function, backend=backend)
    assert torch.autograd.gradcheck(
        outputs,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        fast_mode=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize(
    ("function", "inputs", "backend"),
    [(*CASES[0], "native"), (*CASES[1], "eager")],
    ids=["group", "on base"],
)
def test_second_derivatives_in_every_mode(function, inputs, backend):
    outputs = functools.partial(function, backend=backend)
    assert torch.autograd.gradgradcheck(
        outputs, inputs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


def penalty(y):
    return y.square().sum()


def double_backward(f, x):
    (grad,) = torch.autograd.grad(f(x.requires_grad_()), x, create_graph=True)
    return torch.autograd.grad(penalty(grad), x)[0]


def through_grad_outputs_alone(f, x):
    """The derivative of a gradient with respect to what came from above."""
    from_above = torch.ones((), dtype=x.dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(f(x.requires_grad_()), x, from_above, create_graph=True)
    return torch.autograd.grad(penalty(grad), from_above)[0]


def forward_mode(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x + 1))).tangent


def forward_over_reverse(f, x):
    y = f(x.requires_grad_())
    with forward_ad.dual_level():
        above = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 3))
        (grad,) = torch.autograd.grad(y, x, above)
        return forward_ad.unpack_dual(grad).tangent


def batched_grads(f, x):
    y = f(x.requires_grad_())
    return torch.autograd.grad(y, x, torch.arange(3.0).to(y), is_grads_batched=True)[0]


ACTS = {
    "hessian": classic.hessian,
    "vectorized hessian": lambda f, x: classic.hessian(f, x, vectorize=True),
    "jvp": lambda f, x: classic.jvp(f, x, x + 1)[1],
    "hvp": lambda f, x: classic.hvp(f, x, x + 1)[1],
    "vjp": lambda f, x: penalty(classic.vjp(f, x.requires_grad_(), create_graph=True)[1]),
    "forward-mode jacobian": lambda f, x: classic.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "double backward": double_backward,
    "grad_outputs alone": through_grad_outputs_alone,
    "forward mode": forward_mode,
    "forward over reverse": forward_over_reverse,
    "batched grads": batched_grads,
    "func.grad of grad": lambda f, x: torch.func.grad(lambda x: penalty(torch.func.grad(f)(x)))(x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x + 1,))[1],
    "func.vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "func.jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
    "func.vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "per sample": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
}


def single(op, x, **settings):
    return op(x, *LINEAR, **SETTINGS, **settings).pow(2).sum()


def single_on_base(x, **settings):
    base = torch.nn.functional.linear(x, *LINEAR[:2])
    return moe_lora_add(base, x, *LINEAR[2:], **SETTINGS, **settings).pow(2).sum()


def dropped(function, x):
    return function(x.sin(), 0.4, SEED).pow(3).sum()


@pytest.mark.filterwarnings("ignore:.*performance drop.*:UserWarning")
@pytest.mark.parametrize("act", ACTS)
def test_everything_torch_differentiates_is_that_of_the_definition(act):
    def result(f):
        return ACTS[act](f, draw(2, 12))

    expected = result(functools.partial(single, reference.moe_lora))
    assert expected.abs().max() > 0
    for backend in ("eager", "native"):
        for f in (functools.partial(single, moe_lora), single_on_base):
            torch.testing.assert_close(result(functools.partial(f, backend=backend)), expected)
    mask = result(functools.partial(dropped, reference.dropout))
    torch.testing.assert_close(result(functools.partial(dropped, keyed_dropout)), mask)


@BACKENDS
def test_one_argument_may_be_made_of_another(backend):
    """The gradient of x does not take in what comes through expand_weight, twice then."""

    def gradient(op, **settings):
        x, weight, bias, shrink, expand, grad = case()
        x.requires_grad_()
        y = op(x, weight, bias, shrink, expand * x.mean(), scaling=1.0, **settings)
        (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
        return first, torch.autograd.grad(penalty(first), x)[0]

    found = gradient(moe_lora, backend=backend)
    torch.testing.assert_close(found, gradient(reference.moe_lora))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_s_graph_keeps_the_dtypes(dtype):
    x, weight, bias, shrink, expand, _ = (t.to(dtype) for t in case())
    inputs = [x, shrink.float(), expand.float()]
    for tensor in inputs:
        tensor.requires_grad_()
    y = moe_lora(x, weight, bias, *inputs[1:], scaling=1.0)
    grads = torch.autograd.grad(penalty(y), inputs, create_graph=True)
    second = torch.autograd.grad(sum(map(penalty, grads)), inputs)
    for grad, again, tensor in zip(grads, second, inputs, strict=True):
        assert grad.dtype == again.dtype == tensor.dtype
        assert again.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing_as_torch_s_own_operators(use_reentrant):
    """The reentrant kind refuses it."""

    def second(op):
        x = draw(2, 12).requires_grad_()
        y = checkpoint(single, op, x, use_reentrant=use_reentrant)
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(penalty(grad), x)[0]

    if use_reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=True"):
            second(moe_lora)
    else:
        torch.testing.assert_close(second(moe_lora), second(reference.moe_lora))


def test_vmap_over_adapters():
    x, weight, bias, shrink, expand, _ = case()
    shrinks, expands = torch.stack([shrink, -shrink]), torch.stack([expand, expand.sin()])
    each = torch.func.vmap(lambda *adapter: moe_lora(x, weight, bias, *adapter, **SETTINGS))(
        shrinks, expands
    )
    for found, *adapter in zip(each, shrinks, expands, strict=True):
        torch.testing.assert_close(found, moe_lora(x, weight, bias, *adapter, **SETTINGS))


def test_curvature_of_an_adapted_model():
    """Hessian times a vector, by double backward and by torch.func, against differences."""
    model = adapted(layers=[0], dropout=0.0).double()
    start = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    vector = {n: torch.randn_like(p) for n, p in start.items()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (IDS,)).logits.square().mean()

    def gradient(step=0.0, **more):
        at = {n: (p + step * vector[n]).requires_grad_() for n, p in start.items()}
        values = list(at.values())
        return values, torch.autograd.grad(loss(at), values, **more)

    with sdpa_kernel(SDPBackend.MATH):
        differences = [
            (after - before) / 2e-3
            for after, before in zip(gradient(1e-3)[1], gradient(-1e-3)[1], strict=True)
        ]
        values, grads = gradient(create_graph=True)
        twice = torch.autograd.grad(grads, values, list(vector.values()))
        _, forward = torch.func.jvp(torch.func.grad(loss), (start,), (vector,))
    for by_difference, *found in zip(differences, twice, forward.values(), strict=True):
        for one in found:
            assert relative_error(one, by_difference) < 0.01  # the model's norms are float32


def forward(x):
    _, weight, bias, shrink, expand, _ = case()
    return x, [weight], [bias], [], [shrink], [expand], [None], 1.0, 1.0, 0.0, None, "auto", [], 0


DIRECT = {
    "moe_lora_forward": forward,
    "keyed_dropout": lambda x: (x, 0.4, SEED),
    "mask_gradients": lambda x: (x[None], torch.ones_like(x[None]), 1, None),
    "accumulate_fisher_": lambda x: (x.new_zeros(12), x[None], x.detach()[None], 1, None, None),
}


@pytest.mark.parametrize("name", DIRECT)
def test_a_direct_call_refuses_the_derivatives_it_has_not(name):
    op = getattr(torch.ops.floe, name)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        op(*DIRECT[name](forward_ad.make_dual(draw(7, 12), draw(7, 12))))
    if name == "keyed_dropout":
        return  # has one

    def differentiate():
        (y,), *_ = op(*DIRECT[name](draw(7, 12).requires_grad_()))
        y.sum().backward()

    with pytest.raises(RuntimeError, match="no derivative"):
        differentiate()


def test_fisher_sums_refuse_what_transforms_them():
    activation, gradient = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    with pytest.raises(RuntimeError, match="mask_gradients has no derivatives"):
        torch.func.grad(lambda a: ops.mask_gradients(a, gradient, 2).sum())(activation)
    fisher = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="accumulate_fisher_ has no derivatives"):
        torch.func.vmap(lambda a: ops.accumulate_fisher_(fisher, a, gradient, 2))(activation[None])


def test_autograd_knows_that_fisher_was_written():
    fisher = torch.zeros(4, dtype=torch.float64)
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    product = weight * fisher
    ops.accumulate_fisher_(fisher, draw(1, 2, 4), draw(1, 2, 4), 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
