"""Projections of one input run as one op, and give what they give alone."""

import contextlib
import copy
from collections import Counter
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers.tiny import tiny_model
from torch._dynamo.backends.common import aot_autograd

from floe import FloeConfig, get_model, ops
from floe.adapters import adapted_modules
from floe.adapters.linear import separate_base
from floe.adapters.shared_input import link

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(14).view(2, 7)


def adapted(share_input=True, dropout=0.0, **settings):
    base = tiny_model()
    config = FloeConfig(
        r=3,
        num_experts=2,
        dropout=dropout,
        share_input=share_input,
        **{"target_modules": ALL, **settings},
    )
    model = get_model(base, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "floe_expand" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model


def outputs(model):
    """Logits, and the gradient of every adapter parameter."""
    logits = model(input_ids=TOKENS).logits
    logits.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), **grads}


def calls(model, run):
    """Linears per call of the op during ``run(model)``."""
    found = []
    group, single = ops.moe_lora_group, ops.moe_lora

    def grouped(x, weights, *rest, **settings):
        found.append(len(weights))
        return group(x, weights, *rest, **settings)

    def alone(*arguments, **settings):
        found.append(1)
        return single(*arguments, **settings)

    with (
        mock.patch.object(ops, "moe_lora_group", grouped),
        mock.patch.object(ops, "moe_lora", alone),
    ):
        run(model)
    return found


def alone(layer, x):
    """What the layer gives outside its parent's call."""
    shared, layer.shared = layer.shared, None
    try:
        return layer(x)
    finally:
        layer.shared = shared


def test_shared_or_alone_logits_and_gradients_agree():
    expected, actual = outputs(adapted(False)), outputs(adapted(True))
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)


def test_attention_and_feed_forward_inputs_are_one_op_each():
    model = adapted()
    layers = len(adapted_modules(model)) // len(ALL)
    assert calls(model, outputs) == [3, 1, 2, 1] * layers
    assert set(calls(adapted(False), outputs)) == {1}


def test_nothing_is_kept_after_a_forward():
    model = adapted()
    outputs(model)
    assert all(m.shared is None or m.shared._ready is None for m in adapted_modules(model).values())


def test_members_that_differ_compute_alone():
    two_ranks = adapted(rank_pattern={"model.layers.0.self_attn.k_proj": 5})
    assert calls(two_ranks, outputs)[:6] == [1, 1, 1, 1, 2, 1]


def test_a_hooked_base_makes_its_group_compute_alone():
    model = adapted()
    hooked = next(iter(adapted_modules(model).values()))
    handle = hooked.base_layer.register_forward_hook(lambda *_: None)
    assert calls(model, outputs)[:5] == [1, 1, 1, 2, 1]  # k, v, o, gate/up, down; q adds alone
    handle.remove()
    assert calls(model, outputs)[0] == 3


def test_a_change_between_two_members_is_seen():
    q, k, *_ = adapted_modules(adapted()).values()
    x = torch.randn(3, q.in_features)
    first = k(x)  # leaves q's output ready
    x.mul_(2.0)
    torch.testing.assert_close(q(x), alone(q, x))
    with torch.no_grad():
        assert not q(x).requires_grad
    assert k(x).requires_grad
    torch.testing.assert_close(k(x), alone(k, x))
    assert not torch.equal(first, k(x))


def test_a_mode_changed_between_two_members_is_seen():
    model = adapted(dropout=0.5).train()
    q, k, *_ = adapted_modules(model).values()
    x = torch.randn(3, q.in_features)
    q(x)  # leaves k's output, dropped
    model.eval()
    torch.testing.assert_close(k(x), alone(k, x))
    with model.disable_adapter():
        assert torch.equal(q(x), q.base_layer(x))
    k(x)  # leaves q's output
    with separate_base(model):
        seen = []
        handle = q.base_layer.register_forward_hook(lambda *_: seen.append(True))
        q(x)
        handle.remove()
    assert seen


def test_one_mask_serves_the_group_and_recomputation_repeats_it():
    model = adapted(dropout=0.5).train()

    def gradients(wrap):
        for parameter in model.parameters():
            parameter.grad = None
        torch.manual_seed(3)
        wrap(model).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    def run(model):
        return model(input_ids=TOKENS, use_cache=False).logits

    plain = gradients(run)
    for reentrant in (False, True):

        def again(model, reentrant=reentrant):
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            return run(model)

        for actual, expected in zip(gradients(again), plain, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def _pair(**settings):
    """gate and up of the first block, adapted, with their parent, and an input."""
    model = adapted(target_modules=["gate_proj", "up_proj"], **settings).eval()
    mlp = model.get_base_model().model.layers[0].mlp
    return mlp, torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


def _while_it_runs(mlp, x, change):
    """What ``mlp``'s second member gives after ``change`` between the two, and what it should."""
    found = []

    def forward(x):
        mlp.gate_proj(x)
        change()
        found.append(mlp.up_proj(x))
        return x

    mlp.forward = forward
    mlp(x)
    with separate_base(mlp):
        return found[0], mlp.up_proj(x)


def test_what_changed_between_two_members_is_seen():
    mlp, x = _pair()
    leaf = mlp.up_proj.floe_expand["default"]
    changes = {
        "the input": lambda: x.mul_(2),
        "the adapter": lambda: leaf.weight.mul_(2),
        "the base": lambda: mlp.up_proj.base_layer.weight.mul_(2),
        "another tensor": lambda: setattr(leaf, "weight", torch.nn.Parameter(leaf.weight * 2)),
        "a hook": lambda: mlp.up_proj.base_layer.register_forward_hook(lambda m, a, y: 2 * y),
    }
    with torch.no_grad():
        for name, change in changes.items():
            found, expected = _while_it_runs(mlp, x, change)
            torch.testing.assert_close(found, expected, msg=name)


def test_an_input_changed_in_inference_mode_is_seen():
    mlp, _ = _pair()
    with torch.inference_mode():
        x = torch.randn(3, 32)
        torch.testing.assert_close(*_while_it_runs(mlp, x, lambda: x.mul_(2)))


def test_nothing_is_kept_outside_the_parent_s_call():
    """Writes through .data are not counted by torch."""
    mlp, x = _pair()
    with torch.no_grad():
        mlp.gate_proj(x)
        mlp.up_proj.floe_expand["default"].weight.data.mul_(2)
        found = mlp.up_proj(x)
        mlp(x)
        with separate_base(mlp):
            torch.testing.assert_close(found, mlp.up_proj(x))
    assert mlp.up_proj.shared._ready is None


def test_a_parent_that_fails_keeps_nothing():
    mlp, x = _pair()
    mlp.forward = lambda x: mlp.gate_proj(x) + "no number"
    with torch.no_grad(), contextlib.suppress(TypeError):
        mlp(x)
    assert not mlp.up_proj.shared._parent_runs


def test_a_copy_of_a_model_shares_its_own_inputs():
    model = adapted().eval()
    copied = copy.deepcopy(model)
    expected = model(input_ids=TOKENS).logits
    with torch.no_grad():
        for module in adapted_modules(model).values():
            module.floe_expand["default"].weight.zero_()
        torch.testing.assert_close(copied(input_ids=TOKENS).logits, expected)
    assert calls(copied, lambda model: model(input_ids=TOKENS)).count(3) == 2


def graph_of(model, dynamic):
    """Loss and gradients of the compiled model, and how often an op stands in its graphs."""
    counts = Counter()

    def counted(graph, inputs):
        counts.update(str(node.target).split(".")[1] for node in graph.graph.nodes if is_op(node))
        return make_boxed_func(graph.forward)

    def is_op(node):
        return str(node.target).startswith("floe.")

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=counted, bw_compiler=counted)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    return outputs(compiled), counts


compiles = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # dynamo's own
    "ignore:.*torch.jit.script:DeprecationWarning",
)


@compiles
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_models_keep_their_groups(dynamic):
    expected, (actual, counts) = outputs(adapted()), graph_of(adapted(), dynamic)
    layers = len(adapted_modules(adapted())) // len(ALL)
    assert counts["moe_lora_forward"] == counts["moe_lora_backward"] == 4 * layers
    for name, value in expected.items():
        at = name if name in actual else f"_orig_mod.{name}"
        torch.testing.assert_close(actual[at], value)


class Changing(torch.nn.Module):
    """A parent that writes into its projections' input between their calls."""

    def __init__(self, attention, changes):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.changes = changes
        link(self)

    def forward(self, x):
        x = x + 1
        q = self.q_proj(x)
        if self.changes:
            x.mul_(2)
        return q, self.k_proj(x), self.v_proj(x)


@compiles
def test_a_change_between_two_members_is_refused_when_compiled():
    model = adapted()
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(3, attention.q_proj.in_features)
    with torch.no_grad():
        same, changing = Changing(attention, False), Changing(attention, True)
        compiled = torch.compile(same, fullgraph=True, backend="aot_eager")(x)
        for got, expected in zip(compiled, same(x), strict=True):
            torch.testing.assert_close(got, expected)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="must not be changed in place between their calls"):
            torch.compile(changing, fullgraph=True, backend="aot_eager")(x)
        _, k, _ = changing(x)  # plain torch sees the change
        torch.testing.assert_close(k, alone(attention.k_proj, 2 * (x + 1)))
