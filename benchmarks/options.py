"""The command line of `benchmarks.latency` as one value, the scale's defaults filled in."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import harness, models
from benchmarks.arms import TARGETS, Setting
from benchmarks.models import Subject

T = TypeVar("T")
TABLES = ("4", "5", "op", "all")
WHAT = ("prefill", "decode")
SETS = ("all", "selected")
SIZES = ("models", "batch", "prefill", "tokens", "answer_tokens", "shapes")
# What is timed where nothing else is asked for. Full is the paper's: batch 16, prompts up to 1,024.
SCALES: dict[str, dict[str, Any]] = {
    "full": {
        "models": ("llama-7b", "smollm2"), "batch": 16, "prefill": (128, 1024), "tokens": 1024,
        "answer_tokens": 64, "shapes": ((4096, 4096, 16384), (4096, 11008, 16384)), "rounds": 20,
    },
    "reduced": {
        "models": ("smollm2", "llama-2048"), "batch": 2, "prefill": (128,), "tokens": 128,
        "answer_tokens": 16, "shapes": ((2048, 2048, 256), (576, 1536, 512)), "rounds": 7,
    },
    "tiny": {
        "models": ("tiny",), "batch": 2, "prefill": (8,), "tokens": 8,
        "answer_tokens": 3, "shapes": ((32, 48, 16),), "rounds": 2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to time and how; sizes as in ``SCALES``."""

    table: str
    device: torch.device
    clock_name: str
    clock: Any
    dtype: str
    adapter_dtype: str
    scale: str
    rounds: int
    models: tuple[str, ...]
    batch: int
    questions: int | None
    prefill: tuple[int, ...]
    tokens: int
    answer_tokens: int
    shapes: tuple[tuple[int, ...], ...]
    what: tuple[str, ...]
    ranks: tuple[int, ...]
    experts: tuple[int, ...]
    dropouts: tuple[float, ...]
    checkpointing: tuple[bool, ...]
    layers: list[int] | None
    counts: tuple[int, ...] | None
    sets: tuple[str, ...]
    targets: tuple[str, ...]
    only: tuple[str, ...] | None
    compile: bool
    attention: str
    inputs: Path
    with_search: Path | None
    json: str | None
    plot: str | None

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def settings(self, dropouts: Sequence[float]) -> list[Setting]:
        """Every combination of rank, experts and dropout."""
        dtype: torch.dtype = getattr(torch, self.adapter_dtype)
        return [
            Setting(rank, experts, dropout, dtype, self.targets)
            for rank, experts, dropout in itertools.product(self.ranks, self.experts, dropouts)
        ]

    def chosen(self, ways: dict[str, T]) -> dict[str, T]:
        """Those that ``--only`` names, whole or by the first word; ValueError if there are none."""
        if self.only is None:
            return ways
        found = {n: w for n, w in ways.items() if n in self.only or n.split()[0] in self.only}
        if not found:
            raise ValueError(f"--only must name some of {sorted(ways)}, got {list(self.only)}")
        return found

    def case(self, subject: Subject | None, setting: Setting) -> dict[str, Any]:
        """The fields that every record has."""
        return {
            "model": None if subject is None else subject.name,
            "device": self.device.type,
            "clock": self.clock_name,
            "dtype": self.dtype,
            "adapter_dtype": self.adapter_dtype,
            "attention": None if subject is None else self.attention,
            "rank": setting.rank,
            "experts": setting.experts,
            "dropout": setting.dropout,
            "targets": None if subject is None else list(setting.targets),
            "scale": self.scale,
        }


def parse(arguments: list[str] | None, description: str | None) -> Options:
    """Options from the command line; exits with usage for one that cannot be."""
    parser = _parser(description)
    given = parser.parse_args(arguments)
    if given.plot and not given.json:
        parser.error("--plot draws from the JSON file, so it needs --json FILE too")
    scale = given.scale or ("full" if given.device == "cuda" else "reduced")
    own = [name for name in SIZES if getattr(given, name) is not None]
    sizes = {n: getattr(given, n) if n in own else SCALES[scale][n] for n in SIZES}
    if not 1 <= sizes["answer_tokens"] < sizes["tokens"]:
        parser.error(
            f"--answer-tokens must be in [1, tokens - 1] = [1, {sizes['tokens'] - 1}], "
            f"got {sizes['answer_tokens']}"
        )
    device, clock = harness.prepare(given)
    return Options(
        table=given.table,
        device=device,
        clock_name=given.clock,
        clock=clock,
        dtype=given.dtype,
        adapter_dtype=given.adapter_dtype or given.dtype,
        # "full" is said of the full sizes on a GPU alone, so that nobody quotes anything else as it
        scale="reduced" if scale == "full" and (own or given.device != "cuda") else scale,
        rounds=given.rounds or SCALES[scale]["rounds"],
        **sizes,
        questions=given.questions,
        what=given.what,
        ranks=given.rank,
        experts=given.experts,
        dropouts=given.dropout,
        checkpointing={"off": (False,), "on": (True,), "both": (False, True)}[given.checkpointing],
        layers=None if given.layers is None else sorted(set(given.layers)),
        counts=None if given.counts is None else tuple(sorted(set(given.counts))),
        sets=given.sets,
        targets=given.targets,
        only=given.only,
        compile=given.compile,
        attention=given.attention,
        inputs=given.inputs,
        with_search=given.with_search,
        json=given.json,
        plot=given.plot,
    )


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=description)
    parser.add_argument("--table", choices=TABLES, required=True)
    harness.add_options(parser)
    parser.set_defaults(rounds=None)
    add = parser.add_argument
    add("--scale", choices=SCALES, help="default: full on cuda, reduced on cpu")
    add("--models", type=_list(_model), help=",".join(models.NAMES))
    add("--batch", type=_count)
    add("--prefill", type=_list(_count), help="prompt lengths of table 4, T,T,...")
    add("--tokens", type=_count, help="row length of table 5")
    add("--answer-tokens", type=_count, help="last tokens of a row that its loss is on")
    add("--questions", type=_count, help="prompts in a pass of table 4; default: one batch")
    add("--what", type=_list(_what), default=WHAT, help="of table 4: prefill,decode")
    add("--shapes", type=_list(_shape), help="of table op: KxNxT,...")
    add("--rank", type=_list(_count), default=(8,), help="r,r,...")
    add("--experts", type=_list(_count), default=(4,), help="M,M,...")
    add("--dropout", type=_list(float), default=(0.0, 0.05), help="of tables 5 and op, p,p,...")
    add("--checkpointing", choices=("off", "on", "both"), default="off", help="of gradients")
    add("--layers", type=_list(int), help="table 5's selected layers; default: n/4, spread")
    add("--counts", type=_list(_count), help="table 4's numbers of adapted layers; "
        "default: n/8, n/4, n/2, n")  # fmt: skip
    add("--sets", type=_list(_set), default=SETS, help="table 5's sets of layers: all,selected")
    add("--targets", type=_list(str), default=TARGETS, help="projections that get an adapter")
    add("--only", type=_list(str), help="floe,peft,'peft r=8',eager,hydra,compiled")
    add("--compile", action="store_true", help="also torch.compile of eager")
    add("--attention", default="sdpa", help="transformers' attention implementation")
    add("--adapter-dtype", type=harness.dtype_name, choices=harness.DTYPES,
        help="default: as --dtype, for everybody")  # fmt: skip
    add("--inputs", type=Path, default=models.INPUTS, help="folder of SmolLM2 and the questions")
    add("--with-search", type=Path, metavar="RUN_DIR",
        help="table 5: add what a finished run spent on warm-up, search and scores")  # fmt: skip
    add("--plot", metavar="FILE", help="draw the JSON file (needs --json)")
    return parser


def _list(kind: Any) -> Any:
    def values(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(","))

    return values


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a size must be a whole number >= 1, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(_count(part) for part in text.split("x"))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"a shape must be KxNxT, got {text!r}")
    return sizes


def _model(text: str) -> str:
    return _one_of("a model", text, models.NAMES)


def _what(text: str) -> str:
    return _one_of("what is timed", text, WHAT)


def _set(text: str) -> str:
    return _one_of("a set of layers", text, SETS)


def _one_of(what: str, text: str, known: Sequence[str]) -> str:
    if text not in known:
        raise argparse.ArgumentTypeError(f"{what} must be one of {', '.join(known)}, got {text!r}")
    return text
