"""Inference time against the number of adapted layers (the paper's Table 4)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import cost, harness
from benchmarks.harness import Bench, Candidate, Row, Seconds
from benchmarks.implementations import Adapter
from benchmarks.latency import adapted_models
from benchmarks.latency.adapted_models import FROZEN, AdaptedModel
from benchmarks.latency.block_check import BlockCheck
from benchmarks.latency.options import Options
from benchmarks.models import Subject
from floe.selection.policies.baselines import even_layers

FRACTIONS = (8, 4, 2, 1)  # of the layers: an eighth and so on
WARMUP = {"cpu": 2, "cuda": 25}  # calls that are not timed
Runs = dict[str, Callable[[], object]]


def measure(
    bench: Bench, subject: Subject, adapter: Adapter, options: Options
) -> tuple[list[Row], list[Row]]:
    """Rows of every prefill length and its decode step, and the slope of every way in them."""
    total = subject.model.config.num_hidden_layers
    counts = sorted(set(options.counts or (max(1, total // part) for part in FRACTIONS)))
    if max(counts) > total:
        raise ValueError(f"counts must be <= {total} for {subject.name}, got {counts}")
    layer_sets = {f"{count} of {total}": even_layers(count, total) for count in counts}
    models = adapted_models.build_all(subject.model, options.ways(adapter), layer_sets, adapter)
    rows: list[Row] = []
    fits: list[Row] = []
    for length, what in itertools.product(options.prefill, options.what):
        tokens = subject.tokens(options.questions or options.batch, length)
        batches = tokens.split(options.batch)
        case = options.record(subject, adapter) | {"batch": options.batch, "rows": len(tokens)}
        if what == "prefill":
            case |= {"what": what, "tokens": length}
            runs, calls = _prefills(models, batches), len(batches)
            check = BlockCheck(subject.model, batches[0], adapter)
        else:
            case |= {"what": what, "tokens": 1, "cache": length}
            runs, calls = _decodes(models, subject, batches[0]), 1
            # as many rows as a step has, in one sequence, or attention would see one key alone
            check = BlockCheck(subject.model, batches[0][:, :1].T, adapter, backward=False)
        candidates = [Candidate(m.name, runs[m.name], partial(check.checks, m)) for m in models]
        how = {"warmup": WARMUP[bench.device.type], "cold": False}
        timed, seconds = bench.time(case, candidates, calls=calls, **how)
        adapted_models.describe(timed, models, seconds)
        for row, model in zip(timed, models, strict=True):
            row |= cost.costs(runs[model.name], bench.device, model.way == "compiled")
        rows += timed
        fits += [
            {"case": {**case, "way": way}, "milliseconds_per_layer": line}
            for way, line in _slopes(models, seconds).items()
        ]
    return rows, fits


def _slopes(models: Sequence[AdaptedModel], seconds: Seconds) -> dict[str, dict[str, float]]:
    """Each way's line through its own times and the frozen model's."""
    ways = dict.fromkeys(model.way for model in models if model.way != FROZEN)
    lines = {way: [model for model in models if model.way in (way, FROZEN)] for way in ways}
    return {
        way: harness.slope([len(m.layers) for m in line], [seconds[m.name] for m in line])
        for way, line in lines.items()
    }


def _prefills(models: Sequence[AdaptedModel], batches: Sequence[Tensor]) -> Runs:
    """The whole prompts, their keys and values kept, the last position's logits made."""
    last = torch.tensor([batches[0].shape[1] - 1], device=batches[0].device)

    def run(model: Any) -> None:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch, use_cache=True, logits_to_keep=last)

    return {adapted.name: partial(run, adapted.model) for adapted in models}


def _decodes(models: Sequence[AdaptedModel], subject: Subject, tokens: Tensor) -> Runs:
    """One more token for every row, after the frozen model's keys and values of ``tokens``.

    All models share them: what they hold does not change the time, and a model has much of it.
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

    return {adapted.name: partial(run, adapted.model) for adapted in models}
