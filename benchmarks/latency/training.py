"""Time and memory of a training step, all layers adapted or some (the paper's Table 5)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import cost, harness
from benchmarks.harness import SPREAD, Bench, Candidate, Check, Row, Seconds
from benchmarks.implementations import Adapter
from benchmarks.latency import adapted_models
from benchmarks.latency.adapted_models import FROZEN, AdaptedModel
from benchmarks.latency.block_check import BlockCheck
from benchmarks.latency.inference import WARMUP
from benchmarks.latency.options import CHECKPOINTING, Options
from benchmarks.models import Subject
from floe.decoder_blocks import base_of
from floe.pipeline.run_folder import RunFolder
from floe.selection.policies.baselines import even_layers
from floe.storage import read_json

PHASES = ("forward", "backward", "optimiser")
SELECTED = 4  # the share of the layers that is selected: one in four
RATE = 1e-6  # small: weights that run away would change what is timed
STAGES = ("search", "score", "select", "train/main")


class Step:
    """One training step of a model on ``tokens`` [B, T]; the loss is on the last ``answer`` tokens.

    The frozen model has nothing to train: its backward goes to the embeddings, as the longest of
    the others does. ``laps`` holds the seconds of each phase, one entry per run.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        tokens: Tensor,
        answer: int,
        clock: Callable[[], float],
        checkpointing: bool,
    ) -> None:
        self.adapted, self.tokens, self.clock = adapted, tokens, clock
        length, trained = tokens.shape[1], adapted.parameters
        self.positions = torch.arange(length - 1 - answer, length - 1, device=tokens.device)
        self.labels = tokens[:, -answer:].flatten()
        self.optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0) if trained else None
        self.laps: list[tuple[float, ...]] = []
        base: Any = base_of(adapted.model)
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
        how = {"use_cache": False, "logits_to_keep": self.positions}
        logits = self.adapted.model(**inputs, **how).logits
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
        harness.wait(self.tokens.device)
        return self.clock()


def measure(
    bench: Bench, subject: Subject, adapter: Adapter, options: Options
) -> tuple[list[Row], list[Row]]:
    """Rows with and without gradient checkpointing, and each way's gain from fewer layers."""
    layer_sets = _layer_sets(subject, options)
    tokens = subject.tokens(options.batch, options.tokens)
    check, rows, gains = BlockCheck(subject.model, tokens, adapter), [], []
    for checkpointing in CHECKPOINTING[options.checkpointing]:
        models = adapted_models.build_all(subject.model, options.ways(adapter), layer_sets, adapter)
        case = {
            **options.record(subject, adapter),
            "what": "training step",
            "batch": options.batch,
            "tokens": options.tokens,
            "answer_tokens": options.answer_tokens,
            "gradient_checkpointing": checkpointing,
        }
        how = (tokens, options.answer_tokens, bench.clock, checkpointing)
        steps = [Step(model, *how) for model in models]
        candidates = [
            Candidate(step.adapted.name, step, partial(_checks, step, check)) for step in steps
        ]
        warmup = WARMUP[bench.device.type]
        timed, seconds = bench.time(case, candidates, warmup=warmup, cold=False)
        adapted_models.describe(timed, models, seconds)
        for row, step in zip(timed, steps, strict=True):
            row |= _phases(step, bench.rounds, tokens.numel()) | _memory(step, bench.device)
        rows += timed
        gains += _gains(case, models, seconds)
    return rows, gains


def _layer_sets(subject: Subject, options: Options) -> dict[str, Sequence[int]]:
    total = subject.model.config.num_hidden_layers
    selected = sorted(set(options.layers or even_layers(max(1, total // SELECTED), total)))
    if min(selected) < 0 or max(selected) >= total:
        raise ValueError(f"layers must be in [0, {total - 1}] for {subject.name}, got {selected}")
    sets = {"all": range(total), "selected": selected}
    return {_label(sets[name], total): sets[name] for name in options.sets}


def _label(layers: Sequence[int], total: int) -> str:
    return f"all {total}" if len(layers) == total else f"{len(layers)} of {total}"


def _checks(step: Step, check: BlockCheck) -> Sequence[Check]:
    """Without dropout, of which every way draws its own."""
    step.adapted.model.eval()
    checks = check.checks(step.adapted)
    step.adapted.model.train()
    return checks


def _phases(step: Step, rounds: int, tokens: int) -> Row:
    laps = step.laps[-rounds:]  # without the warm-up's
    per_second = harness.summary(tokens / sum(lap) for lap in laps)
    phases = zip(PHASES, zip(*laps, strict=True), strict=True)
    return {
        "phases_ms": {phase: harness.milliseconds(seconds) for phase, seconds in phases},
        "tokens_per_second": {key: per_second[key] for key in (*SPREAD, "n")},
    }


def _memory(step: Step, device: torch.device) -> Row:
    weights = (*step.adapted.model.parameters(), *step.adapted.model.buffers())
    costs = cost.costs(step, device, step.adapted.way == "compiled")
    return costs | {"saved_bytes": cost.saved_bytes(step.loss, weights)}


def _gains(case: Row, models: Sequence[AdaptedModel], seconds: Seconds) -> list[Row]:
    """Each way's step on the selected layers over its own on all layers, round by round."""
    pairs: dict[str, list[AdaptedModel]] = {}
    for model in models:
        if model.way != FROZEN:
            pairs.setdefault(model.way, []).append(model)
    rows = []
    for way, pair in pairs.items():
        if len(pair) == 2:
            full, less = (seconds[model.name] for model in pair)
            saved = harness.milliseconds(a - b for a, b in zip(full, less, strict=True))
            rows.append(
                {
                    "case": {**case, "way": way, "layers": list(pair[1].layers)},
                    "selected_over_full": harness.ratios(less, full),
                    "milliseconds_saved": saved["median"],
                }
            )
    return rows


def preparation(folder: Path) -> Row:
    """Seconds a finished run spent before its final training, which the paper's totals leave out.

    From the run's own ``DONE.json`` files: search (or, of no trials, the warm-up), score, select;
    beside them the final training and, where the run has it, that of all layers.
    """
    run, seconds = RunFolder(folder), {}
    for stage in (*STAGES, "train/all"):
        done = run.done(stage)
        if done is not None:
            seconds[stage] = done.seconds
        elif stage in STAGES:
            raise ValueError(f"run folder must hold the finished stage {stage!r}, got {folder}")
    return {
        "run": folder.name,
        "trials": len(read_json(folder / "search" / "result.json")["trials"]),
        "seconds": seconds,
        "before_training": sum(seconds[stage] for stage in STAGES[:3]),
        "read": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
