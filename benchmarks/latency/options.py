"""The command line of `benchmarks.latency`, the scale's sizes filled in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.implementations import TARGETS, Adapter
from benchmarks.latency.adapted_models import Way, registry
from benchmarks.models import INPUTS, NAMES, Subject
from benchmarks.settings import Command, count, one_of, option, several, shape

WHAT = ("prefill", "decode")
SETS = ("all", "selected")
CHECKPOINTING = {"off": (False,), "on": (True,), "both": (False, True)}
# What is timed where nothing else is asked for. The paper's are the inference batch of 16 in full,
# and rows of at most 1,024 tokens in training, where it takes one row at a time; how long its
# prompts are it does not say.
_SIZES = ("models", "batch", "prefill", "tokens", "answer_tokens", "shapes", "rounds")
_SHAPES = {
    "full": ((4096, 4096, 16384), (4096, 11008, 16384)),
    "reduced": ((2048, 2048, 256), (576, 1536, 512)),
}
_SCALES: dict[str, tuple[Any, ...]] = {
    "full": (("llama-7b", "smollm2"), 16, (128, 1024), 1024, 64, _SHAPES["full"], 20),
    "reduced": (("smollm2", "llama-2048"), 2, (128,), 128, 16, _SHAPES["reduced"], 7),
    "tiny": (("tiny",), 2, (8,), 8, 3, ((32, 48, 16),), 2),
}
SCALES = {name: dict(zip(_SIZES, sizes, strict=True)) for name, sizes in _SCALES.items()}


@dataclass(frozen=True, kw_only=True)
class Options(harness.Timing):
    """What to time and how."""

    table: str = option(choices=("4", "5", "op", "all"))
    rounds: int = option(None, kind=int)
    scale: str = option(None, "default: full on cuda, reduced on cpu", choices=SCALES)
    models: tuple[str, ...] = option(None, ",".join(NAMES), several(one_of(NAMES)))
    batch: int = option(None, kind=count)
    prefill: tuple[int, ...] = option(None, "prompt lengths of table 4, T,T,...", several(count))
    tokens: int = option(None, "row length of table 5", count)
    answer_tokens: int = option(None, "last tokens of a row that its loss is on", count)
    questions: int | None = option(None, "prompts in a pass of table 4; default: one batch", count)
    shapes: tuple[tuple[int, ...], ...] = option(
        None, "of table op: KxNxT,...", several(shape("KxNxT"))
    )
    what: tuple[str, ...] = option(WHAT, "of table 4: prefill,decode", several(one_of(WHAT)))
    rank: tuple[int, ...] = option((8,), "r,r,...", several(count))
    experts: tuple[int, ...] = option((4,), "M,M,...", several(count))
    dropout: tuple[float, ...] = option((0.0, 0.05), "of tables 5 and op, p,p,...", several(float))
    checkpointing: str = option("off", "of gradients", choices=CHECKPOINTING)
    layers: tuple[int, ...] | None = option(None, "table 5's; default: n/4, spread", several(int))
    counts: tuple[int, ...] | None = option(
        None, "of table 4's adapted layers; default: n/8, n/4, n/2, n", several(count)
    )
    sets: tuple[str, ...] = option(SETS, "of table 5's layers", several(one_of(SETS)))
    targets: tuple[str, ...] = option(TARGETS, "projections that get an adapter", several())
    only: tuple[str, ...] = option((), "floe,peft,'peft r=8',eager,hydra,compiled", several())
    compile: bool = option(False, "also torch.compile of eager")
    attention: str = option("sdpa", "transformers' attention implementation")
    adapter_dtype: str = option(
        None, "default: as --dtype, for everybody", harness.dtype_name, choices=harness.DTYPES
    )
    inputs: Path = option(INPUTS, "folder of SmolLM2 and the questions", Path)
    with_search: Path | None = option(
        None, "a run; adds what it spent before its training", Path, metavar="RUN_DIR"
    )
    plot: Path | None = option(None, "draw the JSON file (needs --json)", Path, metavar="FILE")

    def adapters(self, dropouts: Sequence[float]) -> list[Adapter]:
        """Every combination of rank, experts and dropout."""
        dtype = getattr(torch, self.adapter_dtype)
        return [
            Adapter(*sizes, dtype, self.targets)
            for sizes in itertools.product(self.rank, self.experts, dropouts)
        ]

    def ways(self, adapter: Adapter) -> dict[str, Way]:
        """Those that are timed on a whole model."""
        device = torch.device(self.device)
        return self.chosen(registry(adapter.rank, adapter.experts, device, self.compile))

    def chosen(self, ways: dict[str, Any]) -> dict[str, Any]:
        """Those that ``--only`` names, whole or by the first word; ValueError if there are none."""
        if not self.only:
            return ways
        named = {n: w for n, w in ways.items() if n in self.only or n.split()[0] in self.only}
        if not named:
            raise ValueError(f"--only must name some of {sorted(ways)}, got {list(self.only)}")
        return named

    def record(self, subject: Subject, adapter: Adapter) -> Row:
        """The fields that the case of every record has."""
        return {
            **self.case(),
            **{k: getattr(adapter, k) for k in ("rank", "experts", "dropout")},
            **{k: getattr(self, k) for k in ("adapter_dtype", "attention", "scale")},
            "model": subject.name,
            "targets": list(adapter.targets),
        }


DESCRIPTION = """\
The paper's latency tables: inference (4), training (5), and one linear (op).

Every peer runs in this one process, in turn, in a new order every round, after whole blocks of it
were compared with float64. --device cpu measures at a reduced scale and says so."""
COMMAND = Command("latency", DESCRIPTION, Options)


def parse(arguments: list[str] | None) -> Options:
    """Options from the command line; exits with usage for what cannot be."""
    options: Options = COMMAND.parse(arguments)
    with COMMAND.refusing():
        return _filled(options)


def _filled(options: Options) -> Options:
    if options.plot and not options.json:
        raise ValueError("--plot draws from the JSON file, so it needs --json FILE too")
    scale = options.scale or ("full" if options.device == "cuda" else "reduced")
    missing = {n: v for n, v in SCALES[scale].items() if getattr(options, n) is None}
    # "full" is said of the full sizes on a GPU alone, so that nobody quotes anything else as it
    as_it_is = {*SCALES[scale]} - {"rounds"} <= {*missing} and options.device == "cuda"
    scale = "reduced" if scale == "full" and not as_it_is else scale
    dtype = options.adapter_dtype or options.dtype
    options = replace(options, **missing, scale=scale, adapter_dtype=dtype)
    if options.answer_tokens >= options.tokens:
        raise ValueError(
            f"--answer-tokens must be in [1, tokens - 1] = [1, {options.tokens - 1}], "
            f"got {options.answer_tokens}"
        )
    return options
