"""The native dropout against a pure-Python Philox, known answers, statistics and torch's checks."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from floe_triton import reference

from floe import ops

CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
WORD = 0xFFFFFFFF

# Random123's kat_vectors: philox4x32, 10 rounds (counter, key, output)
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]

SHIM = """
#include "number.h"
#include "philox.h"
extern "C" void philox(const std::uint32_t* counter, const std::uint32_t* key, int rounds,
                       std::uint32_t* out) {
  const floe::philox::Words start{{counter[0], counter[1], counter[2], counter[3]}};
  const auto words = floe::philox::philox_4x32(start, {{key[0], key[1]}}, rounds);
  for (int i = 0; i < 4; ++i) out[i] = words.word[i];
}
extern "C" void draw(std::int64_t seed, std::int64_t row, std::int64_t block,
                     std::uint32_t* bytes) {
  using namespace floe::philox;
  const auto words = philox_4x32(counter_of(row, block), key_of(seed));
  for (int j = 0; j < 16; ++j) bytes[j] = byte_of(words, j);
}
extern "C" void narrow(const float* in, std::int64_t count, floe::BFloat16* brain,
                       floe::Float16* half) {
  for (std::int64_t i = 0; i < count; ++i) {
    brain[i] = floe::narrow<floe::BFloat16>(in[i]);
    half[i] = floe::narrow<floe::Float16>(in[i]);
  }
}
extern "C" std::uint32_t threshold(double p) { return floe::philox::threshold(p); }
"""


def philox(counter, key, rounds):
    c, k = list(counter), list(key)
    for _ in range(rounds):
        even, odd = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(odd >> 32) ^ c[1] ^ k[0], odd & WORD, (even >> 32) ^ c[3] ^ k[1], even & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def draw(seed, row, block):
    words = philox([block & WORD, row & WORD, row >> 32, 0], [seed & WORD, seed >> 32 & WORD], 7)
    return [words[j // 4] >> 8 * (j % 4) & 0xFF for j in range(16)]


def keep_mask(rows, columns, p, seed):
    blocks = -(-columns // 16)
    bytes_ = [
        [byte for b in range(blocks) for byte in draw(seed, t, b)][:columns] for t in range(rows)
    ]
    return torch.tensor(bytes_) >= min(255, round(256 * p))


def seed_of(value):
    return torch.tensor(value, dtype=torch.int64)


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no g++ or c++ to compile csrc/philox.h with")
    folder = tmp_path_factory.mktemp("philox")
    (folder / "shim.cpp").write_text(SHIM)
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Wconversion",
        "-Werror",
    ]
    library = folder / "shim.so"
    subprocess.run([*command, "-I", CSRC, folder / "shim.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


def words(values):
    return (ctypes.c_uint32 * len(values))(*values)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_random123_known_answers(header, counter, key, answer):
    assert philox(counter, key, 10) == answer
    out = words([0] * 4)
    header.philox(words(counter), words(key), 10, out)
    assert list(out) == answer


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize(
    ("row", "block"), [(0, 0), (2**32 - 1, 3), (2**32 + 5, 2**31 + 1), (2**62, 7)]
)
def test_header_draws_the_bytes_of_the_definition(header, seed, row, block):
    out = words([0] * 16)
    header.draw(ctypes.c_int64(seed), ctypes.c_int64(row), ctypes.c_int64(block), out)
    assert list(out) == draw(seed, row, block)


def test_threshold_rounds_like_python(header):
    header.threshold.argtypes = [ctypes.c_double]
    for p in [i / 1024 for i in range(1024)] + [0.05, 0.999, 1 - 2**-53]:
        assert header.threshold(p) == min(255, round(256 * p))


def test_narrowing_rounds_to_nearest_even(header):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    grids = [bits.view(dtype).double() for dtype in (torch.bfloat16, torch.float16)]
    ties = torch.cat([(g[1:] + g[:-1]).div(2).float() for g in grids])
    beside = [torch.nextafter(ties, torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    values = torch.cat([ties, *beside, *(g.float() for g in grids)])
    brain, half = (torch.empty_like(values, dtype=dtype) for dtype in (torch.bfloat16, torch.half))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, brain, half)]
    header.narrow(pointers[0], ctypes.c_int64(values.numel()), *pointers[1:])
    for out in (brain, half):
        expected = values.to(out.dtype)
        assert torch.equal(out.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(out[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 255), (2, 256), (5, 523)], ids=str)
@pytest.mark.parametrize("seed", [0, 41, -7, 2**40 + 3])
def test_mask_is_the_pure_function(shape, p, seed):
    kept = ops.keyed_dropout(torch.ones(shape), p, seed_of(seed)) != 0
    assert torch.equal(kept, keep_mask(*shape, p, seed))
    assert torch.equal(kept, reference.dropout_keep(*shape, p, seed_of(seed)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.3])
def test_values_are_scaled_wide_and_rounded_once(dtype, p):
    if dtype.itemsize == 2:  # every value there is
        x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(64, 1024)
    else:
        x = torch.randn(64, 1024, dtype=dtype) * torch.logspace(-30, 30, 1024, dtype=dtype)
    threshold = min(255, round(256 * p))
    wide = torch.promote_types(dtype, torch.float32)
    scale = torch.tensor(256 / (256 - threshold), dtype=wide)
    keep = reference.dropout_keep(64, 1024, p, seed_of(3))
    expected = torch.where(keep, x.to(wide) * scale, torch.zeros((), dtype=wide)).to(dtype)
    out = ops.keyed_dropout(x, p, seed_of(3))
    assert out.dtype == dtype
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[~out.isnan()], expected[~expected.isnan()])
    assert torch.equal(out, reference.dropout(x, p, seed_of(3))) or x.isnan().any()


def test_dropped_values_are_zero_even_where_x_is_not_finite():
    x = torch.full((4, 64), float("nan"))
    out = ops.keyed_dropout(x, 0.5, seed_of(1))
    keep = keep_mask(4, 64, 0.5, 1)
    assert out[keep].isnan().all()
    assert (out[~keep] == 0).all()


def test_rows_count_over_all_leading_dimensions_and_strides_do_not_matter():
    x = torch.randn(6, 40)
    flat = ops.keyed_dropout(x, 0.4, seed_of(5))
    assert torch.equal(ops.keyed_dropout(x.view(2, 3, 40), 0.4, seed_of(5)).view(6, 40), flat)
    assert torch.equal(ops.keyed_dropout(x[:1].view(40), 0.4, seed_of(5)), flat[0])
    assert torch.equal(ops.keyed_dropout(x.T.contiguous().T, 0.4, seed_of(5)), flat)
    assert ops.keyed_dropout(x[:0], 0.4, seed_of(5)).shape == (0, 40)
    assert ops.keyed_dropout(x[:, :0], 0.4, seed_of(5)).shape == (6, 0)


def test_bits_do_not_depend_on_the_number_of_threads():
    x = torch.randn(700, 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.keyed_dropout(x, 0.1, seed_of(9))
        torch.set_num_threads(3)
        assert torch.equal(ops.keyed_dropout(x, 0.1, seed_of(9)), one)
    finally:
        torch.set_num_threads(threads)


def correlation(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def test_mask_behaves_like_independent_coin_flips():
    rows, columns, p = 1024, 1024, 26 / 256
    masks = [
        (ops.keyed_dropout(torch.ones(rows, columns), p, seed_of(seed)) != 0)
        for seed in (0, 1, 2**32)
    ]
    deviation = 1 / (rows * columns) ** 0.5
    for mask in masks:
        rate = 1 - mask.double().mean().item()
        assert abs(rate - p) < 5 * deviation * (p * (1 - p)) ** 0.5
        # 5 sigma of a variance over 1024 rows is 5 sqrt(2 / 1024)
        row_variance = mask.double().mean(1).var().item()
        assert row_variance == pytest.approx(p * (1 - p) / columns, rel=0.25)
        assert abs(correlation(mask[:, :-1], mask[:, 1:])) < 5 * deviation
        assert abs(correlation(mask[:-1], mask[1:])) < 5 * deviation
        assert abs(correlation(mask[:, :-16], mask[:, 16:])) < 5 * deviation
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(correlation(masks[i], masks[j])) < 5 * deviation


def test_gradient_meets_the_same_mask():
    x = torch.randn(7, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.keyed_dropout(t, 0.3, seed_of(11)), (x,))
    assert torch.autograd.gradgradcheck(lambda t: ops.keyed_dropout(t, 0.3, seed_of(11)), (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    for x in (torch.randn(3, 20).to(dtype), torch.randn(2, 3, 5).to(dtype)):
        torch.library.opcheck(torch.ops.floe.keyed_dropout.default, (x, 0.3, seed_of(4)))
        leaf = x.clone().requires_grad_()
        torch.library.opcheck(torch.ops.floe.keyed_dropout.default, (leaf, 0.3, seed_of(4)))


def test_compiles_into_one_graph_with_its_gradient():
    compiled = torch.compile(
        lambda t, s: ops.keyed_dropout(t, 0.3, s) * 2, fullgraph=True, backend="aot_eager"
    )
    for seed in (1, 2):
        x = torch.randn(4, 50, requires_grad=True)
        out = compiled(x, seed_of(seed))
        assert torch.equal(out, ops.keyed_dropout(x, 0.3, seed_of(seed)) * 2)
        out.sum().backward()
        assert torch.equal(x.grad, ops.keyed_dropout(torch.full_like(x, 2.0), 0.3, seed_of(seed)))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1.0], 0.1, seed_of(0)), TypeError, "x must be a tensor, got list"),
        (
            (torch.ones(3).int(), 0.1, seed_of(0)),
            TypeError,
            "x must be bfloat16, .* got torch.int32",
        ),
        ((torch.ones(()), 0.1, seed_of(0)), ValueError, r"x must be \[..., K\], got a 0-dim"),
        ((torch.ones(3), "0.1", seed_of(0)), TypeError, "p must be a number, got str"),
        ((torch.ones(3), 1.0, seed_of(0)), ValueError, r"p must be in \[0, 1\), got 1.0"),
        ((torch.ones(3), -0.1, seed_of(0)), ValueError, r"p must be in \[0, 1\), got -0.1"),
        ((torch.ones(3), float("nan"), seed_of(0)), ValueError, r"p must be in \[0, 1\), got nan"),
        ((torch.ones(3), 0.1, 0), TypeError, "seed must be a tensor, got int"),
        ((torch.ones(3), 0.1, torch.zeros(())), TypeError, "seed must be int64, got torch.float32"),
        (
            (torch.ones(3), 0.1, seed_of([1])),
            ValueError,
            r"seed must be 0-dimensional, got shape \(1,\)",
        ),
        (
            (torch.ones(3), 0.1, seed_of(1).to("meta")),
            ValueError,
            "seed must be on x's device cpu, got meta",
        ),
    ],
)
def test_bad_arguments_are_explained(arguments, error, text):
    with pytest.raises(error, match=text):
        ops.keyed_dropout(*arguments)


def test_direct_calls_are_guarded():
    x = torch.ones(3)
    for arguments in [
        (x.int(), 0.1, seed_of(0)),
        (x, 1.0, seed_of(0)),
        (x, 0.1, seed_of([1])),
        (x, 0.1, x[0]),
    ]:
        with pytest.raises(RuntimeError, match="floe: "):
            torch.ops.floe.keyed_dropout(*arguments)
