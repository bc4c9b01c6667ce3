"""The CUDA sources without a GPU: nvcc compiles them without a spill, their grid runs here."""

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# S, T, D, group_size: odd rows and tails, more samples than a block has rows, heads and neurons
SHAPES = [
    (2, 197, 136, 1),
    (9, 333, 512, 64),
    (1, 7, 24, 3),
    (3, 1, 33, 1),
    (1, 5000, 8, 8),
    (17, 40, 96, 48),
]


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_fisher_kernels_compile_without_spills(architecture, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [
        nvcc,
        "-std=c++20",
        "-O3",
        "-gencode",
        target,
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
        "-cubin",
    ]
    source = CSRC / "fisher" / "fisher.cu"
    result = subprocess.run(
        [*command, "-I", CSRC, "-o", tmp_path / "fisher.cubin", source],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr
    )
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", result.stderr)]
    # 4 dtypes x aligned or not; 2 accumulators x head or neuron x gradients or squares
    assert len(spills) == len(registers) == 4 * 2 + 2 * 2 * 2
    assert set(spills) == {("0", "0", "0")}
    assert max(registers) <= 128  # two blocks of 256 threads share a multiprocessor


def compile_emulator(folder, flags):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no g++ or c++ to compile the emulation of the CUDA grid with")
    library = folder / "emulate.so"
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
    command = [compiler, "-std=c++20", "-shared", "-fPIC", *warnings, *flags, "-I", CSRC]
    subprocess.run([*command, CSRC / "fisher" / "fisher_emulate.cpp", "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.floe_splits_of.restype = ctypes.c_int64
    return loaded


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return compile_emulator(tmp_path_factory.mktemp("plain"), ["-O2", "-ffp-contract=off"])


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def emulate(library, activation, gradient, group_size, mask=None, scale=None, vector=True):
    samples, tokens, columns = activation.shape
    splits = library.floe_splits_of(ctypes.c_int64(tokens))
    wide = torch.promote_types(activation.dtype, torch.float32)
    partial = torch.full((samples, splits, columns), float("nan"), dtype=wide)
    gradients = torch.full((samples, columns // group_size), float("nan"), dtype=torch.float64)
    fisher = torch.zeros(columns // group_size, dtype=torch.float64)
    run = getattr(library, "floe_emulate_" + str(activation.dtype).removeprefix("torch."))
    sizes = [ctypes.c_int64(n) for n in (samples, tokens, columns, group_size)]
    run(
        address(activation),
        address(gradient),
        address(mask),
        *sizes,
        ctypes.c_bool(vector),
        address(scale),
        address(partial),
        address(gradients),
        address(fisher),
    )
    return partial, gradients, fisher


def site(samples, tokens, columns, dtype):
    return [torch.randn(samples, tokens, columns).to(dtype) for _ in range(2)]


def exact_gradients(activation, gradient, group_size, mask):
    product = torch.where(mask[..., None], activation.double() * gradient.double(), 0.0)
    return product.unflatten(2, (-1, group_size)).sum((1, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_grid_equals_float64(emulator, shape, dtype):
    samples, tokens, columns, group_size = shape
    activation, gradient = site(samples, tokens, columns, dtype)
    mask = torch.rand(samples, tokens) > 0.3
    scale = torch.rand(samples, dtype=torch.float64)
    expected = exact_gradients(activation, gradient, group_size, mask)
    activation[~mask], gradient[~mask] = float("nan"), float("inf")
    partial, gradients, fisher = emulate(emulator, activation, gradient, group_size, mask, scale)
    assert not partial.isnan().any()  # every sum was written, no masked token was read
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    size = expected.square().mean().sqrt()
    assert (gradients - expected).square().mean().sqrt() <= tolerance * size
    squares = (gradients * scale[:, None]).square().sum(0)
    torch.testing.assert_close(fisher, squares, rtol=1e-14, atol=0)


def test_partial_sums_hold_each_split_of_tokens(emulator):
    activation, gradient = site(2, 150, 40, torch.float64)
    partial, _, _ = emulate(emulator, activation, gradient, 1)
    products = (activation * gradient).split(50, dim=1)  # 150 tokens in 3 splits
    torch.testing.assert_close(
        partial, torch.stack([p.sum(1) for p in products], 1), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loads_of_one_or_sixteen_bytes_give_the_same_bits(emulator, dtype):
    activation, gradient = site(3, 197, 96, dtype)
    for one, many in zip(
        emulate(emulator, activation, gradient, 32, vector=False),
        emulate(emulator, activation, gradient, 32, vector=True),
        strict=True,
    ):
        assert torch.equal(one, many)


def test_contraction_by_the_compiler_changes_no_bit(emulator, tmp_path):
    # Products of 16-bit floats are exact in float32, and every multiply-add is an explicit fma:
    # nvcc, which contracts, and a compiler told not to must agree on every partial sum.
    contracting = compile_emulator(tmp_path, ["-O2", "-ffp-contract=fast", "-march=native"])
    scale = torch.rand(3, dtype=torch.float64)
    for dtype, group_size in itertools.product(DTYPES, (1, 64)):
        activation, gradient = site(3, 333, 192, dtype)
        for plain, contracted in zip(
            emulate(emulator, activation, gradient, group_size, scale=scale),
            emulate(contracting, activation, gradient, group_size, scale=scale),
            strict=True,
        ):
            assert torch.equal(plain, contracted)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_device_gives_the_bits_of_the_emulation(emulator, shape, dtype):
    from floe import ops

    samples, tokens, columns, group_size = shape
    activation, gradient = site(samples, tokens, columns, dtype)
    mask = torch.rand(samples, tokens) > 0.3
    scale = torch.rand(samples, dtype=torch.float64)
    _, gradients, squares = emulate(emulator, activation, gradient, group_size, mask, scale)
    on_device = [tensor.cuda() for tensor in (activation, gradient)]
    out = ops.mask_gradients(*on_device, group_size, mask.cuda())
    assert torch.equal(out.cpu(), gradients.to(out.dtype))
    fisher = torch.zeros(columns // group_size, dtype=torch.float64, device="cuda")
    ops.accumulate_fisher_(fisher, *on_device, group_size, mask.cuda(), scale.cuda())
    assert torch.equal(fisher.cpu(), squares)
