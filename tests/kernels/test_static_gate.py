"""Every GPU kernel compiled for every architecture and read: ``make cuda-check``. No GPU needed."""

import importlib
import inspect
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
from floe_triton import aot
from helpers import static_gate

from benchmarks import issue

pytestmark = [pytest.mark.static, pytest.mark.timeout(1800)]

PACKAGE = Path(aot.__file__).parent
ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
PRODUCTS = {  # 16-bit tiles meet in the tensor cores
    "shrink_kernel",
    "decode_shrink_kernel",
    "decode_expand_kernel",
    "expand_kernel",
    "fused_linear_kernel",
    "fused_grad_x_kernel",
    "grad_x_kernel",
    "grad_y_kernel",
}
PIPELINED = {  # the next tiles are on their way while these are multiplied
    "shrink_kernel",
    "decode_shrink_kernel",
    "fused_linear_kernel",
    "fused_grad_x_kernel",
    "grad_x_kernel",
    "grad_y_kernel",
}
FUSED = {"fused_linear_kernel", "fused_grad_x_kernel"}
WARP_GROUP = {90: "HGMMA", 100: "UTCHMMA"}  # what a product must be to come near the peak
ISSUE = 0.7  # of the time that memory takes
# A B200's memory moves twice the bytes of an H100's in a clock. No kernel that draws a mask while
# it streams hides that there: those are held to their budgets only.
HIDDEN = [capability for capability in issue.PARTS if capability != 100]
# Rows of odd length are aligned to nothing: they are read element by element.
UNALIGNED = {"ragged"}
# With 64 rows and more to multiply x with, arithmetic is no longer small beside the reading of x.
ARITHMETIC = {"most rows", "an A each", "rank-wise"}


@pytest.fixture(scope="module")
def compiled():
    """(entry, report) of everything that compiles; the errors of what does not are a failure."""
    found = list(zip(static_gate.entries(), static_gate.reports(), strict=True))
    failed = [f"{_at(entry)}: {each}" for entry, each in found if isinstance(each, str)]
    assert not failed, "\n".join(failed)
    return found


def _at(entry):
    return f"{entry}, sm_{entry.capability}"


def _is_narrow(entry):
    return entry.dtype != torch.float32


def test_every_kernel_is_compiled(compiled):
    kernels = set()
    for path in (PACKAGE / "kernels").glob("*.py"):
        module = importlib.import_module(f"floe_triton.kernels.{path.stem}")
        found = inspect.getmembers(module, lambda each: isinstance(each, triton.JITFunction))
        kernels |= {name for name, _ in found if name.endswith("_kernel")}
    for capability in aot.SHARED_MEMORY:
        assert {e.kernel for e, _ in compiled if e.capability == capability} == kernels


def test_nothing_spills(compiled):
    spilling = [f"{_at(e)}: {r.spills} bytes" for e, r in compiled if r.spills]
    assert not spilling, "\n".join(spilling)


def test_shared_memory_is_within_the_architecture(compiled):
    wrong = [f"{_at(e)}: {r.shared_memory} bytes" for e, r in compiled if not r.fits]
    assert not wrong, "\n".join(wrong)


def test_products_use_the_tensor_cores(compiled):
    wrong = [
        _at(e)
        for e, r in compiled
        if _is_narrow(e) and bool(r.tensor_core) != (e.kernel in PRODUCTS)
    ]
    assert not wrong, "\n".join(wrong)


def test_fused_products_use_the_instructions_of_a_warp_group(compiled):
    wrong = [
        f"{_at(e)}: {r.tensor_core}"
        for e, r in compiled
        if e.kernel in FUSED and e.capability in WARP_GROUP and _is_narrow(e)
        if WARP_GROUP[e.capability] not in r.tensor_core
    ]
    assert not wrong, "\n".join(wrong)


def test_tiles_are_copied_ahead(compiled):
    """Of 16-bit tiles: float32 arithmetic leaves no registers for a pipeline, nor needs one."""
    wrong = [
        _at(e)
        for e, r in compiled
        if e.kernel in PIPELINED
        and _is_narrow(e)
        and e.case not in UNALIGNED
        and not r.async_copies
    ]
    assert not wrong, "\n".join(wrong)


def test_aligned_tiles_are_read_sixteen_bytes_at_a_time(compiled):
    wrong = [
        _at(e)
        for e, r in compiled
        if issue.streams(e.launch) and e.case not in UNALIGNED and not r.wide_loads
    ]
    assert not wrong, "\n".join(wrong)


def test_issue_hides_behind_memory(compiled):
    """Of 16-bit tiles: float32 products are counted in the arithmetic that they are."""
    wrong = []
    for entry, report in compiled:
        bound = entry.capability in HIDDEN and entry.case not in UNALIGNED | ARITHMETIC
        ratio = issue.issue_to_memory(entry.launch, report)
        if bound and ratio is not None and _is_narrow(entry) and ratio > ISSUE:
            wrong.append(f"{_at(entry)}: issue / memory {ratio:.3f}, at most {ISSUE}")
    assert not wrong, "\n".join(wrong)


def test_no_figure_exceeds_its_budget(compiled):
    budgets = static_gate.budgets(static_gate.read(), triton.__version__)
    wrong = static_gate.exceeded(budgets, static_gate.table([report for _, report in compiled]))
    assert not wrong, "\n".join([*wrong, "meant? `make cuda-check UPDATE=1` makes new budgets"])


def test_a_triton_without_budgets_does_not_pass():
    committed = static_gate.read()
    with pytest.raises(LookupError, match=r"Triton in use, 3\.5\.1, got some of 3\.6\.0, "):
        static_gate.budgets(committed, "3.5.1")


def test_the_table_has_every_triton_of_the_window():
    """That is the oldest the packages ask for, what ``make cuda-check-window`` adds, and this."""
    older = re.search(r"^OLDER := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    oldest = re.search(r'"triton>=([0-9.]+)', (ROOT / "pyproject.toml").read_text())[1]
    assert older[0].startswith(f"{oldest}.")
    assert {*older, triton.__version__} <= set(static_gate.read())


def test_the_table_is_written_as_it_is_committed():
    assert static_gate.text(static_gate.read()) == static_gate.TABLE.read_text()


def test_a_regression_is_named_with_both_figures():
    budgets = {"a_kernel, usual, bfloat16": {"80": [96, 4096, 300], "90": [90, 4096, 280]}}
    found = {"a_kernel, usual, bfloat16": {"80": [97, 4096, 300], "90": [80, 4000, 100]}}
    assert static_gate.exceeded(budgets, found) == [
        "a_kernel, usual, bfloat16, sm_80: registers 97, budget 96"
    ]
    assert static_gate.exceeded(budgets, budgets) == []
    assert static_gate.exceeded(budgets, {}) == [
        f"a_kernel, usual, bfloat16, sm_{capability}: in the table only" for capability in (80, 90)
    ]


@pytest.fixture(scope="module", params=[80, 90, 100], ids="sm_{}".format)
def fisher(request, tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    cubin = tmp_path_factory.mktemp("fisher") / "fisher.cubin"
    target = f"arch=compute_{request.param},code=sm_{request.param}"
    command = [nvcc, "-std=c++20", "-O3", "-gencode", target, "-cubin", "-I", CSRC, "-o", cubin]
    subprocess.run([*command, CSRC / "fisher" / "fisher.cu"], check=True)
    return request.param, aot.read_cubin(cubin)


def assert_recorded(architecture, registers):
    """No kernel takes more registers than tests/fisher_registers.json says for this nvcc."""
    table = json.loads((Path(__file__).parent / "fisher_registers.json").read_text())
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    if f"release {table['nvcc']}," not in version.stdout:
        return  # another compiler allocates otherwise: the bounds below hold for it, too
    recorded = table[f"sm_{architecture}"]
    assert recorded.keys() == registers.keys()
    more = {k: (n, recorded[k]) for k, n in registers.items() if n > recorded[k]}
    assert not more, f"registers now and recorded: {more}"


def test_the_fisher_sums_stay_in_registers_and_read_wide(fisher):
    architecture, functions = fisher
    partial, found = {}, {}
    for name, code in functions.items():
        kernel, dtype, vector = re.search(r"([a-z]+_kernel)I(\w+?)Li(\d+)E", name).groups()
        assert code.spills == 0, name
        assert code.registers <= 128, name  # two blocks of 256 threads share a multiprocessor
        found[f"{kernel} {dtype} x{vector}"] = code.registers
        if kernel == "partial_kernel" and int(vector) > 1:
            partial[dtype] = aot.main_loop(code.instructions)
    assert_recorded(architecture, found)
    assert len(partial) == 4
    for dtype, loop in partial.items():
        loads = Counter(each.opcode.split(".CONSTANT")[0] for each in loop)
        wide = loads["LDG.E.128"]
        assert wide >= 8, (dtype, loads)  # four rows at a time of two operands
        if dtype != "d":  # double precision is arithmetic, not traffic
            part = issue.PARTS[architecture]
            clocks = len(loop) / issue.SCHEDULERS
            ratio = clocks / (wide * 16 * aot.WARP / part.bytes_per_clock)
            assert ratio <= ISSUE, (dtype, ratio)
