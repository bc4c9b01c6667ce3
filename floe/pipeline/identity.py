"""What decides the result of each stage: every setting of a run is sorted here, once.

A setting counts by its value (``BY_VALUE``), or by what it leads to: rows, files, another stage's
result (``BY_CONTENT``), or not at all (``NOTHING``). A stage whose inputs are the same is not made
again; one whose inputs differ is refused unless the user says ``--redo``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from floe.config import RunConfig
from floe.storage import hash_of

ORDER = ("search", "score", "statistics", "select", "arms", "sweep", "train", "profile", "eval")
_MODEL = " ".join(ORDER)
_TRAINED = "search sweep train"

BY_VALUE: dict[str, str] = {
    "model.attention": _MODEL,
    "data.template": "eval",
    "data.max_length": "eval",
    "adapter.r": "search",  # without trials; else the search decides
    "adapter.num_experts": "search",
    "adapter.alpha": _TRAINED,
    "adapter.dropout": _TRAINED + " profile",
    "adapter.target_modules": _TRAINED + " profile",
    "adapter.scaling": _TRAINED,
    "adapter.adapter_dtype": _TRAINED + " profile",
    "adapter.share_input": _TRAINED + " profile",
    "adapter.backend": "profile",  # every backend computes the same; here its time is measured
    "train.learning_rate": _TRAINED,
    "train.batch_size": "profile",
    "train.grad_accum": "profile",
    "train.warmup_ratio": _TRAINED,
    "train.schedule": _TRAINED,
    "train.weight_decay": _TRAINED,
    "train.max_grad_norm": _TRAINED,
    "train.group_by_length": _TRAINED,
    "train.seed": _TRAINED,
    "search.trials": "search",  # more of them go on with the same search
    "search.rank": "search",
    "search.num_experts": "search",
    "search.sampler": "search",
    "search.startup_trials": "search",
    "search.prune": "search",
    "search.seed": "search",
    "score.keep_samples": "score",
    "score.first_order": "score",
    "score.reduction": "score",
    "score.mask_scope": "score",
    "score.taylor_kind": "score",
    "score.taylor_aggregate": "score",
    "score.taylor_tokens": "score",
    "score.seed": "score statistics",
    "select.policy": "select",
    "select.preset": "select",
    "select.first_order": "select",
    "select.budget": "select",
    "select.layers": "select",
    "select.choose": "arms",
    "select.r0": "arms",
    "select.pick": "select",
    "select.score": "select",
    "select.budget_path": "select",
    "select.tune": "select",
    "select.tune_tokens": "select",
    "select.seed": "select",
    "baselines": "arms",
    "eval.accuracy": "eval",
    "eval.choice_score": "eval",
    "eval.max_new_tokens": "eval",
    "eval.seed": "eval",
    "profile.steps": "profile",
    "profile.points": "profile",
}

BY_CONTENT: dict[str, str] = {
    "model.path": _MODEL,  # the files in it, or the commit on the hub
    "model.revision": _MODEL,
    "model.gguf_file": _MODEL,
    "model.dtype": _MODEL,  # what `auto` comes to here
    "model.device": _MODEL,
    "data.train": _MODEL,  # the rows as tokens
    "data.validation": _MODEL,
    "data.test": "eval",
    "data.columns": _MODEL,
    "data.template": _MODEL,
    "data.max_length": _MODEL,
    "data.val_fraction": _MODEL,
    "data.seed": _MODEL,
    "train.batch_size": _TRAINED,  # the rows of a step, however it is cut
    "train.grad_accum": _TRAINED,
    "train.epochs": _TRAINED,  # the length that is in force
    "train.max_steps": _TRAINED,
    "warmup.fraction": "search score",
    "warmup.max_steps": "search",
    "warmup.seed": "search score",
    "score.rows": "score",
    "score.taylor_rows": "score",
    "score.taylor_data": "score",
    "score.statistic_rows": "statistics",
    "eval.limit": "eval",
}

NOTHING: dict[str, str] = {
    "name": "where the run is",
    "output_dir": "where the run is",
    "train.gradient_checkpointing": "the same gradients in less memory",
    "train.validations": "how often the loss is looked at",
    "train.save_steps": "how often a checkpoint is written",
    "search.storage": "where the trials are kept",
    "data.max_dropped": "beyond it a run stops before its first stage",
    "score.batch_size": "rows are measured one by one",
    "eval.batch_size": "rows are measured one by one",
}

WEIGHTS = "weights"
"""The input that holds the base model's weights. Adapters of weights that are gone are of no use:
when a file was replaced, and no setting changed, nothing is asked."""

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt")
_TOKENIZER_FILES = (".json", ".jinja", ".model", ".tiktoken", ".spm")
_OF_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "chat_template.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
_OF_TRAINER = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")


def values(config: RunConfig, stage: str) -> dict[str, Any]:
    """The settings that decide a stage's result by their value, by name."""
    found = flat(config)
    return {name: found[name] for name, stages in BY_VALUE.items() if stage in stages.split()}


def notes(config: RunConfig, stage: str) -> dict[str, Any]:
    """The settings that count up to a stage, to say what may stand behind inputs that differ."""
    found, upto = flat(config), set(ORDER[: ORDER.index(stage) + 1])
    counting = (BY_VALUE | BY_CONTENT).items()
    own = values(config, stage).keys() - BY_CONTENT.keys()
    return {k: found[k] for k, stages in counting if upto & set(stages.split()) and k not in own}


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting by its name; sources of data, columns and baselines as a whole."""
    found: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            found |= {f"{section}.{name}": one for name, one in value.items()}
        else:
            found[section] = value
    return found


def may_discard(changed: set[str]) -> bool:
    """Whether work made from other inputs may go unasked: the base model itself was replaced."""
    return WEIGHTS in changed and not changed & (BY_VALUE | BY_CONTENT).keys()


def model_files(folder: Path, gguf_file: str | None) -> dict[str, list[Path]]:
    """The files of a model's folder that count: its weights, its settings, its tokenizer's."""
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
    weights = [f for f in files if f.suffix in _WEIGHT_FILES and f.name not in _OF_TRAINER]
    for index in (f for f in files if f.name.endswith(".index.json")):
        weights += [folder / name for name in _shards(index)]
    if gguf_file is not None:
        weights = [folder / gguf_file]
    words = [f for f in files if f.name in (*_OF_TOKENIZER, "vocab.txt", "merges.txt")]
    words += [f for f in files if f.suffix in _TOKENIZER_FILES and f.suffix != ".json"]
    settings = [f for f in files if f.suffix == ".json" and f not in words]
    return {WEIGHTS: sorted({*weights}), "model": settings, "tokenizer": sorted({*words})}


def _shards(index: Path) -> set[str]:
    """Files that an index of weights names, in whatever folder; a damaged one names none."""
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        return {name for name in names if not Path(name).is_absolute()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def digests(folder: Path, files: list[Path], digest: Callable[[Path], str]) -> dict[str, str]:
    """Digests by name within the folder; a file that is not there has none."""
    return {f.relative_to(folder).as_posix(): digest(f) for f in files if f.is_file()}


def adapter_digest(folder: Path, digest: Callable[[Path], str]) -> str:
    """What tells adapters apart: their tensors and their configuration."""
    return hash_of([digest(folder / f"adapter_{n}") for n in ("config.json", "model.safetensors")])
