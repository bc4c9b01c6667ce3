"""The static gate's cases and its table: ``python tests/helpers/static_gate.py [--update]``.

What the real paths launch, recorded on the ``meta`` device for every architecture, is compiled and
read; ``static_gate.json`` keeps what was found with each version of Triton, and
``test_static_gate.py`` holds it to that.
"""

import argparse
import json
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from floe_triton import aot, gpu, launch
from floe_triton.group import Group, Needs
from floe_triton.kernels.dropout import dropout

TABLE = Path(__file__).with_suffix(".json")
PROCESSES = 2
FIGURES = ("registers", "shared_memory", "main_loop")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One shape class: T, K, N, r, M and G of a group, and the path it takes."""

    tokens: int = 16384
    columns: int = 4096
    features: int = 4096
    rank: int = 8
    experts: int = 4
    linears: int = 1
    dropout: float = 0.05
    path: str = "gemm"
    wide_adapter: bool = False  # float32 beside a 16-bit x
    biased: bool = False  # linears and routers
    on_base: bool = False
    top_k: int = 0
    own_a: bool = False  # an A for each expert
    gated: bool = False  # gates are given

    def run(self, dtype):
        """Forward and backward on the meta device."""
        x, group = self._inputs(dtype)
        ys, routed = gpu.forward(x, group)
        of_router = self.biased and not self.gated
        needs = Needs(x=True, shrink=True, expand=True, router_bias=of_router, gates=self.gated)
        gpu.backward([torch.empty_like(y) for y in ys], x, group, routed, needs)
        if self.dropout:
            dropout(x, self.dropout, group.seed)

    def _inputs(self, dtype):
        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        def each(*shape, given=True, dtype=dtype):
            return [empty(*shape, dtype=dtype) for _ in range(self.linears)] if given else []

        adapter = torch.float32 if self.wide_adapter else dtype
        hidden = self.rank * (self.experts if self.own_a else 1)
        rows = hidden + (0 if self.gated else self.experts)
        none = [None] * self.linears
        bare = not self.on_base
        group = Group(
            weights=each(self.features, self.columns, given=bare),
            biases=each(self.features) if self.biased else none,
            base_outputs=each(self.tokens, self.features, given=self.on_base),
            shrink_weights=each(rows, self.columns, dtype=adapter),
            expand_weights=each(self.features, self.experts, self.rank, dtype=adapter),
            router_biases=each(self.experts, dtype=adapter)
            if self.biased and not self.gated
            else none,
            scaling=2.0,
            temperature=1.0,
            dropout_p=self.dropout,
            seed=empty(dtype=torch.int64) if self.dropout else None,
            backend=self.path,
            gates=each(self.tokens, self.experts, given=self.gated),
            top_k=self.top_k,
        )
        return empty(self.tokens, self.columns), group


CASES = {
    "usual": Case(),
    "no dropout": Case(dropout=0.0),
    "fused": Case(path="fused"),
    "fused, no dropout": Case(path="fused", dropout=0.0),
    "q, k, v": Case(linears=3, path="fused"),
    "widest": Case(rank=16, experts=8),
    "most rows": Case(rank=16, experts=8, linears=5),
    "rank 2": Case(rank=2, experts=10, path="fused"),
    "biased": Case(biased=True, dropout=0.0, path="fused"),
    "on base": Case(on_base=True),
    "adapter in float32": Case(wide_adapter=True, path="fused"),
    "few tokens": Case(tokens=512),
    "decode": Case(tokens=8, linears=3, dropout=0.0),
    "ragged": Case(tokens=1001, columns=1009, features=1511, rank=5, experts=3, path="fused"),
    "by library": Case(rank=64, experts=10),
    "top 2 of 8": Case(experts=8, top_k=2),
    "top 2, decode": Case(experts=8, top_k=2, tokens=8, linears=3, dropout=0.0),
    "an A each": Case(own_a=True, linears=2),
    "an A each, decode": Case(own_a=True, tokens=8, linears=3, dropout=0.0),
    "rank-wise": Case(rank=1, experts=32, own_a=True, top_k=8),
    "gates given": Case(gated=True),
    "gates given, decode": Case(gated=True, tokens=8, linears=3, dropout=0.0),
}
# All cases are compiled on one architecture of each size of shared memory, for bfloat16 and, of
# these, for every dtype; elsewhere the common cases for bfloat16, which code differs in little.
EVERY_DTYPE = ("usual", "fused")
COMMON = ("usual", "fused", "q, k, v", "widest", "most rows", "few tokens", "decode")
FULL = {size: capability for capability, size in reversed(aot.SHARED_MEMORY.items())}.values()


@dataclass(frozen=True)
class Entry:
    """A recorded launch of the gate: where it came from, and what it is."""

    case: str
    dtype: torch.dtype
    launch: launch.Launch
    number: int = 1  # of the machine codes that the case has of this kernel

    @property
    def kernel(self):
        """The kernel's name."""
        return self.launch.kernel.__name__

    @property
    def capability(self):
        """The architecture."""
        return self.launch.device.capability

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        again = f" ({self.number})" if self.number > 1 else ""
        return f"{self.kernel}{again}, {self.case}, {dtype}"


@cache
def entries():
    """Every launch of every case, once for each machine code."""
    found, known = [], set()
    for capability in aot.SHARED_MEMORY:
        full = capability in FULL
        for case in CASES if full else COMMON:
            for dtype in DTYPES if full and case in EVERY_DTYPE else DTYPES[:1]:
                with launch.recording(capability) as launches:
                    CASES[case].run(dtype)
                found += _new(case, dtype, launches, known)
    return found


def _new(case, dtype, launches, known):
    """Entries of the launches whose machine code is not ``known``, which it is from now on."""
    seen, found = Counter(), []
    for each in launches:
        identity = aot.identity(each)
        if identity not in known:
            known.add(identity)
            seen[each.kernel] += 1
            found.append(Entry(case, dtype, each, seen[each.kernel]))
    return found


def report(index):
    """What entry ``index`` compiles to; the compiler's error as text."""
    try:
        return aot.compile_launch(entries()[index].launch).report()
    except Exception as error:  # any of the compiler's is a finding
        return f"{type(error).__name__}: {error}"


def reports():
    """Yield the report of every entry, compiled by a few processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        yield from pool.map(report, range(len(entries())))


def table(found):
    """``{entry: {architecture: figures}}`` of the reports, JSON's way."""
    rows = {}
    for entry, each in zip(entries(), found, strict=True):
        if isinstance(each, aot.Report):
            row = rows.setdefault(str(entry), {})
            row[str(entry.capability)] = [getattr(each, figure) for figure in FIGURES]
    return rows


def exceeded(budgets, found):
    """Sentences on every figure above its budget and every row that only one of the two has."""
    wrong = []
    for name in sorted({*budgets, *found}):
        for capability in sorted({*budgets.get(name, {}), *found.get(name, {})}, key=int):
            allowed = budgets.get(name, {}).get(capability)
            actual = found.get(name, {}).get(capability)
            at = f"{name}, sm_{capability}"
            if allowed is None or actual is None:
                wrong.append(f"{at}: in {'the table' if actual is None else 'the code'} only")
                continue
            wrong += [
                f"{at}: {figure} {now}, budget {most}"
                for figure, now, most in zip(FIGURES, actual, allowed, strict=True)
                if now > most
            ]
    return wrong


def read():
    """The committed budgets: ``{Triton's version: {entry: {architecture: figures}}}``."""
    return json.loads(TABLE.read_text())["triton"]


def budgets(committed, version):
    """Those of one version of Triton.

    Raises:
        LookupError: There are none, as before that version was first looked at.
    """
    if version not in committed:
        raise LookupError(
            f"budgets must be of the Triton in use, {version}, got some of {', '.join(committed)}; "
            "`make cuda-check UPDATE=1` makes them of what it finds"
        )
    return committed[version]


def text(committed):
    """The table as it is committed, a line for each kernel and case."""
    versions = []
    for version, rows in sorted(committed.items()):
        lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items())]
        body = ",\n  ".join(lines)
        versions.append(f"{json.dumps(version)}: {{\n  {body}\n}}")
    body = ",\n".join(versions)
    return f'{{"figures": {json.dumps(FIGURES)}, "triton": {{\n{body}\n}}}}\n'


def main():
    """Print every figure; write the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="make these this Triton's budgets")
    options, found = parser.parse_args(), []
    for entry, each in zip(entries(), reports(), strict=True):
        found.append(each)
        print(f"sm_{entry.capability:<4}{entry}: {each}", flush=True)
    if options.update:
        TABLE.write_text(text({**read(), triton.__version__: table(found)}))


if __name__ == "__main__":
    main()
