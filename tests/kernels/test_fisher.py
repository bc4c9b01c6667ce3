"""Mask gradients and their squares against float64 torch, in every dtype, stride and device."""

import importlib.util
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from floe import ops

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# S, T, D, group_size: odd sizes, several splits, tails of the unrolled rows, one unit
SHAPES = [
    (1, 1, 1, 1),
    (3, 197, 136, 1),
    (2, 333, 512, 64),
    (1, 7, 24, 3),
    (16, 65, 40, 40),
    (17, 5, 1100, 550),
]


def site(samples, tokens, columns, dtype=torch.float32, device="cpu"):
    activation = torch.randn(samples, tokens, columns, device=device).to(dtype)
    return activation, torch.randn(samples, tokens, columns, device=device).to(dtype)


def formula(activation, gradient, group_size, token_mask=None, dtype=torch.float64):
    product = activation.to(dtype) * gradient.to(dtype)
    if token_mask is not None:
        product = product.where(
            token_mask[..., None], torch.zeros((), dtype=dtype, device=product.device)
        )
    return product.unflatten(2, (product.shape[2] // group_size, group_size)).sum((1, 3))


def longdouble(activation, gradient, group_size, token_mask=None):
    """The formula in 80-bit floats: float64 needs an oracle too."""
    product = (
        activation.double().cpu().numpy().astype(np.longdouble) * gradient.double().cpu().numpy()
    )
    if token_mask is not None:
        product *= token_mask.cpu().numpy()[..., None]
    samples, tokens, columns = product.shape
    return product.reshape(samples, tokens, columns // group_size, group_size).sum((1, 3))


def rms_error(tensor, exact):
    return float(np.sqrt(np.mean((tensor.double().cpu().numpy() - exact) ** 2)))


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_gradients_error_is_within_twice_torchs(shape, dtype, masked, device):
    samples, tokens, columns, group_size = shape
    activation, gradient = site(samples, tokens, columns, dtype, device)
    mask = torch.rand(samples, tokens, device=device) > 0.3 if masked else None
    out = ops.mask_gradients(activation, gradient, group_size, mask)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == accumulator
    assert out.shape == (samples, columns // group_size)
    exact = longdouble(activation, gradient, group_size, mask)
    own = rms_error(formula(activation, gradient, group_size, mask, accumulator), exact)
    assert rms_error(out, exact) <= 2 * own + torch.finfo(accumulator).eps * float(
        np.abs(exact).max()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulate_fisher_adds_scaled_squares(shape, dtype, device):
    samples, tokens, columns, group_size = shape
    activation, gradient = site(samples, tokens, columns, dtype, device)
    mask = torch.rand(samples, tokens, device=device) > 0.3
    scale = torch.rand(samples, device=device)
    start = torch.rand(columns // group_size, dtype=torch.float64, device=device)
    fisher = start.clone()
    assert ops.accumulate_fisher_(fisher, activation, gradient, group_size, mask, scale) is fisher
    exact = (
        (formula(activation, gradient, group_size, mask) * scale.double()[:, None]).square().sum(0)
    )
    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    assert rms(fisher - start - exact) <= tolerance * rms(exact) + 1e-15


def test_worked_example_of_two_heads_and_a_padded_token():
    activation = torch.tensor([[[1.0, 2, 0, 1], [3, 0, 1, 1]], [[1, 1, 2, 0], [9, 9, 9, 9]]])
    gradient = torch.tensor([[[0.5, -1, 1, 2], [1, 0, -1, 1]], [[2, -1, 0, 3], [7, 7, 7, 7]]])
    mask = torch.tensor([[True, True], [True, False]])
    assert ops.mask_gradients(activation, gradient, 2, mask).tolist() == [[1.5, 2.0], [1.0, 0.0]]
    fisher = torch.zeros(2, dtype=torch.float64)
    ops.accumulate_fisher_(fisher, activation, gradient, 2, mask)
    assert fisher.tolist() == [3.25, 4.0]
    ops.accumulate_fisher_(fisher, activation, gradient, 2)  # the padding, had it been forgotten
    assert fisher.tolist() == [3.25 + 16131.25, 4.0 + 15880.0]


def test_masked_tokens_are_skipped_even_where_they_are_not_finite(device):
    activation, gradient = site(2, 150, 64, device=device)
    mask = torch.rand(2, 150, device=device) > 0.5
    clean = ops.mask_gradients(activation, gradient, 16, mask)
    activation[~mask] = float("nan")
    gradient[~mask] = float("inf")
    assert torch.equal(ops.mask_gradients(activation, gradient, 16, mask), clean)
    assert ops.mask_gradients(activation, gradient, 16).isnan().any()


def test_mask_of_all_false_gives_zero(device):
    activation, gradient = site(2, 70, 8, device=device)
    mask = torch.zeros(2, 70, dtype=torch.bool, device=device)
    assert ops.mask_gradients(activation, gradient, 2, mask).tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("shape", [(0, 4, 8, 2), (2, 0, 8, 2), (2, 4, 0, 2)], ids=str)
def test_empty_dimensions(shape, device):
    samples, tokens, columns, group_size = shape
    activation, gradient = site(samples, tokens, columns, device=device)
    units = columns // group_size
    out = ops.mask_gradients(activation, gradient, group_size)
    assert torch.equal(out, torch.zeros(samples, units, device=device))
    fisher = torch.ones(units, dtype=torch.float64, device=device)
    ops.accumulate_fisher_(fisher, activation, gradient, group_size)
    assert torch.equal(fisher, torch.ones_like(fisher))


def test_any_stride_gives_the_contiguous_result(device):
    base = torch.randn(70, 3, 2 * 48, device=device)
    activation = base.transpose(0, 1)[:, :, ::2]
    gradient = torch.randn(48, device=device).expand(3, 70, 48)
    mask = (torch.rand(70, 3, device=device) > 0.3).T
    scale = torch.rand(6, device=device)[::2]
    expected = ops.mask_gradients(
        activation.contiguous(), gradient.contiguous(), 4, mask.contiguous()
    )
    assert torch.equal(ops.mask_gradients(activation, gradient, 4, mask), expected)
    fishers = [torch.zeros(12, dtype=torch.float64, device=device) for _ in range(2)]
    ops.accumulate_fisher_(fishers[0], activation, gradient, 4, mask, scale)
    ops.accumulate_fisher_(
        fishers[1], activation, gradient.contiguous(), 4, mask, scale.contiguous()
    )
    assert torch.equal(*fishers)


def test_unaligned_rows_give_the_same_bits(device):
    activation, gradient = site(2, 130, 64, torch.bfloat16, device)
    shifted = torch.empty(activation.numel() + 1, dtype=torch.bfloat16, device=device)[1:].view_as(
        activation
    )
    shifted.copy_(activation)
    expected = ops.mask_gradients(activation, gradient, 1)
    assert torch.equal(ops.mask_gradients(shifted, gradient, 1), expected)


@pytest.mark.parametrize("group_size", [1, 64])
def test_bits_do_not_depend_on_the_number_of_threads(group_size):
    activation, gradient = site(3, 777, 1024)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2) * 10:
            torch.set_num_threads(count)
            fisher = torch.zeros(1024 // group_size, dtype=torch.float64)
            ops.accumulate_fisher_(fisher, activation, gradient, group_size)
            results.append((fisher, ops.mask_gradients(activation, gradient, group_size)))
    finally:
        torch.set_num_threads(threads)
    for fisher, gradients in results[1:]:
        assert torch.equal(fisher, results[0][0])
        assert torch.equal(gradients, results[0][1])


def test_more_elements_than_32_bits_count():
    """Only the last token is not zero; pages that were never written take no memory."""
    columns = 2048
    activation = torch.zeros(1, 2**31 // columns + 2, columns, dtype=torch.bfloat16)
    assert activation.numel() > 2**31
    activation[0, -1] = 3.0
    assert ops.mask_gradients(activation, activation, 1).eq(9.0).all()


def test_splits_are_added_in_float64():
    # Beside a 1, float32 loses every 2^-24; only the 63 tokens of the 1's split may be lost.
    activation = torch.full((1, 64 * 64, 1), 2.0**-12)
    activation[0, 0] = 1.0
    fisher = torch.zeros(1, dtype=torch.float64)
    ops.accumulate_fisher_(fisher, activation, activation, 1)
    assert fisher.sqrt().item() == pytest.approx(1 + 4095 * 2.0**-24, abs=63 * 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_widens_exactly(dtype, device):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device)
    values = bits.view(dtype)
    out = ops.mask_gradients(values.view(1, 1, -1), torch.ones_like(values).view(1, 1, -1), 1)[0]
    expected = values.float() + 0.0  # a sum never ends at -0
    assert torch.equal(out.nan_to_num(7.0, 1e38, -1e38), expected.nan_to_num(7.0, 1e38, -1e38))


def bad_site_arguments():
    x = torch.zeros(2, 3, 8)
    mask = torch.ones(2, 3, dtype=torch.bool)
    yield (x.tolist(), x, 2, None), TypeError, "activation must be a tensor, got list"
    yield (x.long(), x, 2, None), TypeError, "activation must be bfloat16, .* got torch.int64"
    yield (x, None, 2, None), TypeError, "gradient must be a tensor, got NoneType"
    yield (
        (x, x.double(), 2, None),
        TypeError,
        "gradient must have activation's dtype torch.float32, got torch.float64",
    )
    yield (x[0], x[0], 2, None), ValueError, r"activation must be \[S, T, D\], got shape \(3, 8\)"
    yield (
        (x, x[:1], 2, None),
        ValueError,
        r"gradient must have activation's shape \(2, 3, 8\), got \(1, 3, 8\)",
    )
    yield (
        (x, x.to("meta"), 2, None),
        ValueError,
        "gradient must be on activation's device cpu, got meta",
    )
    yield (x, x, 2.0, None), TypeError, "group_size must be an int, got float"
    yield (x, x, True, None), TypeError, "group_size must be an int, got bool"
    yield (x, x, 0, None), ValueError, "group_size must be >= 1 and divide D = 8, got 0"
    yield (x, x, 3, None), ValueError, "group_size must be >= 1 and divide D = 8, got 3"
    yield (x, x, 2, [[True]]), TypeError, "token_mask must be a tensor, got list"
    yield (x, x, 2, mask.long()), TypeError, "token_mask must be bool, got torch.int64"
    yield (x, x, 2, mask.T), ValueError, r"token_mask must be \[S, T\] = \(2, 3\), got \(3, 2\)"
    yield (
        (x, x, 2, mask.to("meta")),
        ValueError,
        "token_mask must be on activation's device cpu, got meta",
    )


@pytest.mark.parametrize(("arguments", "error", "text"), list(bad_site_arguments()))
def test_bad_sites_are_explained(arguments, error, text):
    with pytest.raises(error, match=text):
        ops.mask_gradients(*arguments)
    fisher = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(error, match=text):
        ops.accumulate_fisher_(fisher, *arguments)
    assert not fisher.any()


def bad_accumulations():
    fisher = torch.zeros(4, dtype=torch.float64)
    scale = torch.ones(2)
    yield (None, None), TypeError, "fisher must be a tensor, got NoneType"
    yield (fisher.float(), None), TypeError, "fisher must be float64, got torch.float32"
    yield (fisher[:3], None), ValueError, r"fisher must be \[D // group_size\] = \(4,\), got \(3,\)"
    yield (
        (torch.zeros(8).double()[::2], None),
        ValueError,
        r"fisher must be contiguous, got stride \(2,\)",
    )
    yield (fisher.clone().requires_grad_(), None), ValueError, "fisher must not require a gradient"
    yield (
        (fisher.to("meta"), None),
        ValueError,
        "fisher must be on activation's device cpu, got meta",
    )
    yield (fisher, 2.0), TypeError, "sample_scale must be a tensor, got float"
    yield (fisher, scale.long()), TypeError, "sample_scale must be bfloat16, .* got torch.int64"
    yield (fisher, scale[:1]), ValueError, r"sample_scale must be \[S\] = \(2,\), got \(1,\)"
    yield (
        (fisher, scale.to("meta")),
        ValueError,
        "sample_scale must be on activation's device cpu, got meta",
    )


@pytest.mark.parametrize(("arguments", "error", "text"), list(bad_accumulations()))
def test_bad_accumulations_are_explained(arguments, error, text):
    fisher, scale = arguments
    x = torch.zeros(2, 3, 8)
    with pytest.raises(error, match=text):
        ops.accumulate_fisher_(fisher, x, x, 2, None, scale)


def test_direct_calls_with_wrong_shapes_never_reach_memory():
    x, mask = torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    op, accumulate = torch.ops.floe.mask_gradients, torch.ops.floe.accumulate_fisher_
    fisher, scale = torch.zeros(4, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for arguments in [
        (x[0], x[0], 2, None),
        (x, x[:1], 2, None),
        (x, x.double(), 2, None),
        (x.int(), x.int(), 2, None),
        (x, x, 3, None),
        (x, x, -8, None),
        (x, x, 2, mask.T),
        (x, x, 2, mask.int()),
    ]:
        with pytest.raises(RuntimeError, match="floe: "):
            op(*arguments)
    for fisher_, scale_ in [
        (fisher[:3], scale),
        (fisher.float(), scale),
        (torch.zeros(8).double()[::2], scale),
        (fisher, scale[:1]),
        (fisher, scale.float()),
    ]:
        with pytest.raises(RuntimeError, match="floe: "):
            accumulate(fisher_, x, x, 2, None, scale_)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, device):
    activation, gradient = site(2, 5, 12, dtype, device)
    mask = torch.rand(2, 5, device=device) > 0.5
    scale = torch.rand(2, dtype=torch.float64, device=device)
    for group_size, token_mask in itertools.product((1, 4), (None, mask)):
        arguments = (activation, gradient, group_size, token_mask)
        torch.library.opcheck(torch.ops.floe.mask_gradients.default, arguments)
        for sample_scale in (None, scale):
            fisher = torch.zeros(12 // group_size, dtype=torch.float64, device=device)
            torch.library.opcheck(
                torch.ops.floe.accumulate_fisher_.default, (fisher, *arguments, sample_scale)
            )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(dynamic, device):
    def step(fisher, activation, gradient, mask, scale):
        ops.accumulate_fisher_(fisher, activation, gradient, 4, mask, scale)
        return ops.mask_gradients(activation, gradient, 4, mask) * 2.0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (5, 9):
        activation, gradient = site(2, tokens, 8, device=device)
        mask, scale = torch.rand(2, tokens, device=device) > 0.5, torch.rand(2, device=device)
        eager, graph = (torch.zeros(2, dtype=torch.float64, device=device) for _ in range(2))
        expected = step(eager, activation, gradient, mask, scale)
        assert torch.equal(compiled(graph, activation, gradient, mask, scale), expected)
        assert torch.equal(graph, eager)


def test_fake_tensors_are_checked_like_real_ones():
    x = torch.zeros(2, 3, 8, device="meta")
    assert ops.mask_gradients(x, x, 2).shape == (2, 4)
    with pytest.raises(ValueError, match="divide D = 8, got 3"):
        torch.ops.floe.mask_gradients(x, x, 3, None)
    with pytest.raises(TypeError, match="fisher must be float64"):
        torch.ops.floe.accumulate_fisher_(torch.zeros(4, device="meta"), x, x, 2, None, None)


def test_inputs_may_require_gradients_and_stay_untouched():
    activation, gradient = site(2, 5, 8)
    before = activation.clone()
    out = ops.mask_gradients(activation.requires_grad_(), gradient, 2)
    assert not out.requires_grad
    assert torch.equal(activation, before)


def test_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    spec = SimpleNamespace(origin=str(tmp_path / "_native.so"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ImportError, match=r"are not built: .*_ops\.so is missing; .*make native"):
        ops._load()
