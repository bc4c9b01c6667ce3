"""The native products of the MoE-LoRA linear: threads, older CPUs, torch's checks, mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_cases import draw

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
        x, rows, expand = draw(tokens, columns), draw(12, columns), draw(features, 4, 8)
        products = ops.shrink(x, rows, 8, 0.1, seed)
        hidden, gate, z = ops.route(products, None, 1, 8, 4, 1.0, 1.0, dtype)
        y = ops.expand(z[0], expand, None, None)
        grad_z, grad_expand = ops.moe_lora_grad_y(y, z[0], expand, True)
        grads = ops.route_backward([grad_z], hidden, gate, 1.0, 1.0)
        found = ops.moe_lora_grad_x(grads, x, rows, 8, 0.1, seed, True, True)
        for one in (products, hidden, gate, z, y, grad_z, grad_expand, grads, *found):
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
sys.path.insert(0, sys.argv[1])
import test_moe_lora_native as tests
for shape in tests.SHAPES:
    for adapter in (torch.bfloat16, torch.float32):
        for p in (0.0, 0.3):
            tests.test_shrink(shape, torch.bfloat16, adapter, p)
            tests.test_grad_x(shape, torch.bfloat16, adapter, p, True, True)
        tests.test_expand(shape, torch.bfloat16, adapter, "both")
        tests.test_grad_y(shape, torch.bfloat16, adapter, True)
tests.test_the_dropout_is_that_of_the_definition(torch.bfloat16)
tests.test_dropped_values_may_be_infinite(torch.bfloat16)
"""


def test_bfloat16_without_bfloat16_products():
    output_of(OLDER, str(Path(__file__).parent), ATEN_CPU_CAPABILITY="avx2")


def calls(dtype, adapter):
    """Every operator with arguments that it accepts."""
    x, rows, hidden, shape = draw(6, 40).to(dtype), draw(10, 40).to(adapter), 6, (2, 3, 2)
    grads = draw(6, 10).to(torch.promote_types(dtype, torch.float32))
    routed = OPS.route(OPS.shrink(x, rows, hidden, 0.0, None), None, *shape, 2.0, 1.0, dtype)
    expand, grad_y = draw(33, 2, 3).to(adapter), draw(6, 33).to(dtype)
    bias, base = draw(33).to(dtype), draw(6, 33).to(dtype)
    z = routed[2][0]
    wide_z = [one.to(grads.dtype) for one in routed[2]]
    return [
        (OPS.shrink, (x, rows, hidden, 0.0, None)),
        (OPS.shrink, (x, rows, hidden, 0.2, SEED)),
        (OPS.route, (grads, None, *shape, 2.0, 1.0, dtype)),
        (OPS.route, (grads, draw(2, 2).to(grads.dtype), *shape, 2.0, 0.5, dtype)),
        (OPS.expand, (z, expand, bias, None)),
        (OPS.expand, (z, expand, None, base)),
        (OPS.moe_lora_grad_y, (grad_y, z, expand, True)),
        (OPS.moe_lora_grad_y, (grad_y, z, expand, False)),
        (OPS.route_backward, (wide_z, *routed[:2], 2.0, 1.0)),
        (OPS.moe_lora_grad_x, (grads, x, rows, hidden, 0.2, SEED, True, True)),
        (OPS.moe_lora_grad_x, (grads, x, rows, hidden, 0.0, None, True, False)),
        (OPS.moe_lora_grad_x, (grads, x, rows, hidden, 0.0, None, False, True)),
    ]


@pytest.mark.parametrize(
    ("dtype", "adapter"), [*zip(FLOATS, FLOATS, strict=True), (torch.bfloat16, torch.float32)]
)
def test_opcheck(dtype, adapter):
    for op, arguments in calls(dtype, adapter):
        torch.library.opcheck(op.default, arguments)


def mistakes():
    x, rows, z, expand = torch.ones(2, 6), torch.ones(5, 6), torch.ones(2, 6), torch.ones(4, 2, 3)
    products, hidden, gate = torch.ones(2, 5), torch.ones(1, 2, 3), torch.ones(1, 2, 2)
    one = 1.0
    yield from [
        (OPS.shrink, (x.int(), rows.int(), 3, 0.0, None)),
        (OPS.shrink, (x, rows[:, 1:], 3, 0.0, None)),
        (OPS.shrink, (x, rows.double(), 3, 0.0, None)),
        (OPS.shrink, (x[0], rows, 3, 0.0, None)),
        (OPS.shrink, (x, rows, 6, 0.0, None)),
        (OPS.shrink, (x, rows, -1, 0.0, None)),
        (OPS.shrink, (x, rows, 3, 1.0, SEED)),
        (OPS.shrink, (x, rows, 3, 0.5, None)),
        (OPS.shrink, (x, rows, 3, 0.5, SEED[None])),
        (OPS.route, (products, None, 1, 3, 3, one, one, torch.float32)),
        (OPS.route, (products, None, 0, 3, 2, one, one, torch.float32)),
        (OPS.route, (products, None, 1, 3, 2, one, 0.0, torch.float32)),
        (OPS.route, (products, None, 1, 3, 2, one, one, torch.float64)),
        (OPS.route, (products, None, 1, 3, 2, one, one, torch.int32)),
        (OPS.route, (products, torch.ones(2, 1), 1, 3, 2, one, one, torch.float32)),
        (OPS.expand, (z[:, 1:], expand, None, None)),
        (OPS.expand, (z, expand[0], None, None)),
        (OPS.expand, (z, expand, torch.ones(3), None)),
        (OPS.expand, (z, expand, None, torch.ones(2, 3))),
        (OPS.expand, (z, expand, None, torch.ones(2, 4, dtype=torch.float64))),
        (OPS.moe_lora_grad_y, (torch.ones(2, 3), z, expand, True)),
        (OPS.moe_lora_grad_y, (torch.ones(3, 4), z, expand, True)),
        (OPS.moe_lora_grad_y, (torch.ones(2, 4), z.double(), expand, True)),
        (OPS.route_backward, ([], hidden, gate, one, one)),
        (OPS.route_backward, ([z[:, 1:]], hidden, gate, one, one)),
        (OPS.route_backward, ([z.double()], hidden, gate, one, one)),
        (OPS.route_backward, ([z], hidden, gate[:, 1:], one, one)),
        (OPS.route_backward, ([z], hidden, gate, one, -1.0)),
        (OPS.moe_lora_grad_x, (products[1:], x, rows, 3, 0.0, None, True, True)),
        (OPS.moe_lora_grad_x, (products.double(), x, rows, 3, 0.0, None, True, True)),
        (OPS.moe_lora_grad_x, (products, x, rows, 3, 0.5, None, True, True)),
    ]


@pytest.mark.parametrize(("op", "arguments"), list(mistakes()))
def test_direct_calls_are_guarded(op, arguments):
    with pytest.raises(RuntimeError, match="floe: "):
        op(*arguments)
