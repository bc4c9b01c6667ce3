"""What only a GPU can show: bfloat16, real races, graphs, long tensors, several devices."""

import pytest
import torch
from floe_triton import draw_seed, keyed_dropout, moe_lora, moe_lora_group, reference
from helpers.budget import assert_within_budget

from floe.selfcheck import selftest

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda")
BACKENDS = pytest.mark.parametrize("backend", ["gemm", "fused", "auto"])


def draw(*shape, scale=1.0, dtype=torch.bfloat16, device=DEVICE):
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def layer(tokens, columns, features, rank=8, experts=4, dtype=torch.bfloat16, device=DEVICE):
    """x, weight, shrink_weight, expand_weight and the gradient of y."""
    torch.manual_seed(tokens)
    fan = columns**-0.5
    return (
        draw(tokens, columns, dtype=dtype, device=device),
        draw(features, columns, scale=fan, dtype=dtype, device=device),
        draw(rank + experts, columns, scale=fan, dtype=torch.float32, device=device),
        draw(features, experts, rank, scale=rank**-0.5, dtype=torch.float32, device=device),
        draw(tokens, features, dtype=dtype, device=device),
    )


def run(op, inputs, dtype=None, **settings):
    """y and the gradients of x, shrink_weight and expand_weight."""
    x, weight, shrink, expand, grad = (t if dtype is None else t.to(dtype) for t in inputs)
    leaves = [t.detach().clone().requires_grad_() for t in (x, shrink, expand)]
    y = op(leaves[0], weight, None, *leaves[1:], scaling=2.0, **settings)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def test_the_self_test_passes_on_this_gpu():
    wrong = [str(result) for result in selftest(DEVICE) if not result.passed]
    assert wrong == []


@BACKENDS
@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize(
    ("tokens", "columns", "features"),
    [(1, 4096, 4096), (16, 4096, 11008), (1000, 4096, 1024), (4096, 2048, 5632), (777, 1111, 999)],
)
def test_real_sizes_in_bfloat16_are_within_twice_torch_s_error(
    tokens, columns, features, dropout_p, backend
):
    inputs = layer(tokens, columns, features)
    settings = {"dropout_p": dropout_p, "seed": draw_seed(DEVICE)}
    actual = run(moe_lora, inputs, backend=backend, **settings)
    torchs = run(reference.moe_lora, inputs, **settings)
    exact = run(reference.moe_lora, inputs, torch.float64, **settings)
    for name, *values in zip(("y", "x", "shrink", "expand"), actual, torchs, exact, strict=True):
        assert_within_budget(*values, name=name, rounded_to=torch.bfloat16)


@BACKENDS
def test_twenty_runs_give_the_same_bits(backend):
    inputs = layer(3000, 2048, 2048)
    settings = {"dropout_p": 0.1, "seed": draw_seed(DEVICE), "backend": backend}
    first = run(moe_lora, inputs, **settings)
    for _ in range(20):
        again = run(moe_lora, inputs, **settings)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_mask_is_that_of_the_cpu():
    x = torch.randn(129, 1000).bfloat16()
    seed = torch.tensor(2**61 + 5)
    dropped = keyed_dropout(x.to(DEVICE), 0.3, seed.to(DEVICE)).cpu()
    assert torch.equal(dropped, reference.dropout(x, 0.3, seed))


@pytest.mark.parametrize("tokens", [1, 7])
def test_decoding_is_captured_in_a_graph(tokens):
    x, weight, shrink, expand, _ = layer(tokens, 1024, 1024)
    common = ([weight, weight], [None, None], [shrink, shrink], [expand, expand])
    with torch.no_grad():
        for _ in range(3):
            expected = moe_lora_group(x, *common, scaling=2.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = moe_lora_group(x, *common, scaling=2.0)
        x.copy_(x.flip(1))
        graph.replay()
        again = moe_lora_group(x, *common, scaling=2.0)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert not torch.equal(found[0], expected[0])


def test_a_training_step_waits_for_nothing():
    inputs = layer(256, 512, 512)
    run(moe_lora, inputs, dropout_p=0.1, seed=draw_seed(DEVICE))  # compiled before
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(moe_lora, inputs, dropout_p=0.1, seed=draw_seed(DEVICE))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_elements():
    rows, columns = 2**31 // 1024 + 3, 1024
    if torch.cuda.get_device_properties(DEVICE).total_memory < 40 * 2**30:
        pytest.skip("needs a GPU with 40 GiB")
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    x[-2:] = 1.0
    _, weight, shrink, expand, _ = layer(2, columns, 1024)
    seed = draw_seed(DEVICE)
    with torch.no_grad():
        y = moe_lora(x, weight, None, shrink, expand, scaling=2.0, backend="gemm")
        tail = moe_lora(x[-64:], weight, None, shrink, expand, scaling=2.0, backend="gemm")
        torch.testing.assert_close(y[-64:], tail, rtol=1e-2, atol=1e-2)
        kept = keyed_dropout(x, 0.5, seed)[-2:]
    assert torch.equal(kept, reference.dropout(x[-2:], 0.5, seed, first_row=rows - 2))


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there = run(moe_lora, layer(100, 256, 256, device=torch.device("cuda:1")))
    assert {t.device.index for t in there} == {1}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_the_gradients_are_the_same(dynamic):
    inputs = layer(128, 256, 256)
    compiled = torch.compile(moe_lora, fullgraph=True, dynamic=dynamic)
    for a, e in zip(run(compiled, inputs), run(moe_lora, inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-2, atol=1e-2)
