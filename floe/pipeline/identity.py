"""What decides the result of each stage: every setting of a run is sorted here, once.

A setting counts by its value (``BY_VALUE``), or by what it leads to: rows, files, another stage's
result (``BY_CONTENT``), or not at all (``NOTHING``). A stage whose inputs are the same is not made
again; one whose inputs differ is refused unless the user says ``--redo``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floe.config import RunConfig
from floe.data.batches import fingerprint
from floe.storage import hash_of

if TYPE_CHECKING:
    from floe.pipeline.inputs import RunInputs

ORDER = ("search", "score", "statistics", "select", "arms", "sweep", "train", "profile", "eval")
_ALL = " ".join(ORDER)
_TRAINED = "search sweep train"


def _by_setting(table: dict[str, str]) -> dict[str, str]:
    """Setting -> stages, from a table of stages -> settings."""
    return {name: stages for stages, names in table.items() for name in names.split()}


BY_VALUE = _by_setting(
    {
        _ALL: "model.attention",
        _TRAINED: """adapter.alpha adapter.scaling adapter.top_k
        adapter.temperature train.learning_rate train.warmup_ratio
        train.schedule train.weight_decay train.max_grad_norm train.group_by_length train.seed""",
        f"{_TRAINED} profile": """adapter.dropout adapter.target_modules adapter.adapter_dtype
        adapter.share_input""",
        # rank and experts without trials, else the search decides; more trials go on with a search
        "search": """adapter.r adapter.num_experts search.trials search.rank search.num_experts
        search.sampler search.startup_trials search.prune search.seed""",
        "score": """score.keep_samples score.first_order score.reduction score.mask_scope
        score.taylor_kind score.taylor_aggregate score.taylor_tokens""",
        "score statistics": "score.seed",
        "select": """select.policy select.preset select.first_order select.budget select.layers
        select.pick select.score select.budget_path select.tune select.tune_tokens select.seed""",
        "arms": "select.choose select.r0 baselines",
        # every backend computes the same, however a step's rows are cut; here the time is measured
        "profile": "adapter.backend train.batch_size train.grad_accum profile.steps profile.points",
        "eval": """data.template data.max_length eval.accuracy eval.choice_score eval.max_new_tokens
        eval.seed""",
    }
)
"""Setting -> the stages whose result its value decides."""

BY_CONTENT = _by_setting(
    {
        # the model's files or its commit on the hub, what `auto` comes to here; the rows as tokens
        _ALL: """model.path model.revision model.gguf_file model.dtype model.device data.train
        data.validation data.columns data.template data.max_length data.val_fraction data.seed""",
        # the rows of a step, however it is cut; the length that is in force
        _TRAINED: "train.batch_size train.grad_accum train.epochs train.max_steps",
        "search": "warmup.max_steps",
        "search score": "warmup.fraction warmup.seed",
        "score": "score.rows score.taylor_rows score.taylor_data",
        "statistics": "score.statistic_rows",
        "eval": "data.test eval.limit",
    }
)
"""Setting -> the stages whose result it decides by what it leads to."""

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
_OF_TRAINER = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
_TOKENIZER_FILES = (".jinja", ".model", ".tiktoken", ".spm")
_OF_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json"),
)


def of_stage(run: RunInputs, stage: str) -> dict[str, Any]:
    """The settings that count for a stage by their value, and the base model."""
    model = {"model.dtype": str(run.dtype), "model.device": run.device.type}
    files = {name: run.model_digests[name] for name in (WEIGHTS, "model")}
    return values(run.config, stage) | model | files


def of_training(run: RunInputs, stage: str, max_steps: int | None = None) -> dict[str, Any]:
    """What decides how adapters are trained, but for the rows they are trained on."""
    length = run.settings(max_steps).identity()
    inputs = of_stage(run, stage)
    inputs |= {n: length[n] for n in ("rows_per_step", "steps", "epochs") if n in length}
    return inputs | {"validation": fingerprint(run.validation_rows)}


def of_adapter(run: RunInputs, stage: str) -> str:
    """What tells the adapters of finished stages apart: their tensors and their configuration."""
    folder = run.path / stage / "adapter"
    names = ("adapter_config.json", "adapter_model.safetensors")
    return hash_of([run.folder.digest(folder / name) for name in names])


def values(config: RunConfig, stage: str) -> dict[str, Any]:
    """The settings that decide a stage's result by their value, by name."""
    settings = flat(config)
    return {name: settings[name] for name, stages in BY_VALUE.items() if stage in stages.split()}


def notes(config: RunConfig, stage: str) -> dict[str, Any]:
    """The settings that count up to a stage, to say what may stand behind inputs that differ."""
    settings, upto = flat(config), set(ORDER[: ORDER.index(stage) + 1])
    plain = values(config, stage).keys() - BY_CONTENT.keys()
    return {
        name: settings[name]
        for name, stages in (BY_VALUE | BY_CONTENT).items()
        if upto & set(stages.split()) and name not in plain
    }


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting by its name; sources of data, columns and baselines as a whole."""
    settings: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            settings |= {f"{section}.{name}": part for name, part in value.items()}
        else:
            settings[section] = value
    return settings


def may_discard(changed: set[str]) -> bool:
    """Whether work made from other inputs may go unasked: the base model itself was replaced."""
    return WEIGHTS in changed and not changed & (BY_VALUE | BY_CONTENT).keys()


def model_digests(run: RunInputs) -> dict[str, dict[str, Any]]:
    """sha256 of every file of the model's folder that counts; a hub model's commit."""
    model, folder = run.config.model, Path(run.config.model.path)
    if not folder.is_dir():
        named = {"hub": model.path, "commit": run.commit, "gguf_file": model.gguf_file}
        return {WEIGHTS: {}, "model": named, "tokenizer": {}}
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")]
    weights = [f for f in files if f.suffix in _WEIGHT_FILES and f.name not in _OF_TRAINER]
    for index in (f for f in files if f.name.endswith(".index.json")):
        weights += [folder / name for name in _shards(index)]
    if model.gguf_file is not None:
        weights = [folder / model.gguf_file]
    words = [f for f in files if f.name in _OF_TOKENIZER or f.suffix in _TOKENIZER_FILES]
    settings = [f for f in files if f.suffix == ".json" and f not in words]
    return {
        kind: {f.relative_to(folder).as_posix(): run.folder.digest(f) for f in some if f.is_file()}
        for kind, some in ((WEIGHTS, weights), ("model", settings), ("tokenizer", words))
    }


def _shards(index: Path) -> set[str]:
    """Files that an index of weights names, in whatever folder; a damaged one names none."""
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        return {name for name in names if not Path(name).is_absolute()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
