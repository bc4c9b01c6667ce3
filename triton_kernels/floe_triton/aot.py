"""What a Triton kernel becomes on a named NVIDIA GPU, found out without that GPU.

A kernel is compiled ahead of time to a cubin, whose resources and instructions are then read with
the tools of CUDA that Triton's wheel brings along: no driver, no device.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from floe_triton.launch import Launch

# Shared memory that one block may ask for, in bytes (CUDA C++ Programming Guide, "Compute
# Capabilities"). Triton compiles a kernel that wants more; only its launch fails.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
WARP = 32

# Products are contracted to fused multiply-adds in every version of Triton (3.10 changes the
# default), and an option left out would not be the one that a launch compiles with.
_OPTIONS = {"enable_fp_fusion": True}
_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_TENSOR_CORE = re.compile(r"HMMA|HGMMA|UTC\w*MMA")
_ASYNC_COPY = re.compile(r"LDGSTS|UTMALDG|UBLKCP")
_GLOBAL_LOAD = re.compile(r"LDG|LDGSTS|UTMALDG|UBLKCP")
_WIDE_LOAD = re.compile(r"(LDG|LDGSTS)\..*(128|256)$|UTMALDG|UBLKCP")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; ``address`` in bytes from the kernel's start."""

    address: int
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        addresses = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(addresses[-1], 16) if self.opcode.startswith("BRA") and addresses else None


@dataclass(frozen=True)
class Report:
    """The facts of one compiled kernel.

    ``registers`` per thread; ``spills``, bytes of stack and local memory per thread;
    ``shared_memory`` in bytes per block; ``tensor_core`` (by opcode), ``async_copies`` and
    ``wide_loads`` (16 bytes or more per thread, or a bulk copy) count instructions of the whole
    kernel, ``main_loop`` and ``outside`` those of a warp's one iteration and of all else.
    """

    registers: int
    spills: int
    shared_memory: int
    tensor_core: dict[str, int]
    async_copies: int
    wide_loads: int
    main_loop: int
    outside: int
    num_warps: int
    capability: int

    @property
    def fits(self) -> bool:
        """Whether a block may have the shared memory it asks for."""
        return self.shared_memory <= SHARED_MEMORY[self.capability]


@dataclass(frozen=True)
class Code:
    """The machine code of one function of a cubin, without padding."""

    registers: int
    spills: int
    instructions: list[Instruction]


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code: ``cubin`` lies in Triton's cache."""

    name: str
    capability: int
    num_warps: int
    shared_memory: int
    cubin: Path

    def report(self) -> Report:
        """Read resources and instructions from the cubin."""
        code = read_cubin(self.cubin)[self.name]
        loop = main_loop(code.instructions)
        cores = _of(_TENSOR_CORE, code.instructions)
        return Report(
            registers=code.registers,
            spills=code.spills,
            shared_memory=self.shared_memory,
            tensor_core=dict(Counter(each.opcode.split(".")[0] for each in cores)),
            async_copies=len(_of(_ASYNC_COPY, code.instructions)),
            wide_loads=len(_of(_WIDE_LOAD, code.instructions)),
            main_loop=len(loop),
            outside=len(code.instructions) - len(loop),
            num_warps=self.num_warps,
            capability=self.capability,
        )


def read_cubin(cubin: Path) -> dict[str, Code]:
    """Every function of a cubin by its (mangled) name.

    Raises:
        FileNotFoundError: Triton's installation has no disassembler.
    """
    usages = _tool("cuobjdump", "-res-usage", cubin).split("Function ")[1:]
    listings = _tool("cuobjdump", "-sass", cubin).split("Function : ")[1:]
    used = {usage.split(":")[0]: dict(re.findall(r"([A-Z]+):(\d+)", usage)) for usage in usages}
    functions = {}
    for listing in listings:
        name, matches = listing.split()[0], _INSTRUCTION.finditer(listing)
        code = [Instruction(int(m["address"], 16), m["opcode"], m["operands"]) for m in matches]
        spills = int(used[name]["STACK"]) + int(used[name]["LOCAL"])
        real = [each for each in code if each.opcode != "NOP"]
        functions[name] = Code(int(used[name]["REG"]), spills, real)
    return functions


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Collection[str] = (),
) -> Compiled:
    """Compile ``kernel`` for compute capability ``capability`` (90 is sm_90).

    Args:
        kernel: a function under ``triton.jit``.
        signature: type of each argument that is no constant, as ``"*bf16"`` or ``"i32"``.
        constants: value of each compile-time argument.
        capability: one of `SHARED_MEMORY`.
        num_warps: warps of a block.
        num_stages: stages of the software pipeline.
        divisible: arguments known to be divisible by 16 (pointers: 16-byte aligned). Without them
            no load is wide.

    Raises:
        TypeError: ``kernel`` is not under ``triton.jit``, or is interpreted.
        ValueError: the capability is unknown, or an argument is neither in the signature nor a
            constant.
        FileNotFoundError: Triton's installation has no disassembler (on reading the result).
    """
    backend = _backend(kernel, capability)
    missing = set(kernel.arg_names) ^ (set(signature) | set(constants))
    if missing or set(signature) & set(constants) or not set(divisible) <= set(signature):
        raise ValueError(
            f"signature and constants must share out {kernel.arg_names}, and divisible be of the "
            f"signature, got {sorted(signature)}, {sorted(constants)} and {sorted(divisible)}"
        )
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): backend.parse_attr("D") for name in divisible},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, **_OPTIONS}
    return _compile(source, backend.parse_options(options), capability)


def compile_launch(launch: Launch) -> Compiled:
    """Compile what a recorded launch would run, specialised to its arguments as Triton does.

    Triton's own binder is asked, so that the hints (aligned pointers, integers divisible by 16 or
    equal to 1) are those of a launch, whose machine code this is.

    Raises:
        TypeError, ValueError: as in `compile_kernel`.
    """
    source, options = _source(launch)
    return _compile(source, options, launch.device.capability)


def identity(launch: Launch) -> str:
    """Launches of one identity run the same machine code."""
    source, options = _source(launch)
    return f"{launch.device.capability}-{source.hash()}-{options.hash()}"


def _source(launch: Launch) -> tuple[ASTSource, Any]:
    backend, kernel = _backend(launch.kernel, launch.device.capability), launch.kernel
    options = {**launch.blocks.options, **_OPTIONS}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments = {**launch.arguments, **launch.constants, **options}
    parsed, *described = kernel._pack_args(backend, arguments, *bind(**arguments))
    return ASTSource(kernel, *described), parsed


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most tensor-core work, else with the most global loads.

    Code without such a loop is its own main loop: every block runs it once.
    """
    position = {each.address: index for index, each in enumerate(code)}
    ends = {
        position[each.target]: index  # of several branches back to one place, the last
        for index, each in enumerate(code)
        if each.target in position and position[each.target] <= index
    }
    loops = [code[start : end + 1] for start, end in ends.items()]
    for wanted in (_TENSOR_CORE, _GLOBAL_LOAD):
        working = [loop for loop in loops if _of(wanted, loop)]
        innermost = [a for a in working if not any(a is not b and _within(b, a) for b in working)]
        if innermost:
            return max(innermost, key=lambda loop: len(_of(wanted, loop)))
    return code


def _within(inner: list[Instruction], outer: list[Instruction]) -> bool:
    first, last = outer[0].address, outer[-1].address
    return first <= inner[0].address and inner[-1].address <= last


def _of(pattern: re.Pattern[str], code: list[Instruction]) -> list[Instruction]:
    return [each for each in code if pattern.match(each.opcode)]


def _backend(kernel: Any, capability: int) -> Any:
    if not isinstance(kernel, JITFunction):
        raise TypeError(
            "kernel must be under triton.jit, imported without TRITON_INTERPRET, "
            f"got {type(kernel).__name__}"
        )
    if capability not in SHARED_MEMORY:
        raise ValueError(f"capability must be one of {list(SHARED_MEMORY)}, got {capability}")
    return make_backend(_target(capability))


def _target(capability: int) -> GPUTarget:
    return GPUTarget("cuda", capability, WARP)


def _compile(source: ASTSource, options: Any, capability: int) -> Compiled:
    kernel = triton.compile(source, target=_target(capability), options=dict(options.__dict__))
    cubin = next(path for file, path in kernel.metadata_group.items() if file.endswith(".cubin"))
    return Compiled(kernel.name, capability, options.num_warps, kernel.metadata.shared, Path(cubin))


def _tool(name: str, option: str, cubin: Path) -> str:
    """What a disassembler of CUDA's says of a cubin."""
    try:
        path = getattr(triton.knobs.nvidia, name).path
    except (AttributeError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name} must come with Triton or be named by TRITON_{name.upper()}_PATH, "
            f"but Triton {triton.__version__} has none"
        ) from error
    return subprocess.run([path, option, cubin], capture_output=True, text=True, check=True).stdout
