"""Reading machine code: resources, instructions and loops of kernels compiled for absent GPUs."""

import os
from functools import cache

import pytest
import torch
import triton
import triton.language as tl

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET leaves no compiler", allow_module_level=True)

from floe_triton import aot, launch


@triton.jit
def product(a, b, c, K, N, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """C = A B^T in blocks of [BT, BN], no edges."""
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    total = tl.zeros((BT, BN), tl.float32)
    for k in range(0, K, BK):
        left = tl.load(a + rows[:, None] * K + (k + inner)[None, :])
        right = tl.load(b + columns[None, :] * K + (k + inner)[:, None])
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * N + columns[None, :], total.to(c.dtype.element_ty))


@triton.jit
def double(a, c, N, STRIDE, BN: tl.constexpr):
    """C = 2 A, a block each: no loop."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(c + columns, 2 * tl.load(a + columns * STRIDE, mask=columns < N), mask=columns < N)


POINTERS = {"a": "*bf16", "b": "*bf16", "c": "*bf16"}
SIZES = {"K": "i32", "N": "i32"}
HINTED = (*POINTERS, *SIZES)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cubins")))
        yield


@cache
def report(capability, divisible=HINTED, num_warps=4, num_stages=3, block=64, depth=64):
    blocks = {"BT": block, "BN": block, "BK": depth}
    signature = {**POINTERS, **SIZES}
    return aot.compile_kernel(
        product, signature, blocks, capability, num_warps, num_stages, divisible
    ).report()


@pytest.mark.parametrize(
    ("capability", "tensor_core"),
    [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")],
)
def test_a_product_uses_the_tensor_cores_of_its_architecture(capability, tensor_core):
    found = report(capability)
    assert set(found.tensor_core) == {tensor_core}
    assert 16 <= found.registers <= 255
    assert found.spills == 0
    assert found.fits
    assert found.async_copies > 0
    assert found.wide_loads == found.async_copies


def test_the_main_loop_is_a_part_of_the_code_that_holds_the_product():
    found = report(80)
    # 64^3 multiply-adds by 4 warps in instructions of 16 x 8 x 16
    assert found.tensor_core["HMMA"] == 64**3 // 4 // (16 * 8 * 16)
    assert found.tensor_core["HMMA"] < found.main_loop < found.outside
    deeper = report(80, depth=128)
    assert 1.5 < deeper.main_loop / found.main_loop < 2.5


def test_loads_are_wide_only_under_hints():
    assert report(80, divisible=()).wide_loads == 0


def test_a_block_too_large_for_its_warps_spills():
    assert report(80, num_warps=1, block=128).spills > 0


@pytest.mark.parametrize(("capability", "fits"), [(90, True), (86, False)])
def test_a_pipeline_too_deep_for_shared_memory_is_seen(capability, fits):
    found = report(capability, num_stages=6, block=128, num_warps=8)
    assert found.shared_memory > 101376
    assert found.fits == fits


def _recorded(a, stride, capability=80):
    with launch.recording(capability) as launches:
        arguments = {"a": a, "c": torch.empty_like(a), "N": 4096, "STRIDE": stride}
        launch.launch(double, (4,), arguments, {}, launch.Blocks({"BN": 1024}))
    (only,) = launches
    return only


def test_a_recorded_launch_compiles_to_what_its_arguments_allow():
    x = torch.empty(8192, dtype=torch.float16, device="meta")
    aligned = aot.compile_launch(_recorded(x[:4096], 1)).report()
    shifted = aot.compile_launch(_recorded(x[1:4097], 1)).report()
    apart = aot.compile_launch(_recorded(x[:4096], 2)).report()
    assert aligned.wide_loads == 1  # a stride of 1 is known to the compiler
    assert shifted.wide_loads == apart.wide_loads == 0
    assert aligned.main_loop < apart.main_loop
    assert aligned.outside == 0  # no loop: all of it is the main loop


def test_a_recorded_launch_and_the_same_compiled_by_hand_are_one():
    x = torch.empty(4096, dtype=torch.float16, device="meta")
    by_hand = aot.compile_kernel(
        double,
        {"a": "*fp16", "c": "*fp16", "N": "i32"},
        {"STRIDE": 1, "BN": 1024},
        80,
        divisible=["a", "c", "N"],
    )
    assert aot.compile_launch(_recorded(x, 1)).report() == by_hand.report()


def test_a_launch_is_compiled_within_the_registers_that_it_names():
    x = torch.empty(8192, dtype=torch.float32, device="meta")
    wide = {"a": x, "c": torch.empty_like(x), "N": 8192, "STRIDE": 1}
    counts = []
    for most in (None, 24):
        with launch.recording(80) as launches:
            launch.launch(double, (1,), wide, {}, launch.Blocks({"BN": 8192}, registers=most))
        counts.append(aot.compile_launch(launches[0]).report().registers)
    assert counts[1] <= 24 < counts[0]


def _code(text):
    """One instruction a word, 16 bytes each; ``BRA:3`` goes to the third."""
    words = [word.split(":") for word in text.split()]
    return [
        aot.Instruction(16 * i, w[0], f"P0, {16 * int(w[1]):#x}" if len(w) > 1 else "")
        for i, w in enumerate(words)
    ]


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("MOV LDG HMMA BRA:1 EXIT BRA:5", 1, 3),  # the last is where finished warps are parked
        ("MOV LDG MOV HMMA BRA:2 BRA:1 EXIT", 2, 4),  # innermost
        ("HMMA BRA:0 HGMMA HGMMA BRA:2 EXIT", 2, 4),  # most work
        ("LDG LDG BRA:0 HMMA BRA:3 EXIT", 3, 4),  # products before loads
        ("SYNCS BRA:0 LDG BRA:2 EXIT", 2, 3),  # waiting is no work
        ("HMMA BRA:0 BRA:0 EXIT", 0, 2),  # two ways back to one place
        ("LDG MOV EXIT BRA:3", 0, 3),  # no loop
    ],
)
def test_the_main_loop_is_found(text, first, last):
    code = _code(text)
    assert aot.main_loop(code) == code[first : last + 1]


def test_what_cannot_be_compiled_is_refused():
    signature, constants = {"a": "*fp16", "c": "*fp16", "N": "i32"}, {"STRIDE": 1, "BN": 64}
    with pytest.raises(TypeError, match=r"kernel must be under triton\.jit.* got function"):
        aot.compile_kernel(product.fn, signature, constants, 80)
    with pytest.raises(ValueError, match=r"capability must be one of .* got 75"):
        aot.compile_kernel(double, signature, constants, 75)
    with pytest.raises(ValueError, match="signature and constants must share out"):
        aot.compile_kernel(double, signature, {"BN": 64}, 80)
    with pytest.raises(ValueError, match="divisible be of the signature"):
        aot.compile_kernel(double, signature, constants, 80, divisible=["BN"])


def test_a_triton_without_a_disassembler_says_so(monkeypatch):
    compiled = aot.compile_kernel(
        double, {"a": "*fp16", "c": "*fp16", "N": "i32"}, {"STRIDE": 1, "BN": 64}, 80
    )
    monkeypatch.setattr(triton.knobs, "nvidia", object())
    with pytest.raises(FileNotFoundError, match="cuobjdump must come with Triton"):
        compiled.report()
