"""The MoE-LoRA ops inside torch's machinery: opcheck, compile, checkpointing, autocast, threads."""

import functools
import threading

import pytest
import torch
from floe_triton import draw_seed, moe_lora, reference
from helpers.budget import assert_within_budget
from helpers.lora_cases import NAMES, OPS, SEED, added, assert_equal_runs, case, draw, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import floe.ops  # noqa: F401  (the native dropout, which the ops then use)

OP_CASES = [
    {"leading": (5,), "dropout_p": 0.0},
    {"leading": (5,), "dropout_p": 0.3},
    {"leading": (1,), "rank": 1, "experts": 1, "dropout_p": 0.0, "bias": False},
    {"leading": (0,), "dropout_p": 0.0},
    {"leading": (0,), "dropout_p": 0.3, "bias": False},
    {"leading": (3,), "rank": 7, "experts": 2, "dropout_p": 0.3, "base": True},
    {"leading": (4,), "dropout_p": 0.3, "linears": 3, "router_bias": True},
    {"leading": (4,), "dropout_p": 0.0, "linears": 2, "router_bias": True, "base": True},
]


def op_arguments(
    leading,
    dropout_p,
    base=False,
    linears=1,
    router_bias=False,
    dtype=torch.float32,
    adapter=torch.float32,
    **sizes,
):
    """Positional arguments of both ops, for a group of linears of one input."""
    drawn = [case(leading, **sizes) for _ in range(linears)]
    x = drawn[0][0].to(dtype)
    weights, biases, grads = (
        [None if one[i] is None else one[i].to(dtype) for one in drawn] for i in (1, 2, 5)
    )
    shrinks, expands = ([one[i].to(adapter) for one in drawn] for i in (3, 4))
    base_outputs = [draw(*grad.shape).to(dtype) for grad in grads] if base else []
    weights, biases = ([], []) if base else (weights, biases)
    experts = expands[0].shape[1]
    router_biases = [draw(experts).to(adapter) if router_bias else None for _ in drawn]
    seed = SEED if dropout_p else None
    settings = (1.5, 0.7, dropout_p, seed, "auto", [], 0)
    group = (weights, biases, base_outputs, shrinks, expands, router_biases, *settings)
    _, hidden, gate, z = torch.ops.floe.moe_lora_forward(x, *group)
    return (x, *group), (grads, x, *group, hidden, gate, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arguments", OP_CASES, ids=str)
def test_opcheck_forward(arguments, dtype):
    forward, _ = op_arguments(**arguments, dtype=dtype)
    torch.library.opcheck(torch.ops.floe.moe_lora_forward, forward)


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, False, True)], ids=str
)
@pytest.mark.parametrize("arguments", OP_CASES, ids=str)
def test_opcheck_backward(arguments, needs):
    _, backward = op_arguments(**arguments)
    biased = needs[1] and arguments.get("router_bias", False)
    torch.library.opcheck(torch.ops.floe.moe_lora_backward, (*backward, *needs, biased, False))


@pytest.mark.parametrize("learning", ["x", "shrink", "expand", "router", "all"])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_flops_are_those_of_the_definition(backend, learning):
    """Forward and backward, as torch counts its own operators; tokens and sizes all differ."""

    def counted(op, **settings):
        given = dict(zip(NAMED, case((5,), 24, 9, 2, 3)[:5], strict=True))
        given["router_bias"] = draw(3)
        for name in ("x", "shrink_weight", "expand_weight", "router_bias"):
            given[name].requires_grad_(learning == "all" or name.startswith(learning))
        with FlopCounterMode(display=False) as counter:
            y = op(**given, scaling=2.0, **settings)
            forward = counter.get_total_flops()
            y.sum().backward()
        return forward, counter.get_total_flops() - forward

    assert counted(moe_lora, backend=backend)[0] == counted(reference.moe_lora)[0]
    assert counted(moe_lora, backend=backend) == counted(product_form)


NAMED = ("x", "weight", "bias", "shrink_weight", "expand_weight")


def product_form(x, weight, bias, shrink_weight, expand_weight, *, scaling, router_bias):
    """The adapted linear as anyone would write it with few products."""
    features, experts, rank = expand_weight.shape
    hidden, logits = (x @ shrink_weight.T).split([rank, experts], dim=1)
    gate = torch.softmax(logits + router_bias, -1)
    z = (scaling * gate[..., None] * hidden[:, None]).flatten(1)
    return torch.addmm(bias, x, weight.T) + z @ expand_weight.reshape(features, -1).T


def test_flops_of_the_native_operators():
    ops, settings = torch.ops.floe, (1.0, 1.0, 0.0, None)
    x, _, _, shrink, expand, grad = case((5,))
    products = 2 * 5 * (shrink.numel() + expand.numel())
    with FlopCounterMode(display=False) as counter:
        _, *saved = ops.moe_lora_experts(x, [shrink], [expand], [], [], [], *settings, [], 0)
        assert counter.get_total_flops() == products
        ops.moe_lora_experts_backward(
            [grad], x, [shrink], [expand], *saved, *settings, True, True, True, False
        )
        assert counter.get_total_flops() == 3 * products


@OPS
def test_without_gradients_to_come_the_outputs_are_the_same_bits(op):
    inputs, settings = case((6,)), {"scaling": 2.0, "dropout_p": 0.4, "seed": SEED}
    expected, *_ = run(op, inputs, torch.float32, **settings)
    x, weight, bias, shrink, expand, _ = (tensor.float() for tensor in inputs)
    assert torch.equal(op(x, weight, bias, shrink, expand, **settings), expected)
    x.requires_grad_()
    with torch.no_grad():
        assert torch.equal(op(x, weight, bias, shrink, expand, **settings), expected)


class _Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("learns", [True, False])
def test_whoever_watches_ops_sees_one(learns):
    x, weight, bias, shrink, expand, _ = case((6,))
    with _Watching() as watching:
        y = moe_lora(x.requires_grad_(learns), weight, bias, shrink, expand, scaling=2.0)
        if learns:
            y.sum().backward()
    found = [name for name in watching.seen if name.startswith("floe.")]
    assert (
        found == ["floe.moe_lora_forward.default", "floe.moe_lora_backward.default"][: 1 + learns]
    )


def test_fake_tensors_get_shapes_outside_their_mode():
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        x, weight, bias, shrink, expand, _ = (mode.from_tensor(tensor) for tensor in case((6,)))
    y = moe_lora(x, weight, bias, shrink, expand, scaling=2.0)
    assert (type(y), y.shape) == (type(x), (6, 10))


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo's own
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_in_one_graph_it_gives_the_same_gradients(dynamic):
    settings = {"scaling": 2.0, "dropout_p": 0.4, "seed": SEED}
    torch._dynamo.reset()

    def layer(op, x, weight, bias, shrink, expand, **settings):
        return torch.tanh(op(x, weight, bias, shrink, expand, **settings))

    for op in (moe_lora, added):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for leading in [(4, 5), (4, 7)] if dynamic else [(4, 5)]:
            inputs = case(leading)
            actual = run(functools.partial(compiled, op), inputs, **settings)
            assert_equal_runs(actual, run(functools.partial(layer, op), inputs, **settings))


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
    """hidden and gate in float32, z in x's dtype: no mask, no dropped copy, no expert's output."""
    tokens, rank, experts = 256, 8, 4
    x, weight, bias, shrink, expand, _ = (
        t.to(dtype) for t in case((tokens,), 64, 48, rank, experts)
    )
    inputs = [x, weight, shrink.requires_grad_(), expand.requires_grad_()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        moe_lora(*inputs[:2], bias, *inputs[2:], scaling=1.0, dropout_p=0.05, seed=SEED)
    known = {t.data_ptr() for t in inputs}
    extra = sum(t.nbytes for t in saved if t.data_ptr() not in known)
    assert extra == tokens * (4 * rank + 4 * experts + dtype.itemsize * rank * experts) + 8
    assert len(saved) == 8


def test_threads_get_what_one_thread_gets():
    inputs = [case((5 + i,), seed=i) for i in range(8)]
    settings = {"scaling": 1.0, "dropout_p": 0.3, "seed": SEED}
    expected = [run(moe_lora, one, **settings) for one in inputs]
    failures = []

    def work(index):
        for _ in range(20):
            for actual, wanted in zip(
                run(moe_lora, inputs[index], **settings), expected[index], strict=True
            ):
                if not torch.equal(actual, wanted):
                    failures.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
