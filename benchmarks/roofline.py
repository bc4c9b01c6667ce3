"""ESTIMATED time of the GPU paths, from what they launch: ``python -m benchmarks.roofline --help``.

Nothing is measured. The real forward and backward run on the ``meta`` device; every kernel launch
and library product is recorded, and takes ``max(flops / peak, bytes / bandwidth, issue time)`` of a
GPU's data sheet: a bound that no launch undercuts and that good kernels come near. Launch gaps are
not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from floe_triton import aot, gpu, launch
from floe_triton.group import Group, Needs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness, issue
from benchmarks.harness import Column, Row
from benchmarks.settings import Command, one_of, option, several
from floe.storage import write_json

NOTE = """\
ESTIMATE, not a measurement: no GPU was used. A launch takes the longest of its products at the
data sheet's peak, its tensors moved once at the data sheet's bandwidth and, where a kernel streams
through memory, the time to issue its instructions. A workspace that one launch writes and one of
the next two reads is counted at no memory traffic if it fits half of the L2 cache; the column "+L2
traffic" counts it as traffic. "fused" supposes that Triton's product is as fast as the library's,
and a C matrix that a product starts from is supposed to be read behind its arithmetic.
frozen: the frozen products alone."""


@dataclass(frozen=True)
class Device:
    """A GPU's data sheet: dense bfloat16 flops per second, and bytes of L2 cache."""

    capability: int
    flops: float
    cache: float

    @property
    def part(self) -> issue.Part:
        """Its name, clock and memory."""
        return issue.PARTS[self.capability]


DEVICES = {"h100": Device(90, 989.4e12, 50 * 2**20), "a100": Device(80, 312e12, 40 * 2**20)}


@dataclass(frozen=True)
class Layer:
    """A group of G linears K -> N that read one x."""

    name: str
    columns: int
    features: int
    linears: int = 1


@dataclass(frozen=True)
class Setting:
    """What all layers share: T, r, M, the rate of dropout and the backend."""

    tokens: int
    rank: int
    experts: int
    dropout: float
    backend: str


SHAPES = {
    "4096 -> 4096": (Layer("linear", 4096, 4096),),
    "4096 -> 11008": (Layer("linear", 4096, 11008),),
    "11008 -> 4096": (Layer("linear", 11008, 4096),),
    "Llama-7B block": (
        Layer("q, k, v", 4096, 4096, linears=3),
        Layer("o", 4096, 4096),
        Layer("gate, up", 4096, 11008, linears=2),
        Layer("down", 11008, 4096),
    ),
}


@dataclass(frozen=True)
class Step:
    """One launch or library call. ``tensors``: everything it reads or writes, each once."""

    name: str
    flops: int
    tensors: tuple[Tensor, ...]
    launch: launch.Launch | None = None


class Recorder(TorchDispatchMode):
    """The steps of what runs within it, in order: recorded launches between library calls."""

    def __init__(self, launches: list[launch.Launch]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._launches = launches
        self._taken = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, which is a step unless it only allocates or views."""
        result = func(*args, **(kwargs or {}))
        name, read, written = func.__name__.split(".")[0], tensors(args), tensors(result)
        known = {storage(tensor) for tensor in read}
        in_place = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        new = written if in_place else [t for t in written if storage(t) not in known]
        if read and new and not name.startswith(("empty", "new_empty")):
            self.take_launches()
            self.steps.append(Step(name, _flops(name, read), (*read, *new)))
        return result

    def take_launches(self) -> None:
        """Move the launches recorded since the last call to the steps."""
        for each in self._launches[self._taken :]:
            moved = tuple(tensors(list(each.arguments.values())))
            self.steps.append(Step(each.kernel.__name__, each.flops, moved, each))
        self._taken = len(self._launches)


@contextmanager
def recording(capability: int) -> Iterator[Recorder]:
    """Record what runs within, for an architecture."""
    with launch.recording(capability) as launches, Recorder(launches) as recorder:
        yield recorder
        recorder.take_launches()


def tensors(values: Any) -> list[Tensor]:
    """Every tensor in nested lists and tuples."""
    if isinstance(values, Tensor):
        return [values]
    if not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in tensors(value)]


def storage(tensor: Tensor) -> int:
    """What views of one memory share."""
    return tensor.untyped_storage()._cdata


def size(tensor: Tensor) -> int:
    """Its bytes."""
    return tensor.numel() * tensor.element_size()


def _flops(name: str, read: list[Tensor]) -> int:
    """Of the products; everything else is bound by memory."""
    if name not in ("mm", "addmm", "addmm_"):
        return 0
    left, right = read[-2:]
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


@dataclass(frozen=True)
class Bound:
    """Seconds that a step takes at least: the longest of three."""

    step: Step
    bytes: int
    compute: float
    memory: float
    issue: float

    @property
    def seconds(self) -> float:
        """The bound."""
        return max(self.compute, self.memory, self.issue)


@dataclass(frozen=True)
class Pass:
    """Forward or backward of a layer: what it runs, and what it has from and leaves to others."""

    steps: Sequence[Step]
    kept: Sequence[Tensor]

    def bounds(self, device: Device, workspaces_are_free: bool) -> list[Bound]:
        """Every step's bound."""
        free = self._in_cache(device.cache / 2) if workspaces_are_free else set()
        bounds = []
        for index, step in enumerate(self.steps):
            moved = [t for t in step.tensors if (index, storage(t)) not in free]
            traffic = sum(map(size, moved))
            compute, memory = step.flops / device.flops, traffic / device.part.bandwidth
            bounds.append(Bound(step, traffic, compute, memory, _issue_time(step)))
        return bounds

    def _in_cache(self, room: float) -> set[tuple[int, int]]:
        """(step, storage) of the mentions of workspaces that never leave the cache."""
        mentions: dict[int, list[int]] = {}
        for index, step in enumerate(self.steps):
            for tensor in step.tensors:
                if size(tensor) <= room:
                    mentions.setdefault(storage(tensor), []).append(index)
        for tensor in self.kept:
            mentions.pop(storage(tensor), None)
        free = set()
        for memory, at in mentions.items():
            gaps = [later - earlier for earlier, later in pairwise(at)]
            free |= {(i, memory) for i, gap in zip(at[1:], gaps, strict=True) if gap <= 2}
            if gaps and max(gaps) <= 2:
                free.add((at[0], memory))  # where it is written
        return free


def passes(layer: Layer, setting: Setting, device: Device) -> dict[str, Pass]:
    """The layer's forward and backward, adapted by floe and frozen, as ``"floe forward"`` etc."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def each(*shape: int) -> list[Tensor]:
        return [empty(*shape) for _ in range(layer.linears)]

    x, seed = empty(setting.tokens, layer.columns), empty(dtype=torch.int64)
    group = Group(
        weights=each(layer.features, layer.columns),
        biases=[None] * layer.linears,
        base_outputs=[],
        shrink_weights=each(setting.rank + setting.experts, layer.columns),
        expand_weights=each(layer.features, setting.experts, setting.rank),
        router_biases=[None] * layer.linears,
        scaling=2.0,
        temperature=1.0,
        dropout_p=setting.dropout,
        seed=seed if setting.dropout else None,
        backend=setting.backend,
    )
    given = [x, seed, *group.weights, *group.shrink_weights, *group.expand_weights]
    with recording(device.capability) as forward:
        ys, routed = gpu.forward(x, group)
    grad_ys = [torch.empty_like(y) for y in ys]
    needs = Needs(x=True, shrink=True, expand=True, router_bias=False)
    with recording(device.capability) as backward:
        gradients = gpu.backward(grad_ys, x, group, routed, needs)
    with recording(device.capability) as frozen_forward:
        frozen_ys = [torch.mm(x, weight.T) for weight in group.weights]
    with recording(device.capability) as frozen_backward:
        pairs = zip(grad_ys, group.weights, strict=True)
        frozen_grads = [torch.mm(grad_y, weight) for grad_y, weight in pairs]
    saved = [routed.hidden, routed.gate, routed.z]
    left = [*gradients.shrink, *gradients.expand, *tensors([gradients.x])]
    return {
        "floe forward": Pass(forward.steps, [*given, *saved, *ys]),
        "floe backward": Pass(backward.steps, [*given, *saved, *grad_ys, *left]),
        "frozen forward": Pass(frozen_forward.steps, [*given, *frozen_ys]),
        "frozen backward": Pass(frozen_backward.steps, [*given, *grad_ys, *frozen_grads]),
    }


def _issue_time(step: Step) -> float:
    if step.launch is None or not issue.streams(step.launch):
        return 0.0
    key = aot.identity(step.launch)
    if key not in _reports:
        _reports[key] = aot.compile_launch(step.launch).report()
    return issue.issue_time(step.launch, _reports[key]) or 0.0


_reports: dict[str, aot.Report] = {}


def estimate(layers: Sequence[Layer], setting: Setting, device: Device) -> Row:
    """Seconds of every pass over the layers, and each step of floe's."""
    seconds: dict[str, float] = {}
    steps = []
    for layer in layers:
        for name, each in passes(layer, setting, device).items():
            whose, what = name.split()
            for free in (True, False):
                bounds = each.bounds(device, free)
                key = name if free else f"{name} with L2 traffic"
                seconds[key] = seconds.get(key, 0.0) + sum(b.seconds for b in bounds)
                if free and whose == "floe":
                    steps += [_described(layer, what, bound) for bound in bounds]
    return {"seconds": seconds, "steps": steps}


def _described(layer: Layer, what: str, bound: Bound) -> Row:
    times = ("compute", "memory", "issue", "seconds")
    return {
        "layer": layer.name,
        "pass": what,
        "step": bound.step.name,
        "gflop": bound.step.flops / 1e9,
        "megabytes": bound.bytes / 1e6,
        **{f"{name}_us": getattr(bound, name) * 1e6 for name in times},
    }


@dataclass(frozen=True)
class Options:
    """What is estimated."""

    device: tuple[str, ...] = option(tuple(DEVICES), "h100,a100", several(one_of(DEVICES)))
    backend: tuple[str, ...] = option(
        ("gemm", "fused"), "gemm,fused", several(one_of(("gemm", "fused")))
    )
    shapes: tuple[str, ...] = option(tuple(SHAPES), "; between them", several(one_of(SHAPES), ";"))
    tokens: int = option(16384)
    rank: int = option(8)
    experts: int = option(4)
    dropout: float = option(0.05)
    steps: bool = option(False, "also every launch and library call")
    json: Path | None = option(None, "write every row and step to this file", Path)


COMMAND = Command("roofline", __doc__, Options)


def main(arguments: list[str] | None = None) -> None:
    """Print a table for every GPU; write the rows where ``--json`` says."""
    options, rows = COMMAND.parse(arguments), []
    print(NOTE)
    for name, backend, shape in product(options.device, options.backend, options.shapes):
        sizes = (options.tokens, options.rank, options.experts, options.dropout)
        setting = Setting(*sizes, backend)
        of = {"estimate": True, "device": DEVICES[name].part.name, "shape": shape}
        estimated = estimate(SHAPES[shape], setting, DEVICES[name])
        rows.append({**of, "setting": asdict(setting), **estimated})
    print(f"\nT={options.tokens}, r={options.rank}, M={options.experts}, dropout {options.dropout}")
    print(harness.show(rows, COLUMNS))
    for row in rows if options.steps else []:
        print(f"\nESTIMATE {row['device']}, {row['shape']}, {row['setting']['backend']}")
        lines = [tuple(_shown(value) for value in step.values()) for step in row["steps"]]
        print(harness.table(tuple(row["steps"][0]), lines))
    if options.json:
        write_json(options.json, rows)


def _total(row: Row, whose: str, traffic: str = "") -> float:
    """Forward and backward, in seconds."""
    seconds = row["seconds"]
    return float(sum(seconds[f"{whose} {what}{traffic}"] for what in ("forward", "backward")))


def _over(floe: float, frozen: float) -> str:
    return f"{floe / frozen - 1:+.1%}"


def _both(row: Row, traffic: str = "") -> str:
    return _over(_total(row, "floe", traffic), _total(row, "frozen", traffic))


COLUMNS: list[Column] = [
    ("ESTIMATE", "device:"),
    ("backend", "setting.backend:"),
    ("shape", "shape:"),
    ("frozen f+b us", lambda row: f"{_total(row, 'frozen') * 1e6:.0f}"),
    ("floe f+b us", lambda row: f"{_total(row, 'floe') * 1e6:.0f}"),
    *(
        (what, lambda row, w=what: _over(*(row["seconds"][f"{n} {w}"] for n in ("floe", "frozen"))))
        for what in ("forward", "backward")
    ),
    ("f+b", _both),
    ("f+b +L2 traffic", lambda row: _both(row, " with L2 traffic")),
]


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.1f}"


if __name__ == "__main__":
    main()
