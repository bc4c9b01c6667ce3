"""Dropout as a kernel: the bits of its plain-torch definition, whatever the sizes."""

import mmap

import pytest
import torch
import triton
import triton.language as tl
from floe_triton import launch, reference
from floe_triton.kernels.dropout import dropout, keep_mask
from helpers.guarded import guarded, place
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

PHASES = (Phase.explicit, Phase.generate)  # the interpreter is too slow to shrink a failure


def bits(tensor):
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(width)


def check(x, p, seed):
    with guarded():
        found = dropout(x, p, seed)
    assert found.is_contiguous()
    assert found.dtype == x.dtype
    assert torch.equal(bits(found), bits(reference.dropout(x, p, seed)))


@settings(max_examples=100, deadline=None, derandomize=True, phases=PHASES)
@given(
    tokens=st.integers(1, 70),
    columns=st.integers(1, 200),
    p=st.sampled_from([0.0, 0.001, 0.05, 0.5, 0.999]),
    seed=st.integers(-(2**63), 2**63 - 1),
    gap=st.sampled_from([0, 5]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_any_sizes(tokens, columns, p, seed, gap, dtype):
    generator = torch.Generator().manual_seed(tokens * 1009 + columns)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    check(place(x, gap), p, torch.tensor(seed))


@pytest.mark.parametrize("capability", [80, 90])
def test_with_the_tiles_of_a_gpu(capability):
    with launch.assume(capability):
        check(torch.randn(70, 300), 0.3, torch.tensor(-5))


def test_dropped_values_are_zero_even_if_not_finite():
    seed = torch.tensor(3)
    x = torch.full((40, 50), torch.nan)
    x[::2], x[1::4] = torch.inf, -0.0
    keep = reference.dropout_keep(40, 50, 0.5, seed)
    found = dropout(x, 0.5, seed)
    assert (bits(found)[~keep] == 0).all()
    assert torch.equal(bits(found)[keep], bits(x * 2)[keep])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy's, for 70000 in float16
def test_large_halves_overflow_as_torchs_do():
    check(torch.full((8, 40), 60000.0, dtype=torch.float16), 0.2, torch.tensor(8))


def test_columns_that_are_not_adjacent():
    x = torch.randn(30, 40)
    check(x.T, 0.4, torch.tensor(1))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_nothing_is_nothing(shape):
    assert dropout(torch.empty(shape), 0.5, torch.tensor(1)).shape == shape


def test_rows_far_apart():
    far = 2**31 + 64  # elements, so that int32 offsets would wrap
    memory = mmap.mmap(-1, 2 * (far + 100), flags=mmap.MAP_PRIVATE)  # untouched pages are none
    x = torch.frombuffer(memory, dtype=torch.float16).as_strided((2, 90), (far, 1))
    x.copy_(torch.randn(2, 90))
    found = dropout(x, 0.3, torch.tensor(6))
    assert torch.equal(found, reference.dropout(x.clone(), 0.3, torch.tensor(6)))


def test_a_rate_that_is_none():
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1"):
        dropout(torch.ones(2, 2), 1.0, torch.tensor(1))


@triton.jit
def keep_kernel(out, seed, first_row, threshold, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    offsets = tl.arange(0, BLOCK_T)
    rows = offsets.to(tl.int64) + tl.load(first_row)
    keep = keep_mask(tl.load(seed), rows, 0, threshold, BLOCK_T, BLOCK_K)
    places = offsets[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tl.store(out + places, keep.to(tl.int8))


@pytest.mark.parametrize("first_row", [0, 2**31 - 8, 2**32 - 8, 2**40 + 3])
def test_rows_beyond_32_bits(first_row):
    seed = torch.tensor(2**62 + 9)
    out = torch.empty(16, 64, dtype=torch.int8)
    keep_kernel[(1,)](out, seed, torch.tensor(first_row), 77, BLOCK_T=16, BLOCK_K=64)
    expected = reference.dropout_keep(16, 64, 77 / 256, seed, first_row)
    assert torch.equal(out.bool(), expected)
