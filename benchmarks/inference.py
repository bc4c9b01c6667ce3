"""Inference time against the number of adapted layers (the paper's Table 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import arms, cost
from benchmarks.arms import FROZEN, Arm, Setting
from benchmarks.cases import Bench, Row, adapt, describe_arms, slope
from benchmarks.gates import Gate
from benchmarks.harness import Candidate
from benchmarks.models import Subject
from benchmarks.options import Options
from floe.selection.policies.baselines import even_layers

FRACTIONS = (8, 4, 2, 1)  # of the layers: an eighth and so on
Run = Callable[[], object]


def measure(
    bench: Bench, subject: Subject, setting: Setting, options: Options
) -> tuple[list[Row], list[Row]]:
    """Rows of every prefill length and its decode step, and the slope of every way in them."""
    total = subject.model.config.num_hidden_layers
    counts = options.counts or sorted({max(1, total // part) for part in FRACTIONS})
    if max(counts) > total:
        raise ValueError(f"counts must be <= {total} for {subject.name}, got {list(counts)}")
    layer_sets = {f"{count} of {total}": even_layers(count, total) for count in counts}
    ways = options.chosen(arms.registry(setting.rank, setting.experts, bench.device,
                                        options.compile))  # fmt: skip
    found = adapt(subject, ways, layer_sets, setting)
    rows: list[Row] = []
    fits: list[Row] = []
    for length in options.prefill:
        tokens = subject.tokens(options.questions or options.batch, length)
        batches = list(tokens.split(options.batch))
        case = options.case(subject, setting) | {"batch": options.batch, "rows": len(tokens)}
        for what in options.what:
            if what == "prefill":
                here = case | {"what": what, "tokens": length}
                runs, gate = _prefills(found, batches), Gate(subject.model, batches[0], setting)
                calls = len(batches)
            else:
                here = case | {"what": what, "tokens": 1, "cache": length}
                runs = _decodes(found, subject, batches[0])
                # as many rows as a step has, in one sequence, or attention would see one key alone
                gate = Gate(subject.model, batches[0][:, :1].T, setting, backward=False)
                calls = 1
            made, fitted = _case(bench, here, found, runs, gate, calls)
            rows += made
            fits += fitted
    return rows, fits


def _case(
    bench: Bench, case: Row, found: Sequence[Arm], runs: dict[str, Run], gate: Gate, calls: int
) -> tuple[list[Row], list[Row]]:
    candidates = [
        Candidate(arm.name, runs[arm.name], lambda arm=arm: gate.checks(arm))  # type: ignore[misc]
        for arm in found
    ]
    rows, seconds = bench.time(case, candidates, calls=calls)
    describe_arms(rows, found, seconds)
    for row, arm in zip(rows, found, strict=True):
        row |= costs(runs[arm.name], arm, bench.device)
    return rows, [
        {"case": {**case, "way": way}, "milliseconds_per_layer": fitted}
        for way, fitted in _slopes(found, seconds).items()
    ]


def costs(run: Run, arm: Arm, device: torch.device) -> Row:
    """Launches and peak memory of one run; a compiled arm's launches are known on CUDA alone."""
    count, kind = (None, "not counted")
    if arm.way != "compiled" or device.type == "cuda":
        count, kind = cost.launches(run, device)
    memory, memory_kind = cost.peak_bytes(run, device)
    return {
        "launches": count, "launches_kind": kind,
        "peak_bytes": memory, "peak_kind": memory_kind,
    }  # fmt: skip


def _slopes(found: Sequence[Arm], seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Each way's line through its own times and the frozen model's."""
    ways = dict.fromkeys(arm.way for arm in found if arm.way != FROZEN)
    lines = {way: [arm for arm in found if arm.way in (way, FROZEN)] for way in ways}
    return {
        way: slope([len(arm.layers) for arm in line], [seconds[arm.name] for arm in line])
        for way, line in lines.items()
    }


def _prefills(found: Sequence[Arm], batches: Sequence[Tensor]) -> dict[str, Run]:
    """The whole prompts, their keys and values kept, the last position's logits made."""
    last = torch.tensor([batches[0].shape[1] - 1], device=batches[0].device)

    def run(model: Any) -> None:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch, use_cache=True, logits_to_keep=last)

    return {arm.name: lambda model=arm.model: run(model) for arm in found}  # type: ignore[misc]


def _decodes(found: Sequence[Arm], subject: Subject, tokens: Tensor) -> dict[str, Run]:
    """One more token for every row, after the frozen model's keys and values of ``tokens``.

    All arms share them: what they hold does not change the time, and a model has much of it.
    """
    with torch.no_grad():
        cache = subject.model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    next_token = tokens[:, -1:]

    def run(model: Any) -> None:
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        with torch.no_grad():
            model(input_ids=next_token, past_key_values=cache, use_cache=True)

    return {arm.name: lambda model=arm.model: run(model) for arm in found}  # type: ignore[misc]
