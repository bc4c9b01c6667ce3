"""Time and memory of a training step, all layers adapted or some (the paper's Table 5)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import arms, cost, harness
from benchmarks.arms import FROZEN, Arm, Setting
from benchmarks.cases import Bench, Row, adapt, describe_arms
from benchmarks.gates import Gate
from benchmarks.harness import Candidate
from benchmarks.inference import costs
from benchmarks.models import Subject
from benchmarks.options import Options
from floe.decoder_blocks import base_of
from floe.pipeline.run_folder import RunFolder
from floe.selection.policies.baselines import even_layers
from floe.storage import read_json

PHASES = ("forward", "backward", "optimiser")
SELECTED = 4  # the share of the layers that is selected: one in four
RATE = 1e-6  # small: weights that run away would change what is timed
STAGES = ("search", "score", "select", "train/main")


class Step:
    """One training step of an arm on ``tokens`` [B, T]; the loss is on the last ``answer`` tokens.

    The frozen model has nothing to train: its backward goes to the embeddings, as the longest of
    the others does. ``laps`` holds the seconds of each phase, one entry per run.
    """

    def __init__(
        self, arm: Arm, tokens: Tensor, answer: int, clock: Callable[[], float], checkpointing: bool
    ) -> None:
        self.arm, self.tokens, self.clock = arm, tokens, clock
        length = tokens.shape[1]
        self.positions = torch.arange(length - 1 - answer, length - 1, device=tokens.device)
        self.labels = tokens[:, -answer:].flatten()
        self.optimiser = (
            torch.optim.AdamW(arm.parameters, lr=RATE, weight_decay=0.0) if arm.parameters else None
        )
        self.laps: list[tuple[float, ...]] = []
        base: Any = base_of(arm.model)
        self.embed = base.get_input_embeddings()
        if checkpointing:
            # the second is the older name of the first
            enable = getattr(base, "activation_checkpointing_enable", None)
            (enable or base.gradient_checkpointing_enable)({"use_reentrant": False})

    def loss(self) -> Tensor:
        """Mean negative log-likelihood of the answer tokens, in float32."""
        inputs: dict[str, Tensor] = {"input_ids": self.tokens}
        if self.optimiser is None:
            inputs = {"inputs_embeds": self.embed(self.tokens).detach().requires_grad_()}
        logits = self.arm.model(**inputs, use_cache=False, logits_to_keep=self.positions).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), self.labels)

    def __call__(self) -> None:
        """Run the step and note its laps."""
        marks = [self._now()]
        loss = self.loss()
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad()
        marks.append(self._now())
        self.laps.append(tuple(b - a for a, b in itertools.pairwise(marks)))

    def _now(self) -> float:
        if self.tokens.device.type == "cuda":
            torch.cuda.synchronize(self.tokens.device)
        return self.clock()


def measure(
    bench: Bench, subject: Subject, setting: Setting, options: Options
) -> tuple[list[Row], list[Row]]:
    """Rows with and without gradient checkpointing, and each way's gain from fewer layers."""
    total = subject.model.config.num_hidden_layers
    selected = options.layers or even_layers(max(1, total // SELECTED), total)
    if min(selected) < 0 or max(selected) >= total:
        raise ValueError(f"layers must be in [0, {total - 1}] for {subject.name}, got {selected}")
    sets = {"all": range(total), "selected": selected}
    layer_sets = {_label(sets[name], total): sets[name] for name in options.sets}
    ways = options.chosen(arms.registry(setting.rank, setting.experts, bench.device,
                                        options.compile))  # fmt: skip
    tokens = subject.tokens(options.batch, options.tokens)
    gate, rows, gains = Gate(subject.model, tokens, setting), [], []
    for checkpointing in options.checkpointing:
        found = adapt(subject, ways, layer_sets, setting)
        case = options.case(subject, setting) | {
            "what": "training step", "batch": options.batch, "tokens": options.tokens,
            "answer_tokens": options.answer_tokens, "gradient_checkpointing": checkpointing,
        }  # fmt: skip
        steps = [
            Step(arm, tokens, options.answer_tokens, bench.clock, checkpointing) for arm in found
        ]
        made, seconds = bench.time(case, [_candidate(step, gate) for step in steps])
        describe_arms(made, found, seconds)
        for row, step in zip(made, steps, strict=True):
            row |= _phases(step, bench, tokens.numel()) | _memory(step, bench)
        rows += made
        gains += _gains(case, found, seconds)
    return rows, gains


def _label(layers: Sequence[int], total: int) -> str:
    return f"all {total}" if len(layers) == total else f"{len(layers)} of {total}"


def _candidate(step: Step, gate: Gate) -> Candidate:
    def checks() -> Sequence[harness.Check]:
        step.arm.model.eval()  # without dropout, of which every arm draws its own
        found = gate.checks(step.arm)
        step.arm.model.train()
        return found

    return Candidate(step.arm.name, step, checks)


def _phases(step: Step, bench: Bench, tokens: int) -> Row:
    laps = step.laps[-bench.rounds :]  # without the warm-up's
    per_second = harness.summary([tokens / sum(lap) for lap in laps])
    return {
        "phases_ms": {
            phase: harness.summary([1e3 * lap[i] for lap in laps]) for i, phase in enumerate(PHASES)
        },
        "tokens_per_second": {key: per_second[key] for key in ("median", "p20", "p80", "n")},
    }


def _memory(step: Step, bench: Bench) -> Row:
    weights = (*step.arm.model.parameters(), *step.arm.model.buffers())
    found = costs(step, step.arm, bench.device)
    return found | {"saved_bytes": cost.saved_bytes(step.loss, weights)}


def _gains(case: Row, found: Sequence[Arm], seconds: dict[str, list[float]]) -> list[Row]:
    """Each way's step on the selected layers over its own on all layers, round by round."""
    pairs: dict[str, list[Arm]] = {}
    for arm in found:
        if arm.way != FROZEN:
            pairs.setdefault(arm.way, []).append(arm)
    return [
        _gain({**case, "way": way}, pair[1], seconds[pair[0].name], seconds[pair[1].name])
        for way, pair in pairs.items()
        if len(pair) == 2
    ]


def _gain(case: Row, fewer: Arm, full: Sequence[float], less: Sequence[float]) -> Row:
    saved = harness.summary([1e3 * (a - b) for a, b in zip(full, less, strict=True)])
    return {
        "case": {**case, "layers": list(fewer.layers)},
        "selected_over_full": harness.ratios(less, full),
        "milliseconds_saved": saved["median"],
    }


def preparation(folder: Path) -> Row:
    """Seconds a finished run spent before its final training, which the paper's totals leave out.

    From the run's own ``DONE.json`` files: search (or, of no trials, the warm-up), score, select;
    beside them the final training and, where the run has it, that of all layers.

    Raises:
        ValueError: a stage is not finished in this folder.
        FileError: one of its files is damaged.
    """
    run, seconds = RunFolder(folder), {}
    for stage in STAGES:
        done = run.done(stage)
        if done is None:
            raise ValueError(f"run folder must hold the finished stage {stage!r}, got {folder}")
        seconds[stage] = float(done["seconds"])
    everything = run.done("train/all")
    if everything is not None:
        seconds["train/all"] = float(everything["seconds"])
    result = read_json(folder / "search" / "result.json")
    return {
        "run": folder.name,
        "trials": len(result["trials"]),
        "seconds": seconds,
        "before_training": sum(seconds[stage] for stage in STAGES[:3]),
        "read": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
