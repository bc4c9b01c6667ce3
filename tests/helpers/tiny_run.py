"""A run small enough for tests: a tiny model folder, a few rows of real shape, a configuration."""

import json
import random

import yaml

from helpers.tiny import tiny_model, tiny_tokenizer

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "inlet", "jetty"]
WORDS += ["knoll", "larch"]


def write_rows(path, count, seed):
    """Copy questions with four choices, in two tasks."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        choices = draw.sample(WORDS, 4)
        answer = draw.randrange(4)
        rows.append(
            {
                "prompt": f"{' '.join(draw.sample(WORDS, 2))} {choices[answer]}? ",
                "completion": choices[answer],
                "choices": choices,
                "answer": answer,
                "task": ("first", "second")[index % 2],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_inputs(folder, layers=4):
    """Model, tokenizer and data in ``folder``; returns a configuration that uses them."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(layers=layers).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, count in (("train", 48), ("validation", 8), ("test", 12)):
        write_rows(folder / f"{name}.jsonl", count, name)
    columns = {n: n for n in ("prompt", "completion", "choices", "answer", "task")}
    return {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "model": {"path": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "data": {
            **{n: {"path": str(folder / f"{n}.jsonl")} for n in ("train", "validation", "test")},
            "columns": columns,
            "max_length": 64,
        },
        "warmup": {"max_steps": 3},
        "search": {"trials": 2, "rank": [2, 4, 2], "num_experts": [2, 3, 1], "startup_trials": 1},
        "score": {"rows": 16, "batch_size": 4, "taylor_rows": 8},
        "select": {"layers": 2, "tune_tokens": 256},
        "train": {
            "learning_rate": 0.01,
            "batch_size": 4,
            "grad_accum": 1,
            "max_steps": 6,
            "save_steps": 2,
            "validations": 2,
        },
        "baselines": [
            {"name": "all", "policy": "all"},
            {"name": "paper", "policy": "masks"},
            {"name": "random", "policy": "random"},
        ],
        "profile": {"steps": 1, "points": 2},
    }


def write_config(path, config):
    """The configuration as YAML."""
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
