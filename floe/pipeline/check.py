"""One look at all that a run will need, before its first stage: files, rows, names and sizes."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from floe.adapters.targets import (
    adapter_shapes,
    input_widths,
    parameter_counts,
    projection_shapes,
)
from floe.config import RunConfig
from floe.data.batches import TokenRow
from floe.data.rows import Encoded
from floe.decoder_blocks import find_blocks, geometry
from floe.errors import CheckError, DataError, FileError
from floe.importance.scores import Scores
from floe.importance.statistics import LayerStatistics
from floe.pipeline.choice import choose, place_baseline, placed
from floe.pipeline.inputs import PARTS, Workspace
from floe.pipeline.placing import size_options
from floe.pipeline.run_folder import REFUSED
from floe.pipeline.scoring import statistics_of
from floe.pipeline.sweep import swept_counts
from floe.rank_search.space import SearchSpace
from floe.selection.layer_count import ADAM_BYTES, saved_bytes_per_token
from floe.selection.placement import Placement
from floe.selection.policies.registry import POLICIES, known_statistics
from floe.storage import write_json
from floe.training.train import check_rows

_FIRST = 20  # so many of the rows that lost something are named
_UNITS = 3  # heads and neurons of made-up scores: their number decides nothing that is checked


@dataclass
class Account:
    """What a run will work on.

    Attributes:
        data: by part of the data: rows, kept, tokens, longest row, and which rows were dropped or
            cut, and why; as in ``data.json``.
        adapters: by arm: adapted layers, and parameters at the smallest and the largest size that
            the search may choose.
        memory, disk: estimates in bytes, and what there is.
        notes: what is no error but should be known.
        stages: by stage: "done", or what is to be done; of a dry run alone.
    """

    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stages: dict[str, str] = field(default_factory=dict)

    def write(self, file: Path) -> None:
        """``data.json`` of a run: which rows it uses, and which lost something."""
        write_json(file, {"parts": {PARTS[part]: own for part, own in self.data.items()}})

    @property
    def refused(self) -> bool:
        """Whether a stage would be refused because other work lies in its place."""
        return any(REFUSED in what for what in self.stages.values())

    def remarks(self) -> list[str]:
        """A line for each part of the data that lost something, and the notes."""
        lost = [f"{PARTS[k]}: {own['summary']}" for k, own in self.data.items() if own["lost"]]
        return lost + self.notes

    def text(self) -> str:
        """The account in some lines for a terminal."""
        lines = [("rows", f"{PARTS[part]}: {own['summary']}") for part, own in self.data.items()]
        lines += [("stage", f"{name}: {what}") for name, what in self.stages.items()]
        for arm, own in self.adapters.items():
            low, high = own["parameters"]
            size = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            lines.append(("adapters", f"{arm}: {own['layers']} layers, {size} parameters"))
        for name, own in (("memory", self.memory), ("disk", self.disk)):
            if own:
                *parts, (_, there) = own.items()
                used = ", ".join(f"{key} {_bytes(size)}" for key, size in parts)
                lines.append((name, f"{used}, estimated; {_bytes(there)} are there"))
        lines += [("note", note) for note in self.notes]
        return "\n".join(f"{name:>10}  {line}" for name, line in lines)


class _Problems:
    """Collects the errors of independent looks, so that all are told at once."""

    def __init__(self) -> None:
        self.found: list[Exception] = []
        self._texts: set[str] = set()

    @contextmanager
    def looking(self, place: str = "") -> Iterator[None]:
        """Keep an error of the user's; the same one, met again on another way, counts once.

        ``place`` is the part of the configuration that is looked at, for errors without one.
        """
        try:
            yield
        except (ValueError, TypeError, OSError) as error:
            text = str(error)
            if text in self._texts:
                return
            self._texts.add(text)
            if place and not isinstance(error, (FileError, DataError, OSError)):
                error.args = (f"{place}: {text}",)
            self.found.append(error)

    def tell(self) -> None:
        """Raise the one error, or all of them as one."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise CheckError(self.found)


def check(work: Workspace) -> Account:
    """Look at everything a whole run of ``work.config`` will read, cheap things first.

    Writes nothing, and loads no weights where the model's files are as they are. What the select
    stage refuses is found by having it choose on made-up scores.

    Raises:
        ValueError, TypeError, FileError, DataError: of the one problem there is.
        CheckError: there are several; it names all.
    """
    problems, account = _Problems(), Account()
    for part in PARTS:
        with problems.looking():
            work.probe(part)
    try:
        work.structure, work.tokenizer  # noqa: B018
    except (ValueError, OSError) as error:  # nothing more can be looked at
        problems.found.append(error)
        problems.tell()
    _check_names(work, account, problems)
    with problems.looking():
        _check_folder(Path(work.config.output_dir) / work.config.name)
    for part in PARTS:
        if work.source(part) is not None:
            with problems.looking():
                account.data[part] = _check_part(work, part)
    _check_use(work, problems)
    problems.tell()
    account.notes += _long_answers(work)
    account.memory, account.disk = _memory(work), _disk(work, account)
    with problems.looking():
        _refuse_too_large(work, account.memory)
    with problems.looking():
        _refuse_full_disk(work, account.disk)
    problems.tell()
    account.notes += _trained_on(work)
    window = getattr(work.structure.config.get_text_config(), "max_position_embeddings", None)
    longest = max(own["longest"] for own in account.data.values())
    if window is not None and longest > window:
        account.notes.append(f"the longest row has {longest} tokens, the model's window {window}")
    if work.unused_weights:
        account.notes.append(
            f"{work.config.model.path}: {len(work.unused_weights)} tensors are of no use to the "
            f"model that config.json describes, and left out (first: {work.unused_weights[0]})"
        )
    return account


def _trained_on(work: Workspace) -> list[str]:
    """A note where test rows are rows that were trained on."""
    known = {(tuple(row.prompt), tuple(row.response)) for row in work.train_rows}
    rows = work.test_rows
    count = sum((tuple(row.prompt), tuple(row.response)) in known for row in rows)
    return [f"{count} of {len(rows)} test rows are training rows, too"] if count else []


def _bytes(size: int) -> str:
    unit, power = ("GiB", 30) if size >= 2**29 else ("MiB", 20)
    return f"{size / 2**power:,.1f} {unit}"


def _summary(own: dict[str, Any]) -> str:
    lost = f"; {own['lost']}" if own["lost"] else ""
    kept = f"{own['kept']:,} of {own['rows']:,} rows kept"
    return f"{kept}, {own['tokens']:,} tokens, longest {own['longest']:,}{lost}"


def _check_part(work: Workspace, part: str) -> dict[str, Any]:
    """Encode a part of the data; what it holds, and what it lost."""
    found, limit = work.encoded(part), work.config.data.max_dropped
    if found.lost > limit * found.given:
        raise DataError(
            PARTS[part],
            f"{_losses(found)} of {found.given}, more than data.max_dropped = {limit}: mend the "
            "rows, or raise data.max_length or data.max_dropped",
        )
    for row in found.rows:
        if row.targets < 1:
            raise DataError(PARTS[part], "must have a token that carries loss, got none", row.index)
    _check_tokens(work, found.rows, part)
    own = {
        "rows": found.given,
        "kept": len(found.rows),
        "tokens": sum(map(len, found.rows)),
        "longest": max(map(len, found.rows)),
        "lost": _losses(found),
        "dropped": {reason: _named(rows) for reason, rows in found.dropped.items() if rows},
        "cut": _named(found.cut),
    }
    return own | {"summary": _summary(own)}


def _losses(found: Encoded) -> str:
    """What was dropped and cut, in words; empty if nothing was."""
    reasons = {reason: len(rows) for reason, rows in found.dropped.items() if rows}
    parts = []
    if reasons:
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        parts.append(f"{sum(reasons.values())} rows dropped ({listed})")
    if found.cut:
        parts.append(f"{len(found.cut)} prompts cut at the left")
    return ", ".join(parts)


def _named(rows: list[int]) -> dict[str, Any]:
    return {"rows": len(rows), "first": rows[:_FIRST]}


def _check_tokens(work: Workspace, rows: list[TokenRow], part: str) -> None:
    """Every token, and the one that pads, must have an embedding."""
    model, tokenizer = work.structure, work.tokenizer
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    limit = min(table.weight.shape[0] for table in tables if table is not None)
    pad = tokenizer.pad_token_id or 0
    for row in (TokenRow((pad,), ()), *rows):
        token = max((*row.prompt, *row.response))
        if token >= limit:
            raise FileError(
                work.config.model.path,
                f"its tokenizer gives token {token} ({tokenizer.convert_ids_to_tokens(token)!r}, "
                f"{PARTS[part]}, row {row.index}), but the model has {limit} embeddings: take the "
                "model's own tokenizer, or resize the embeddings, train and save them",
            )


def _check_use(work: Workspace, problems: _Problems) -> None:
    """What the stages do with the rows besides reading them."""
    config, before = work.config, len(problems.found)
    with problems.looking("data"):
        work.train_rows, work.validation_rows, work.taylor_rows  # noqa: B018
    if len(problems.found) > before:
        return
    with problems.looking("warmup"):
        check_rows(work.warmup_rows, work.settings(config.warmup.max_steps))
    with problems.looking("train"):
        check_rows(work.train_rows, work.settings())
    with problems.looking():
        layers = config.select.layers
        if isinstance(layers, dict) and "sweep" in layers and len(work.validation_rows) < 2:
            raise ValueError(
                "select.layers.sweep compares losses of the validation rows, of which there must "
                f"be at least 2, got {len(work.validation_rows)}"
            )
    with problems.looking():
        _check_tokens(work, [*work.test_rows, *work.answer_rows], "test")


def _long_answers(work: Workspace) -> list[str]:
    """A note where right answers are longer than what a model is let write."""
    most = work.config.eval.max_new_tokens
    long = sum(len(row.response) - 1 > most for row in work.test_rows)  # the last ends the answer
    if work.accuracy != "generation" or not long:
        return []
    return [f"{long} right answers are longer than eval.max_new_tokens = {most}: none can be given"]


def _check_names(work: Workspace, account: Account, problems: _Problems) -> None:
    """Projections, layers, policies and sizes, against the model's own."""
    config, search, adapter = work.config, work.config.search, work.config.adapter
    pairs = [(adapter.r, adapter.num_experts)]
    with problems.looking("search"):
        if search.trials:
            SearchSpace(search.rank, search.num_experts)
            pairs = size_options(search)
    try:
        blocks = find_blocks(work.structure)
        geometry(work.structure, blocks)
    except ValueError as error:  # there are no layers to choose from
        problems.found.append(error)
        return
    _check_quantised(config, work.structure, problems)
    try:
        adapter_shapes(work.structure, work.adapter_config(*pairs[0]))
    except ValueError as error:
        with problems.looking("adapter"):
            raise error
        work = _with_all_targets(work, sorted(blocks[0].linears))
    sizes = {min(pairs), max(pairs)}
    found = [_rehearse(work, size, problems) for size in sorted(sizes)[:1]]
    for size in sorted(sizes)[1:]:
        larger = _Problems()
        found.append(_rehearse(work, size, larger))
        account.notes += [
            f"should the search choose rank {size[0]} and {size[1]} experts: {error}"
            for error in larger.found
            if str(error) not in map(str, problems.found)
        ]
    for arm, (layers, _) in found[0].items():
        parameters = [own[arm][1] for own in found if arm in own]
        account.adapters[arm] = {"layers": layers, "parameters": [parameters[0], parameters[-1]]}


def _with_all_targets(work: Workspace, names: list[str]) -> Workspace:
    """The same with known projections: the other settings can still be looked at."""
    adapter = work.config.adapter.model_copy(update={"target_modules": names})
    found = Workspace(work.config.model_copy(update={"adapter": adapter}))
    found.structure = work.structure
    return found


def _check_quantised(config: RunConfig, model: Any, problems: _Problems) -> None:
    if getattr(model.config, "quantization_config", None) is None:
        return
    policies = {config.select.policy, *(baseline.policy for baseline in config.baselines)}
    wanting = [
        f"policy {name!r}"
        for name in sorted(policies & POLICIES.keys())
        if POLICIES[name].plain_weights
    ]
    wanting += ["select.tune: true"] if config.select.tune else []
    for what in wanting:
        with problems.looking("model"):
            raise ValueError(f"{what} needs plain base weights, got quantised ones")


def _rehearse(
    work: Workspace, size: tuple[int, int], problems: _Problems
) -> dict[str, tuple[int, int]]:
    """Let the select stage choose on made-up scores; each arm's layers and adapter parameters."""
    config, found = work.config, dict[str, Placement]()
    binary = config.select.model_copy(update={"tune": False})
    stage = Workspace(config.model_copy(update={"select": binary}))
    stage.base_model = work.structure
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        with problems.looking("select"):
            _make_up(stage, run, size)
            chosen = choose(stage, run, None, 1)  # for the arms, should the number be wrong
            with problems.looking("select"):
                counts = swept_counts(stage)
                chosen = choose(stage, run, None, max(counts, default=None))
            with problems.looking("select"):
                found["main"] = placed(stage, run, chosen, binary.choose)
            for baseline in config.baselines:
                with problems.looking(f"baselines.{baseline.name}"):
                    found[baseline.name] = place_baseline(stage, run, chosen, baseline)
    return {
        arm: (len(place.layers), _parameters(work, size, place)) for arm, place in found.items()
    }


def _parameters(work: Workspace, size: tuple[int, int], place: Placement | None = None) -> int:
    shapes = adapter_shapes(work.structure, work.adapter_config(*size, place))
    return sum(math.prod(shape) for shape in shapes.values())


def _make_up(work: Workspace, run: Path, size: tuple[int, int]) -> None:
    """What search and score would leave, with numbers drawn at random."""
    config, settings, draw = work.config, work.config.score, np.random.default_rng(0)
    shapes = projection_shapes(work.base_model, work.adapter_config(*size))
    names, layers = sorted(shapes[0]), len(shapes)

    def drawn(*shape: int) -> Any:
        return draw.uniform(0.1, 0.9, shape)

    units = (layers, _UNITS)
    kept = {n: drawn(2, *units).astype(np.float32) for n in ("head_gradient", "neuron_gradient")}
    means = {n: drawn(*units) for n in ("head_mean", "neuron_mean")}
    scores = Scores(
        drawn(*units), drawn(*units), drawn(*units), drawn(*units), drawn(layers),
        meta={
            "adapter_modules": names, "rows": 2,
            "adapter_parameters": parameter_counts(work.base_model, work.adapter_config(*size)),
        },
        probe_fisher=drawn(layers), module_fisher=drawn(layers, len(names)),
        gate_gradient=drawn(2, layers, len(names)).astype(np.float32),
        **(kept if settings.keep_samples else {}), **(means if settings.first_order else {}),
    )  # fmt: skip
    policies = {config.select.policy, *(baseline.policy for baseline in config.baselines)}
    measured = [f"statistics/{name}" for name in statistics_of(policies)]
    for stage in ("search", "score", *measured):
        (run / stage).mkdir(parents=True)
    scores.save(run / "score/scores.npz")
    numbers = {"L": layers, "L + 1": layers + 1, "P": len(names)}
    known = known_statistics().items()
    values = {name: drawn(*(numbers[size] for size in s.sizes)) for name, s in known}
    for stage in measured:
        LayerStatistics(layers, values).save(run / stage / "statistics.npz")
    pairs = size_options(work.config.search)
    knee = float(np.median([r * math.sqrt(m) for r, m in pairs]))
    trials = [
        {
            "rank": r, "num_experts": m, "state": "complete",
            "value": math.exp(-r * math.sqrt(m) / knee),
        }
        for r, m in pairs
    ]  # fmt: skip
    result = {"rank": size[0], "num_experts": size[1], "trials": trials}
    write_json(run / "search/result.json", result)


def _check_folder(run: Path) -> None:
    """The run's folder, or the nearest above it that is there, must take new files."""
    there = _nearest(run)
    if not there.is_dir():
        raise FileError(there, "must be a folder to hold the run's, got a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FileError(there, "must be writable to hold the run's folder, it is not")


def _nearest(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _largest(work: Workspace) -> tuple[int, int]:
    search, adapter = work.config.search, work.config.adapter
    return max(size_options(search)) if search.trials else (adapter.r, adapter.num_experts)


def _memory(work: Workspace) -> dict[str, int]:
    """Bytes that training adapters on every layer, at the largest size, takes: an estimate.

    What frozen layers keep for the backward pass is counted as ten states and four widths of the
    feed-forward part for each token.
    """
    config, model, size = work.config, work.structure, _largest(work)
    element, sizes = work.dtype.itemsize, geometry(work.structure)
    tokens = config.train.batch_size * max(map(len, work.train_rows))
    inputs = input_widths(model, work.adapter_config(*size))
    saved = [saved_bytes_per_token(widths, *size, element_bytes=element) for widths in inputs]
    parameters = _parameters(work, size)
    adapters = parameters * ADAM_BYTES
    layer = (10 * sizes.hidden + 4 * sizes.neurons) * element
    kept = 1 if config.train.gradient_checkpointing else sizes.layers
    activations = tokens * (sizes.layers * sizes.hidden * element + kept * layer + sum(saved))
    answers = config.train.batch_size * max(len(row.response) + 1 for row in work.train_rows)
    activations += answers * model.config.get_text_config().vocab_size * (element + 8)  # logits
    return {
        "base model": _weight_bytes(work), "adapters and optimiser": adapters,
        "activations": activations, "there": work.device_memory,
    }  # fmt: skip


def _refuse_too_large(work: Workspace, memory: dict[str, int]) -> None:
    """Weights and optimiser state are no estimate: what exceeds the device cannot be trained."""
    least, there = memory["base model"] + memory["adapters and optimiser"], memory["there"]
    if least > there:
        raise ValueError(
            f"model and adapters must fit the memory of {work.device} ({there / 2**30:.1f} GiB), "
            f"got {least / 2**30:.1f} GiB before any activation: take a smaller model or a smaller "
            "model.dtype"
        )


def _refuse_full_disk(work: Workspace, disk: dict[str, int]) -> None:
    needed = sum(disk.values()) - disk["there"]
    if needed > disk["there"]:
        raise FileError(
            work.config.output_dir,
            f"must have room for about {needed / 2**30:.1f} GiB of adapters, checkpoints and "
            f"scores, got {disk['there'] / 2**30:.1f} GiB",
        )


def _weight_bytes(work: Workspace) -> int:
    """Of the base model once it is loaded; of a quantised one, of its files."""
    model, folder = work.structure, Path(work.config.model.path)
    if getattr(model.config, "quantization_config", None) is None:
        return int(sum(p.numel() for p in model.parameters()) * work.dtype.itemsize)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _disk(work: Workspace, account: Account) -> dict[str, int]:
    """Bytes that the run folder grows by at most: adapters, checkpoints, scores; an estimate."""
    config = work.config
    arms = [own["parameters"][-1] for own in account.adapters.values()]
    whole = _parameters(work, _largest(work))
    adapters = 4 * (sum(arms) + whole)
    checkpoints = 2 * 12 * whole  # two of weights and Adam's moments
    sizes = geometry(work.structure)
    rows = min(config.score.rows, len(work.warmup_rows)) if config.score.keep_samples else 2
    scores = 8 * rows * sizes.layers * (sizes.heads + sizes.neurons)
    free = shutil.disk_usage(_nearest(Path(config.output_dir))).free
    return {"adapters": adapters, "checkpoints": checkpoints, "scores": scores, "there": free}
