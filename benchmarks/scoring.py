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
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, models
from benchmarks.harness import Bench, Candidate, Check, Column
from benchmarks.settings import Command, option
from floe.adapters import FloeConfig, adapted_modules, get_model
from floe.adapters.linear import separate_base
from floe.config_file import load_config
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
    work = RunInputs(load_config(harness.ROOT / "examples/demo/demo.yaml"))
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


def plain(model: nn.Module, passes: list[Pass]) -> None:
    """Forward and backward with every weight frozen; gradients reach the embeddings' output."""
    with evaluating(model, input_gradients=True):
        for batch, numbers in passes:
            with torch.enable_grad():
                losses(model, batch, numbers)[0].sum().backward()


def check(subject: Subject) -> list[Check]:
    """One row's mask gradients in the middle layer against explicit masks, in float64."""
    row = sorted(subject.rows, key=len)[len(subject.rows) // 2]
    batch = for_loss(Collator.for_model(subject.model)([row]), "response")
    layer = len(find_blocks(subject.model)) // 2
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
    detached: Tensor = gradient.detach()
    return detached


@dataclass(frozen=True)
class Timing(harness.Timing):
    """As elsewhere, but a round takes a minute."""

    rounds: int = option(3)


@dataclass(frozen=True)
class Options:
    """What is scored, and whether memory is measured, too."""

    rows: int = option(256)
    rank: int = option(8)
    experts: int = option(4)
    no_memory: bool = option(False)
    child: str | None = option(None, argparse.SUPPRESS, choices=(*ARMS, *TAYLOR))


COMMAND = Command("scoring", __doc__, Timing, Options)


def main(arguments: list[str] | None = None) -> None:
    """Print two tables; write the records where ``--json`` says."""
    timing, options = COMMAND.parse(arguments)
    if options.child:
        child(options)
        return
    bench = Bench.begin(timing)
    subject = smollm2(options.rows, options.rank, options.experts)
    rows = compare(bench, subject, ARMS, len(subject.rows), options)
    rows += compare(bench, subject, TAYLOR, TAYLOR_ROWS, options)
    harness.save(timing.json, rows)


def compare(
    bench: Bench, subject: Subject, arms: tuple[str, ...], count: int, options: Options
) -> list[harness.Row]:
    """Time and memory of the arms on ``count`` rows, in turns, printed; ratios to the first."""
    candidates = [
        Candidate(arm, partial(run_arm, subject, arm), partial(_checks, subject, arm))
        for arm in arms
    ]
    tokens = sum(len(row) for row in subject.rows[:count])
    case = {"model": "smollm2", "rows": count, "tokens": tokens, "dtype": "bfloat16"}
    rows, _ = bench.time(case, candidates, arms[0], warmup=0)
    columns: list[Column] = [
        ("", "case.implementation:"),
        ("s", lambda row: f"{row['milliseconds']['median'] / 1e3:.2f}"),
        *harness.spread("x plain", "ratio", ".3f"),
    ]
    if not options.no_memory:
        for row in rows:
            row["peak_bytes"], row["before_bytes"] = peak(row["case"]["implementation"], options)
            row["peak_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
        columns += [
            ("peak MiB", harness.mib("peak_bytes")),
            ("before", harness.mib("before_bytes")),
            ("x plain", "peak_ratio:.3f"),
        ]
    print(f"\n{count} rows, {tokens} tokens, the same passes")
    print(harness.show(rows, columns), flush=True)
    return rows


def _checks(subject: Subject, arm: str) -> list[Check]:
    return check(subject) if "masks" in arm else []


def peak(arm: str, options: Options) -> tuple[int, int]:
    """(peak, before) bytes of one arm in a fresh process: once to warm up, then measured."""
    command = [sys.executable, "-m", "benchmarks.scoring", "--child", arm]
    for name in ("rows", "rank", "experts"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=harness.ROOT)
    result = json.loads(done.stdout.splitlines()[-1])
    return result["peak"], result["before"]


def child(options: Options) -> None:
    """What the fresh process does."""
    subject = smollm2(options.rows, options.rank, options.experts)
    with PeakMemory() as before:
        pass
    with PeakMemory() as memory:
        run_arm(subject, options.child or "")
    print(json.dumps({"peak": memory.bytes, "before": before.bytes, "kind": memory.kind}))


if __name__ == "__main__":
    main()
