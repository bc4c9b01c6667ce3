"""Every kernel's addresses proved inside its tensors by triton-viz: ``make kernel-sanitize``.

Its sanitizer runs a kernel on symbols instead of numbers and asks a solver whether any program,
lane or loop step reads or writes outside the tensors given. It comes with an older Triton than the
rest.
"""

import ast
import builtins
import importlib
import inspect
from collections import Counter
from pathlib import Path

import floe_triton
import pytest
import torch
import triton
import triton.language as tl
from floe_triton import gpu, launch
from floe_triton.group import Group, Needs
from floe_triton.kernels.dropout import dropout as dropout_alone

pytestmark = [
    pytest.mark.static,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),  # of triton-viz, which does not know of our rule
]

KERNELS = Path(floe_triton.__file__).parent / "kernels"
MODULES = [
    importlib.import_module(f"floe_triton.kernels.{path.stem}")
    for path in sorted(KERNELS.glob("*.py"))
]


@triton.jit
def unmasked_kernel(x, out, N, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + columns, tl.load(x + columns), mask=columns < N)


@triton.jit
def keep_all(
    seed,
    token,
    first_column,
    threshold,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEALED: tl.constexpr = False,
):
    """In place of ``keep_mask``, which touches no memory and is beyond triton-viz."""
    return (token >= 0)[:, None] & (tl.arange(0, BLOCK_K) >= 0)[None, :]


@pytest.fixture(scope="module")
def triton_viz():
    """The package, with what it lacks for these kernels."""
    package = pytest.importorskip("triton_viz", reason="triton-viz, as in make kernel-sanitize")
    from triton_viz.core.data import Trans
    from triton_viz.core.patch import _loop_patcher
    from triton_viz.frontends.triton import TRITON_FRONTEND as frontend

    # tl.trans would come back without a shape, which tl.dot asks for; its builder keeps it
    del frontend.namespaces[tl]["trans"], frontend.original_ops[tl]["trans"]
    frontend.namespaces[frontend.builder]["create_trans"] = Trans
    frontend.original_ops[frontend.builder]["create_trans"] = frontend.builder.create_trans
    # loops are found by this name in the kernel's own module, not in those of functions it calls
    builtins._triton_viz_loop_patcher = _loop_patcher
    return package


class Watch:
    """The reports on each kernel, and how often each was launched."""

    def __init__(self, package):
        self._package = package
        self.launched, self._clients = Counter(), {}

    def wrap(self, name, kernel):
        """``kernel`` under the sanitizer."""
        client = self._clients[name] = self._package.clients.Sanitizer(abort_on_error=False)
        traced = self._package.trace(client)(kernel)
        run = traced.run

        def counted(*arguments, **options):
            self.launched[name] += 1
            return run(*arguments, **options)

        traced.run = counted
        return traced

    def reports(self):
        """``{kernel: lines of code}`` where there are any."""
        return {
            name: sorted({f"{at.filename}:{at.lineno}" for at in record.user_code_tracebacks})
            for name, client in self._clients.items()
            for record in client.records
        }


@pytest.fixture(scope="module")
def watch(triton_viz):
    """All kernels under the sanitizer."""
    found = Watch(triton_viz)
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            for name, value in list(vars(module).items()):
                if name.endswith("_kernel"):
                    patch.setattr(module, name, found.wrap(name, value))
                if name == "keep_mask":
                    patch.setattr(module, name, keep_all)
        yield found


def test_a_load_without_its_mask_is_found(triton_viz):
    planted = Watch(triton_viz)
    kernel = planted.wrap("unmasked_kernel", unmasked_kernel)
    kernel[(2,)](torch.ones(100), torch.empty(100), 100, BLOCK=64)
    assert list(planted.reports()) == ["unmasked_kernel"]


def run(
    tokens,
    columns,
    features,
    rank,
    experts,
    linears,
    dropout,
    path,
    on_base,
    dtype,
    top_k=0,
    own_a=False,
    gated=False,
):
    """Forward, backward and dropout, with H100's block sizes; only addresses mean anything."""

    def each(*shape, given=True):
        return [torch.ones(shape, dtype=dtype) for _ in range(linears)] if given else []

    x = torch.ones(tokens, columns, dtype=dtype)
    rows = rank * (experts if own_a else 1) + (0 if gated else experts)
    group = Group(
        weights=each(features, columns, given=not on_base),
        biases=[None] * linears if on_base else each(features),
        base_outputs=each(tokens, features, given=on_base),
        shrink_weights=each(rows, columns),
        expand_weights=each(features, experts, rank),
        router_biases=[None] * linears if gated else each(experts),
        scaling=2.0,
        temperature=1.0,
        dropout_p=dropout,
        seed=torch.tensor(7) if dropout else None,
        backend=path,
        gates=each(tokens, experts, given=gated),
        top_k=top_k,
    )
    with launch.assume(90):
        ys, routed = gpu.forward(x, group)
        grad_ys = [torch.ones_like(y) for y in ys]
        gpu.backward(grad_ys, x, group, routed, Needs(True, True, True, not gated, gated))
        dropout_alone(x, 0.1, torch.tensor(7))


CASES = {
    "dropout": (137, 145, 151, 3, 3, 2, 0.1, "gemm", False),
    "no dropout": (137, 145, 151, 5, 2, 3, 0.0, "gemm", False),
    "fused": (137, 145, 151, 3, 3, 2, 0.1, "fused", False),
    "fused, no dropout": (300, 77, 530, 8, 4, 1, 0.0, "fused", False),
    "on base": (65, 33, 70, 2, 10, 1, 0.1, "gemm", True),
    "decode": (5, 145, 151, 3, 3, 3, 0.0, "gemm", False),
    "by library": (70, 33, 65, 40, 4, 1, 0.1, "gemm", False),
    "one token": (1, 1, 1, 1, 1, 1, 0.0, "fused", False),
}
USUAL, DECODE = (
    (137, 145, 151, 3, 5, 2, 0.1, "gemm", False),
    (5, 145, 151, 3, 5, 3, 0.0, "gemm", False),
)
ROUTERS = {
    "top_k": {"top_k": 2},
    "an A each": {"own_a": True},
    "gates": {"gated": True},
    "an A each, gates": {"own_a": True, "gated": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_no_kernel_leaves_its_tensors(watch, case, dtype):
    run(*CASES[case], dtype)
    assert watch.reports() == {}


@pytest.mark.parametrize("shape", [USUAL, DECODE], ids=["usual", "decode"])
@pytest.mark.parametrize("router", ROUTERS)
def test_no_router_leaves_its_tensors(watch, router, shape):
    run(*shape, torch.float32, **ROUTERS[router])
    assert watch.reports() == {}


def launched_kernels():
    """What the package's sources give to ``launch``, whatever its name: the one way to a GPU."""
    return {
        call.args[0].id
        for module in MODULES
        for call in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "launch"
        if isinstance(call.args[0], ast.Name)
    }


def test_every_kernel_was_run(watch):
    kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    assert kernels == launched_kernels() == set(watch.launched)
