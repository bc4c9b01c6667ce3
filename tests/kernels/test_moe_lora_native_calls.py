"""The native products of the MoE-LoRA linear: threads, older CPUs, torch's checks, mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from floe_triton import moe_lora
from helpers.lora_cases import draw

import floe.ops  # noqa: F401 - loads the operators

OPS = torch.ops.floe
SEED = torch.tensor(2**61 + 12345)
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DIGEST = """
import hashlib, sys, torch
import floe.ops
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
ops, seed = torch.ops.floe, torch.tensor(99)
digest = hashlib.sha256()
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for tokens, columns, features in ((300, 500, 700), (2500, 96, 65)):
        def draw(*shape):
            return (torch.randn(*shape) / 8).to(dtype)
        x = draw(tokens, columns)
        shrink = [draw(12, columns), draw(12, columns)]
        expand = [draw(features, 4, 8), draw(5, 4, 8)]
        ys, *saved = ops.moe_lora_experts(x, shrink, expand, [], [], [], 1.0, 1.0, 0.1, seed, [], 0)
        grad_x, grad_shrink, grad_expand, grads, _ = ops.moe_lora_experts_backward(
            ys, x, shrink, expand, *saved, 1.0, 1.0, 0.1, seed, True, True, True, False
        )
        for one in (*ys, *saved, grad_x, *grad_shrink, *grad_expand, grads):
            assert one.isfinite().all()
            digest.update(one.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def output_of(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    ).stdout


def test_every_thread_count_gives_the_same_bits():
    digests = {output_of(DIGEST, threads, OMP_NUM_THREADS="3") for threads in ("1", "2", "3", "2")}
    assert len(digests) == 1


# a CPU with bfloat16 products computes bfloat16 by them; all others as here
OLDER = """
import sys, torch
sys.path[:0] = sys.argv[1:]
import test_moe_lora_native as tests
for shape in tests.SHAPES:
    for adapter in (torch.bfloat16, torch.float32):
        for p in (0.0, 0.3):
            tests.test_hidden_gate_and_z(shape, torch.bfloat16, adapter, p, True)
            tests.test_backward(shape, torch.bfloat16, adapter, p, True, True, True)
        tests.test_output(shape, torch.bfloat16, adapter, "both")
tests.test_the_dropout_is_that_of_the_definition(torch.bfloat16)
tests.test_dropped_values_may_be_infinite(torch.bfloat16)
"""


def test_bfloat16_without_bfloat16_products():
    here = Path(__file__).parent
    output_of(OLDER, str(here), str(here.parent), ATEN_CPU_CAPABILITY="avx2")


def calls(dtype, adapter):
    """Both operators with arguments that they accept."""
    x, shrink = draw(6, 40).to(dtype), [draw(5, 40).to(adapter) for _ in range(2)]
    expand = [draw(count, 2, 3).to(adapter) for count in (33, 8)]
    routers, biases = [draw(2).to(adapter)] * 2, [draw(33).to(dtype), None]
    bases = [draw(6, count).to(dtype) for count in (33, 8)]
    adapters, numbers = (x, shrink, expand), (2.0, 0.5, 0.0, None)
    routed = [], 0
    ys, *saved = OPS.moe_lora_experts(*adapters, [], [], [], *numbers, *routed)
    dropped = (2.0, 1.0, 0.2, SEED)
    separate = (x, [draw(6, 40).to(adapter) for _ in range(2)], expand)  # an A each, gates given
    gates = [draw(6, 2).to(adapter) for _ in range(2)]
    plain = (2.0, 1.0, 0.0, None)
    gated_ys, *gated = OPS.moe_lora_experts(*separate, [], [], [], *plain, gates, 0)
    return [
        (OPS.moe_lora_experts, (*adapters, [], [], [], *numbers, *routed)),
        (OPS.moe_lora_experts, (*adapters, [None, None], [None, None], [], *dropped, *routed)),
        (OPS.moe_lora_experts, (*adapters, routers, biases, [], *numbers, [], 1)),
        (OPS.moe_lora_experts, (*adapters, routers, [], bases, *dropped, *routed)),
        (OPS.moe_lora_experts, (*separate, [], [], [], *plain, gates, 0)),
        (OPS.moe_lora_experts_backward, (gated_ys, *separate, *gated, *plain, *[True] * 4)),
        *(
            (OPS.moe_lora_experts_backward, (ys, *adapters, *saved, *numbers, *needs, False))
            for numbers, needs in [
                (numbers, (True, True, True)),
                (dropped, (True, True, True)),
                (dropped, (True, False, False)),
                (numbers, (False, True, False)),
                (numbers, (False, False, True)),
            ]
        ),
    ]


@pytest.mark.parametrize(
    ("dtype", "adapter"), [*zip(FLOATS, FLOATS, strict=True), (torch.bfloat16, torch.float32)]
)
def test_opcheck(dtype, adapter):
    for op, arguments in calls(dtype, adapter):
        torch.library.opcheck(op.default, arguments)


def forward(**changes):
    x, shrink, expand = torch.ones(2, 6), [torch.ones(5, 6)], [torch.ones(4, 2, 3)]
    given = {
        "x": x,
        "shrink_weights": shrink,
        "expand_weights": expand,
        "router_biases": [],
        "biases": [],
        "base_outputs": [],
        "scaling": 1.0,
        "temperature": 1.0,
        "dropout_p": 0.0,
        "seed": None,
        "gates": [],
        "top_k": 0,
    }
    return OPS.moe_lora_experts, {**given, **changes}


def backward(**changes):
    _, given = forward()
    for name in ("router_biases", "biases", "base_outputs", "gates", "top_k"):
        del given[name]
    saved = {"hidden": (1, 2, 3), "gate": (1, 2, 2), "z": (1, 2, 6)}
    given |= {name: torch.ones(shape) for name, shape in saved.items()}
    given |= {"grad_ys": [torch.ones(2, 4)]}
    given |= dict.fromkeys(("needs_x", "needs_shrink", "needs_expand"), True)
    given["gated"] = False
    return OPS.moe_lora_experts_backward, {**given, **changes}


@pytest.mark.parametrize("call", [forward, backward])
def test_right_calls_are_taken(call):
    op, arguments = call()
    op(**arguments)


ONES = torch.ones
MISTAKES = [
    *(
        (call, changes)
        for call in (forward, backward)
        for changes in (
            {"x": ONES(2, 6).int()},
            {"x": ONES(6)},
            {"x": ONES(2, 7)},
            {"shrink_weights": []},
            {"shrink_weights": [ONES(4, 6)]},
            {"shrink_weights": [ONES(5, 6).half()]},
            {"shrink_weights": [ONES(5, 6).double()]},
            {"expand_weights": [], "shrink_weights": []},
            {"expand_weights": [ONES(2, 3)]},
            {"expand_weights": [ONES(4, 2, 0)]},
            {"expand_weights": [ONES(4, 3, 3)]},
            {"expand_weights": [ONES(4, 2, 3)] * 2},
            {"temperature": 0.0},
            {"dropout_p": 1.0, "seed": SEED},
            {"dropout_p": 0.5},
            {"dropout_p": 0.5, "seed": SEED[None]},
        )
    ),
    (forward, {"x": ONES(2, 6).double()}),  # float64 takes no narrower parameter
    (forward, {"router_biases": [ONES(3)]}),
    (forward, {"router_biases": [ONES(2)] * 2}),
    (
        forward,
        {
            "shrink_weights": [ONES(5, 6)] * 2,
            "expand_weights": [ONES(4, 2, 3)] * 2,
            "router_biases": [None, ONES(2)],
        },
    ),
    (forward, {"biases": [ONES(3)]}),
    (forward, {"biases": [ONES(4).double()]}),
    (forward, {"biases": [None, None]}),
    (forward, {"base_outputs": [ONES(2, 3)]}),
    (forward, {"base_outputs": [ONES(2, 4).double()]}),
    (forward, {"base_outputs": [ONES(2, 4)] * 2}),
    (backward, {"grad_ys": []}),
    (backward, {"grad_ys": [ONES(2, 3)]}),
    (backward, {"grad_ys": [ONES(2, 4).double()]}),
    (backward, {"hidden": ONES(1, 2, 2)}),
    (backward, {"hidden": ONES(1, 2, 3).double()}),
    (backward, {"gate": ONES(2, 2, 2)}),
    (backward, {"gate": ONES(1, 2, 2).double()}),
    (backward, {"z": ONES(1, 2, 5)}),
    (backward, {"z": ONES(1, 2, 6).double()}),
]


@pytest.mark.parametrize(("call", "changes"), MISTAKES)
def test_direct_calls_are_guarded(call, changes):
    op, arguments = call(**changes)
    with pytest.raises(RuntimeError, match="floe: "):
        op(**arguments)


def test_a_float32_adapter_on_float64_is_computed_in_float64():
    """Its gradients are float32: no more is written than they hold."""
    x, weight, shrink, expand = draw(9, 20), draw(300, 20), draw(6, 20), draw(300, 2, 4)
    found = []
    for adapter in (torch.float32, torch.float64):
        leaves = [p.float().to(adapter).requires_grad_() for p in (shrink, expand)]
        y = moe_lora(x, weight, None, *leaves, scaling=1.0, backend="native")
        y.backward(torch.ones_like(y))
        assert all(leaf.grad.dtype == adapter for leaf in leaves)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert torch.equal(found[0][0], found[1][0])
    for narrow, wide in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(narrow, wide.float())
