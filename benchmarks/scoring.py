"""What scoring a model costs beside a plain forward and backward of the same passes.

``python -m benchmarks.scoring --help``. SmolLM2-135M with fresh routed adapters on every layer and
the demo's questions. Time: every measurement over the same passes of the same rows, in turns.
Memory: a process of its own for each.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, models
from benchmarks.harness import Candidate, Check
from floe.adapters import FloeConfig, adapted_modules, get_model
from floe.adapters.linear import separate_base
from floe.config import load_config
from floe.data.batches import Collator, TokenRow, in_batches
from floe.data.loss import evaluating, for_loss, losses
from floe.decoder_blocks import find_blocks, linear_at
from floe.importance.chunk_store import Workbook, chunks, passes
from floe.importance.gradients import Capture
from floe.importance.score import TAYLOR_ROWS
from floe.importance.taylor import TaylorPlan
from floe.pipeline.inputs import RunInputs
from floe.training.memory import PeakMemory

ARMS = ("plain", "masks", "adapters", "masks and adapters")
TAYLOR = ("plain, all tokens", "taylor")
Pass = tuple[dict[str, Any], list[int]]


@dataclass(frozen=True)
class Subject:
    """An adapted model and its calibration rows."""

    model: nn.Module
    rows: list[TokenRow]

    def passes(self, rows: list[TokenRow], tokens: str = "response") -> list[Pass]:
        """Batches and row numbers, in the passes that scoring would choose."""
        groups = [group for chunk in chunks(rows) for group in passes(rows, chunk)]
        collate = Collator.for_model(self.model)
        return [(for_loss(collate([rows[n] for n in g]), tokens), g) for g in groups]


def smollm2(rows: int, rank: int, experts: int) -> Subject:
    """SmolLM2-135M with routed adapters of random experts, and the demo's training rows."""
    models.load(models.SMOLLM2, device=torch.device("cpu"), dtype=torch.bfloat16)
    work = RunInputs(load_config(models.ROOT / "examples/demo/demo.yaml"))
    model = get_model(work.base_model, FloeConfig(r=rank, num_experts=experts, alpha=32), seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in adapted_modules(model).values():
        expand = module.floe_expand["default"].weight.data
        expand.copy_(0.02 * torch.randn(expand.shape, generator=generator))
    return Subject(model, in_batches(work.train_rows[:rows], 8))


def run_arm(subject: Subject, arm: str) -> None:
    """One measurement, or the plain passes it is compared with."""
    leading = subject.rows[:TAYLOR_ROWS]
    if arm == "taylor":
        TaylorPlan(subject.model, leading).work(Workbook(None, {}), None)
    elif arm == "plain":
        plain(subject.model, subject.passes(subject.rows))
    elif arm == "plain, all tokens":
        disable: Any = subject.model.disable_adapter
        with disable():
            plain(subject.model, subject.passes(leading, "all"))
    else:
        masks, adapters = "masks" in arm, "adapters" in arm
        scope = "base" if masks else "full"
        with Capture(subject.model, scope=scope, masks=masks, adapters=adapters) as capture:
            for batch, numbers in subject.passes(subject.rows):
                capture.step(batch, numbers)


def plain(model: nn.Module, found: list[Pass]) -> None:
    """Forward and backward with every weight frozen; gradients reach the embeddings' output."""
    with evaluating(model, input_gradients=True):
        for batch, numbers in found:
            with torch.enable_grad():
                losses(model, batch, numbers)[0].sum().backward()


def check(subject: Subject) -> list[Check]:
    """One row's mask gradients in the middle layer against explicit masks, in float64."""
    row = sorted(subject.rows, key=len)[len(subject.rows) // 2]
    batch, layer = (
        for_loss(Collator.for_model(subject.model)([row]), "response"),
        len(find_blocks(subject.model)) // 2,
    )
    with Capture(subject.model) as capture:
        neuron = capture.step(batch).neuron
    assert neuron is not None
    exact = explicit(copy.deepcopy(subject.model).double(), batch, layer)
    torchs = explicit(subject.model, batch, layer)
    return [Check("mask gradients", torch.from_numpy(neuron[0, layer]), exact, torchs)]


def explicit(model: nn.Module, batch: dict[str, Any], layer: int) -> Tensor:
    """d L / d m of a layer's neuron masks, by autograd on masks that are there, [I]."""
    down = linear_at(model, find_blocks(model)[layer].down_proj)
    mask = torch.ones(down.in_features, dtype=down.weight.dtype, requires_grad=True)
    hook = down.register_forward_pre_hook(lambda _m, args: (args[0] * mask,))
    try:
        with evaluating(model), separate_base(model), torch.enable_grad():
            loss, _ = losses(model, batch, [0])
            (gradient,) = torch.autograd.grad(loss.sum(), [mask])
    finally:
        hook.remove()
    found: Tensor = gradient.detach()
    return found


def peak(arm: str, options: argparse.Namespace) -> tuple[int, int]:
    """(peak, before) bytes of one arm in a fresh process: once to warm up, then measured."""
    command = [sys.executable, "-m", "benchmarks.scoring", "--child", arm]
    command += ["--rows", str(options.rows), "--rank", str(options.rank)]
    command += ["--experts", str(options.experts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=models.ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak"], found["before"]


def child(arm: str, options: argparse.Namespace) -> None:
    """What the fresh process does."""
    subject = smollm2(options.rows, options.rank, options.experts)
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        run_arm(subject, arm)
    print(json.dumps({"peak": memory.bytes, "before": before.bytes, "kind": memory.kind}))


def main(arguments: list[str] | None = None) -> None:
    """Print two tables; write the records where ``--json`` says."""
    options = parse(arguments)
    if options.child:
        child(options.child, options)
        return
    device, clock = harness.prepare(options)
    environment = harness.machine(device)
    subject = smollm2(options.rows, options.rank, options.experts)
    print(harness.describe(environment))
    records = []
    for arms, rows in ((ARMS, len(subject.rows)), (TAYLOR, TAYLOR_ROWS)):
        records += table(subject, arms, rows, options, environment, clock)
    if options.json:
        harness.save(options.json, records)


def table(
    subject: Subject,
    arms: tuple[str, ...],
    rows: int,
    options: argparse.Namespace,
    environment: dict[str, Any],
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Time and memory of the arms, in turns; ratios to the first."""
    found = [
        Candidate(
            arm, lambda arm=arm: run_arm(subject, arm),
            lambda arm=arm: check(subject) if "masks" in arm else [],
        )
        for arm in arms
    ]  # fmt: skip
    errors: dict[str, float] = {}
    seconds = harness.measure(
        found, rounds=options.rounds, device=torch.device("cpu"), warmup=0, clock=clock,
        errors=errors,
    )  # fmt: skip
    tokens = sum(len(row) for row in subject.rows[:rows])
    case = {"model": "smollm2", "rows": rows, "tokens": tokens, "dtype": "bfloat16"}
    made = harness.record(environment, case, seconds, errors, arms[0])
    for row in made if options.memory else []:
        row["peak_bytes"], row["before_bytes"] = peak(row["case"]["implementation"], options)
    show(made, rows, tokens)
    return made


def show(made: list[dict[str, Any]], rows: int, tokens: int) -> None:
    """One line an arm."""
    first = made[0]
    lines = []
    for row in made:
        cells = [row["case"]["implementation"], f"{row['milliseconds']['median'] / 1e3:.2f}"]
        cells += [f"{row['ratio'][key]:.3f}" for key in ("median", "p20", "p80")]
        if "peak_bytes" in row:
            cells += [f"{row['peak_bytes'] / 2**20:.0f}", f"{row['before_bytes'] / 2**20:.0f}"]
            cells += [f"{row['peak_bytes'] / first['peak_bytes']:.3f}"]
        lines.append(cells)
    header = ["", "s", "x plain", "p20", "p80"]
    header += ["peak MiB", "before", "x plain"] if "peak_bytes" in first else []
    print(
        f"\n{rows} rows, {tokens} tokens, the same passes\n{harness.table(header, lines)}",
        flush=True,
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__)
    harness.add_options(parser)
    parser.set_defaults(rounds=3)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--child", choices=(*ARMS, *TAYLOR), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
