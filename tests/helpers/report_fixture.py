"""A complete run folder for the report's tests: synthetic numbers in the real formats."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from floe.importance.scores import Scores
from floe.selection.select import Selection, select

LAYERS, HEADS, NEURONS, TOP = 30, 9, 384, 8
TASKS = (
    "boolq",
    "copa",
    "<script>alert('task')</script>",
    'quote "and" & ampersand',
    "piqa",
    "rte",
    "$x_1$ math",
)
MODEL = "HuggingFaceTB/SmolLM2-135M"
LOST = "40 rows dropped (25 without a completion, 15 too long for max_length)"
PARTS = {
    "data.train": {"summary": f"45 of 85 rows kept; {LOST}", "lost": LOST},
    "data.test": {"summary": "12 of 12 rows kept", "lost": ""},
}
STAGES = {
    "search": 1412.5,
    "score": 96.2,
    "select": 0.4,
    "train/main": 305.1,
    "train/all": 402.0,
    "profile": 61.0,
    "eval": 214.7,
}


def write_run(folder: Path, model: str = MODEL, layers: int = LAYERS) -> Path:
    """Writes every artifact of a run under ``folder`` and returns it."""
    random = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    settings = f"model:\n  name: {json.dumps(model)}\nselect:\n  policy: adapter_fisher\nseed: 41\n"
    (folder / "config.yaml").write_text(settings, encoding="utf-8")
    write_json(folder / "env.json", environment())
    write_json(folder / "data.json", {"parts": PARTS})
    scores = make_scores(random, model, layers)
    (folder / "score").mkdir(exist_ok=True)
    scores.save(folder / "score" / "scores.npz")
    selection = make_selection(random, scores)
    (folder / "select").mkdir(exist_ok=True)
    selection.save(folder / "select")
    write_json(folder / "search" / "result.json", make_search(random))
    for arm, policy, chosen in arms(selection, layers):
        metrics = make_training(random, arm, policy, chosen)
        write_json(folder / "train" / arm / "metrics.json", metrics)
    write_json(folder / "eval" / "results.json", make_results(random))
    write_json(folder / "eval" / "router.json", make_router(random, list(selection.layers)))
    write_json(folder / "profile" / "profile.json", make_profile(random, layers))
    for stage, seconds in STAGES.items():
        done = {"seconds": seconds, "finished": "2026-01-31T12:00:00Z"}
        write_json(folder / stage / "DONE.json", done)
    return folder


def write_json(path: Path, value: object) -> None:
    """Writes an artifact the way the pipeline does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")


def environment() -> dict[str, object]:
    versions = {
        "python": "3.11.2",
        "torch": "2.13.0+cpu",
        "triton": "3.9.0",
        "transformers": "5.23.0",
        "peft": "0.21.2",
        "optuna": "5.0.0",
        "floe": "0.1.0",
    }
    machine = {"platform": "Linux x86_64", "cpu": "a CPU", "threads": 2, "cuda": None, "gpu": None}
    return {**versions, **machine, "commit": "0123456789abcdef"}


def make_scores(random: np.random.Generator, model: str, layers: int) -> Scores:
    depth = np.linspace(0, 1, layers)
    level = np.exp(1.2 * np.cos(5 * depth) - 1.5 * depth)[:, None]
    neuron = 2e-7 * level[::-1] * random.lognormal(0, 2.0, (layers, NEURONS))
    neuron[3, :5] = 0
    shape = np.exp(1.5 * np.sin(9 * depth) + depth)
    taylor = (1.4 - depth)[:, None]
    return Scores(
        head_fisher=1e-4 * level * random.lognormal(0, 1.1, (layers, HEADS)),
        neuron_fisher=neuron,
        head_taylor=3.0 * random.lognormal(0, 0.4, (layers, HEADS)) * taylor,
        neuron_taylor=0.05 * random.lognormal(0, 0.6, (layers, NEURONS)) * taylor,
        adapter_fisher=1e-2 * shape * random.lognormal(0, 0.35, layers),
        meta={
            "model": model,
            "rows": 256,
            "tokens": 13812,
            "seed": 41,
            "reduction": "sample",
            "mask_scope": "base",
            "taylor_kind": "element",
            "taylor_aggregate": "abs_of_mean",
            "adapter_parameters": [148992] * layers,
        },
    )


def make_selection(random: np.random.Generator, scores: Scores) -> Selection:
    """The real selection, with a record of mask tuning put in."""
    chosen = select(scores, policy="adapter_fisher", preset="global", layers=TOP)
    return replace(chosen, tuned=True, tuning=make_tuning(random, scores.layer_count))


def make_tuning(random: np.random.Generator, layers: int) -> list[dict[str, object]]:
    entries = []
    for layer in range(layers):
        for component, scale in (("attention", 0.1), ("ffn", 0.6)):
            before = scale * random.uniform(0.2, 1)
            accepted = (layer, component) not in {(5, "attention"), (7, "ffn")}
            entries.append(
                {
                    "layer": layer,
                    "component": component,
                    "accepted": accepted,
                    "residual_before": before,
                    "residual_after": before * random.uniform(0.25, 0.8) if accepted else before,
                }
            )
    return entries


def make_search(random: np.random.Generator) -> dict[str, object]:
    trials: list[dict[str, Any]] = []
    for number in range(16):
        rank, experts = int(random.choice([2, 4, 8, 12, 16])), int(random.choice([2, 3, 4]))
        state = {3: "failed", 6: "pruned", 9: "repeat", 13: "pruned"}.get(number, "complete")
        value = 1.93 + 0.003 * abs(rank - 8) + 0.01 * (4 - experts) + random.normal(0, 0.008)
        value = None if state == "failed" else value + 0.08 * (state == "pruned")
        trial = {"number": number, "rank": rank, "num_experts": experts, "state": state}
        trials.append({**trial, "value": value, "seconds": float(random.uniform(60, 110))})
    best = min((t for t in trials if t["state"] == "complete"), key=lambda t: t["value"])
    return {
        "rank": best["rank"],
        "num_experts": best["num_experts"],
        "best_trial": best["number"],
        "objective": best["value"],
        "seconds": 1408.0,
        "trials": trials,
        "distinct": len({(t["rank"], t["num_experts"]) for t in trials}),
        "sampler": {"name": "tpe", "seed": 41, "multivariate": True, "startup_trials": 10},
    }


def arms(selection: Selection, layers: int) -> list[tuple[str, str, list[int]]]:
    spread = [round(k * (layers - 1) / (TOP - 1)) for k in range(TOP)]
    return [
        ("main", "adapter_fisher", list(selection.layers)),
        ("all", "all", list(range(layers))),
        ("masks", "masks", list(selection.paper.layers)),
        ("even", "even", spread),
        ("random-41", "random", list(range(1, TOP + 1))),
        ("random-42", "random", list(range(layers - TOP, layers))),
    ]


def make_training(
    random: np.random.Generator, arm: str, policy: str, layers: list[int]
) -> dict[str, object]:
    floors = {"main": 1.78, "all": 1.74, "masks": 1.86, "even": 1.79, "random-41": 1.80}
    floor = floors.get(arm, 1.82)
    steps, points = np.arange(2, 201, 2), np.arange(0, 201, 25)
    losses = floor - 0.15 + 2.1 * np.exp(-steps / 24) + random.normal(0, 0.11, len(steps))
    held_out = floor + 2.09 * np.exp(-points / 26) + random.normal(0, 0.004, len(points))
    seconds = 0.62 + 0.022 * len(layers) - 0.008 * min(layers)
    return {
        "arm": arm,
        "policy": policy,
        "layers": layers,
        "rank": 8,
        "num_experts": 4,
        "trainable_parameters": 148992 * len(layers),
        "steps": 200,
        "seconds": 200 * seconds,
        "seconds_per_step": seconds,
        "peak_memory_bytes": int(2.1e9 + 2.6e7 * len(layers)),
        "memory_kind": "resident set of the process",
        "train_loss": [[int(s), float(v)] for s, v in zip(steps, losses, strict=True)],
        "validation_loss": [[int(s), float(v)] for s, v in zip(points, held_out, strict=True)],
        "seed": 41,
    }


def make_results(random: np.random.Generator) -> dict[str, object]:
    levels = {
        "base": (3.61, 0.47),
        "main": (1.782, 0.634),
        "all": (1.741, 0.641),
        "masks": (1.863, 0.601),
        "even": (1.794, 0.628),
        "random-41": (1.801, 0.63),
        "random-42": (1.82, 0.622),
    }
    found = {}
    for arm, (loss, accuracy) in levels.items():
        tasks = {
            task: outcome(loss + random.normal(0, 0.15), accuracy + random.normal(0, 0.06), 56)
            for task in TASKS
        }
        gap = loss - levels["main"][0]
        paired = {
            "value": gap,
            "low": gap - 0.02 * (arm != "main"),
            "high": gap + 0.02 * (arm != "main"),
        }
        paired["rows"] = 392
        found[arm] = {**outcome(loss, accuracy, 392), "by_task": tasks, "loss_minus_main": paired}
    text = "95 %, loss by bootstrap over rows (2,000 draws), accuracy by Wilson's formula"
    return {"arms": found, "seed": 41, "intervals": text}


def outcome(loss: float, accuracy: float, rows: int) -> dict[str, Any]:
    """Loss with a bootstrap-like interval, accuracy with Wilson's 95 % interval."""
    half = 0.9 / math.sqrt(rows)
    correct = round(accuracy * rows)
    p, z = correct / rows, 1.959964
    center, scale = p + z * z / (2 * rows), 1 + z * z / rows
    wide = z * math.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows))
    low, high = (center - wide) / scale, (center + wide) / scale
    return {
        "loss": {
            "value": loss,
            "low": loss - half,
            "high": loss + 1.05 * half,
            "rows": rows,
            "tokens": 11 * rows,
        },
        "accuracy": {"value": p, "low": low, "high": high, "correct": correct, "rows": rows},
    }


def make_router(random: np.random.Generator, layers: list[int]) -> dict[str, object]:
    modules = []
    for layer in layers:
        for module in ("gate_proj", "up_proj", "down_proj"):
            usage = random.dirichlet([40.0] * 4)
            if (layer, module) == (layers[2], "down_proj"):
                usage = np.array([0.93, 0.03, 0.02, 0.02])
            load = float(-(usage * np.log(usage)).sum() / math.log(4))
            mutual = float(random.uniform(0.004, 0.09))
            modules.append(
                {
                    "layer": layer,
                    "module": module,
                    "usage": usage.tolist(),
                    "load_entropy": load,
                    "token_entropy": load - mutual,
                    "mutual_information": mutual,
                }
            )
    return {"modules": modules}


def make_profile(random: np.random.Generator, layers: int) -> dict[str, object]:
    points = []
    for k in sorted({1, *(round(layers * part / 5) for part in range(1, 6))}):
        seconds = 0.55 + 0.024 * k + random.normal(0, 0.01)
        points.append(
            {
                "layers": k,
                "seconds_per_step": seconds,
                "low": seconds * 0.95,
                "high": seconds * 1.08,
                "peak_memory_bytes": int(2.08e9 + 2.7e7 * k),
                "memory_kind": "resident set of the process",
            }
        )
    return {"points": points, "steps": 12, "batch_size": 8, "tokens_per_step": 431.5}
