"""One look at all that a run will need, before its first stage: files, rows, names and sizes."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator
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
from floe.artifacts.records import DataPart, LostRows
from floe.artifacts.results import Search, Trial
from floe.data.batches import TokenRow
from floe.decoder_blocks import find_blocks, geometry
from floe.errors import CheckError, DataError, FileError
from floe.importance.scores import FIELDS, LayerStatistics, Scores
from floe.pipeline.inputs import PARTS, RunInputs
from floe.pipeline.run_folder import REFUSED
from floe.pipeline.select import (
    Evidence,
    choose,
    place_baseline,
    placed,
    size_options,
    swept_counts,
)
from floe.rank_search.space import SearchSpace
from floe.selection.placement import Placement
from floe.selection.policies.registry import POLICIES, known_statistics
from floe.selection.ranking import ADAM_BYTES, saved_bytes_per_token
from floe.training.train import check_rows

_FIRST = 20  # so many of the rows that lost something are named
_UNITS = 3  # heads and neurons of made-up scores: their number decides nothing that is checked


@dataclass
class Account:
    """What a run will work on; memory and disk in bytes, estimated, and what there is."""

    data: dict[str, DataPart] = field(default_factory=dict)  # by part of the data
    # by arm: adapted layers, parameters at the smallest and the largest size of the search
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what is no error but should be known
    stages: dict[str, str] = field(default_factory=dict)  # of a dry run: "done", or what to do

    @property
    def refused(self) -> bool:
        """Whether a stage would be refused because other work lies in its place."""
        return any(REFUSED in what for what in self.stages.values())

    def remarks(self) -> list[str]:
        """A line for each part of the data that lost something, and the notes."""
        lost = [
            f"{PARTS[part]}: {facts.summary}" for part, facts in self.data.items() if facts.lost
        ]
        return lost + self.notes

    def text(self) -> str:
        """The account in some lines for a terminal."""
        lines = [("rows", f"{PARTS[part]}: {facts.summary}") for part, facts in self.data.items()]
        lines += [("stage", f"{name}: {what}") for name, what in self.stages.items()]
        for arm, facts in self.adapters.items():
            low, high = facts["parameters"]
            size = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            lines.append(("adapters", f"{arm}: {facts['layers']} layers, {size} parameters"))
        for name, sizes in (("memory", self.memory), ("disk", self.disk)):
            if sizes:
                *parts, (_, there) = sizes.items()
                used = ", ".join(f"{key} {_bytes(size)}" for key, size in parts)
                lines.append((name, f"{used}, estimated; {_bytes(there)} are there"))
        lines += [("note", note) for note in self.notes]
        return "\n".join(f"{name:>10}  {line}" for name, line in lines)


class _Problems:
    """Collects the errors of independent looks, so that all are told at once."""

    def __init__(self) -> None:
        self.errors: dict[str, Exception] = {}  # by their own text, without a place

    @contextmanager
    def looking(self, place: str = "") -> Iterator[None]:
        """Keep an error of the user's; the same one, met again on another way, counts once.

        ``place`` is the part of the configuration that is looked at, for errors without one.
        """
        try:
            yield
        except (ValueError, TypeError, OSError) as error:
            text = str(error)
            if text not in self.errors:
                self.errors[text] = error
                if place and not isinstance(error, (FileError, DataError, OSError)):
                    error.args = (f"{place}: {text}",)

    def tell(self) -> None:
        """Raise the one error, or all of them as one."""
        errors = list(self.errors.values())
        if errors:
            raise errors[0] if len(errors) == 1 else CheckError(errors)


def check(run: RunInputs) -> Account:
    """Look at everything a whole run of ``run.config`` will read, cheap things first.

    Writes nothing, and loads no weights where the model's files are as they are. What the select
    stage refuses is found by having it choose on made-up scores.

    Raises:
        ValueError, TypeError, FileError, DataError: of the one problem there is.
        CheckError: there are several; it names all.
    """
    problems, account = _Problems(), Account()
    sources = {part: source for part in PARTS if (source := run.source(part)) is not None}
    for source in sources.values():
        with problems.looking():
            run.read(source.model_copy(update={"limit": 1}))
    with problems.looking():
        run.structure, run.tokenizer  # noqa: B018
        with problems.looking():
            _check_names(run, account, problems)
        with problems.looking():
            _check_folder(run.path)
        for part in sources:
            with problems.looking():
                account.data[part] = _check_part(run, part)
        _check_use(run, problems)
    problems.tell()
    _check_memory(run, account, problems)
    _check_disk(run, account, problems)
    problems.tell()
    account.notes += _notes(run, account)
    return account


def _notes(run: RunInputs, account: Account) -> Iterator[str]:
    """What is no error but should be known."""
    most = run.config.eval.max_new_tokens
    long = sum(len(row.response) - 1 > most for row in run.test_rows)  # the last ends the answer
    if run.accuracy == "generation" and long:
        beyond = f"longer than eval.max_new_tokens = {most}: none can be given"
        yield f"{long} right answers are {beyond}"
    known = {(tuple(row.prompt), tuple(row.response)) for row in run.train_rows}
    both = sum((tuple(row.prompt), tuple(row.response)) in known for row in run.test_rows)
    if both:
        yield f"{both} of {len(run.test_rows)} test rows are training rows, too"
    window = getattr(run.structure.config.get_text_config(), "max_position_embeddings", None)
    longest = max(facts.longest for facts in account.data.values())
    if window is not None and longest > window:
        yield f"the longest row has {longest} tokens, the model's window {window}"
    if run.unused_weights:
        yield (
            f"{run.config.model.path}: {len(run.unused_weights)} tensors are of no use to the "
            f"model that config.json describes, and left out (first: {run.unused_weights[0]})"
        )


def _bytes(size: int) -> str:
    unit, power = ("GiB", 30) if size >= 2**29 else ("MiB", 20)
    return f"{size / 2**power:,.1f} {unit}"


def _check_part(run: RunInputs, part: str) -> DataPart:
    """Encode a part of the data; what it holds, and what it lost."""
    encoded, limit = run.encoded(part), run.config.data.max_dropped
    rows, dropped = encoded.rows, {why: gone for why, gone in encoded.dropped.items() if gone}
    reasons = ", ".join(f"{len(gone)} {why}" for why, gone in dropped.items())
    losses = [f"{encoded.lost} rows dropped ({reasons})"] if dropped else []
    losses += [f"{len(encoded.cut)} prompts cut at the left"] if encoded.cut else []
    lost = ", ".join(losses)
    if encoded.lost > limit * encoded.given:
        raise DataError(
            PARTS[part],
            f"{lost} of {encoded.given}, more than data.max_dropped = {limit}: mend the "
            "rows, or raise data.max_length or data.max_dropped",
        )
    for row in rows:
        if row.targets < 1:
            raise DataError(PARTS[part], "must have a token that carries loss, got none", row.index)
    _check_tokens(run, rows, part)
    tokens, longest = sum(map(len, rows)), max(map(len, rows))
    summary = (
        f"{len(rows):,} of {encoded.given:,} rows kept, {tokens:,} tokens, longest {longest:,}"
    )
    return DataPart(
        summary=f"{summary}; {lost}" if lost else summary,
        lost=lost,
        rows=encoded.given,
        kept=len(rows),
        tokens=tokens,
        longest=longest,
        dropped={why: LostRows(len(gone), gone[:_FIRST]) for why, gone in dropped.items()},
        cut=LostRows(len(encoded.cut), encoded.cut[:_FIRST]),
    )


def _check_tokens(run: RunInputs, rows: list[TokenRow], part: str) -> None:
    """Every token, and the one that pads, must have an embedding."""
    model, tokenizer = run.structure, run.tokenizer
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    limit = min(table.weight.shape[0] for table in tables if table is not None)
    pad = tokenizer.pad_token_id or 0
    for row in (TokenRow((pad,), ()), *rows):
        token = max((*row.prompt, *row.response))
        if token >= limit:
            raise FileError(
                run.config.model.path,
                f"its tokenizer gives token {token} ({tokenizer.convert_ids_to_tokens(token)!r}, "
                f"{PARTS[part]}, row {row.index}), but the model has {limit} embeddings: take the "
                "model's own tokenizer, or resize the embeddings, train and save them",
            )


def _check_use(run: RunInputs, problems: _Problems) -> None:
    """What the stages do with the rows besides reading them."""
    config, before = run.config, len(problems.errors)
    with problems.looking("data"):
        run.train_rows, run.validation_rows, run.taylor_rows  # noqa: B018
    if len(problems.errors) > before:
        return
    with problems.looking("warmup"):
        check_rows(run.warmup_rows, run.settings(config.warmup.max_steps))
    with problems.looking("train"):
        check_rows(run.train_rows, run.settings())
    with problems.looking():
        layers = config.select.layers
        if isinstance(layers, dict) and "sweep" in layers and len(run.validation_rows) < 2:
            raise ValueError(
                "select.layers.sweep compares losses of the validation rows, of which there must "
                f"be at least 2, got {len(run.validation_rows)}"
            )
    with problems.looking():
        _check_tokens(run, [*run.test_rows, *run.answer_rows], "test")


def _check_names(run: RunInputs, account: Account, problems: _Problems) -> None:
    """Projections, layers, policies and sizes, against the model's own."""
    blocks = find_blocks(run.structure)  # without any there are no layers to choose from
    geometry(run.structure, blocks)
    pairs = _sizes(run)
    with problems.looking("search"):
        if run.config.search.trials:
            SearchSpace(run.config.search.rank, run.config.search.num_experts)
    if getattr(run.structure.config, "quantization_config", None) is not None:
        known = [POLICIES[name] for name in sorted(run.policies & POLICIES.keys())]
        wanting = [f"policy {policy.name!r}" for policy in known if policy.plain_weights]
        for what in (*wanting, *(["select.tune: true"] if run.config.select.tune else [])):
            with problems.looking("model"):
                raise ValueError(f"{what} needs plain base weights, got quantised ones")
    before = len(problems.errors)
    with problems.looking("adapter"):
        adapter_shapes(run.structure, run.adapter_config(*pairs[0]))
    if len(problems.errors) > before:  # the other settings can still be looked at
        names = {"target_modules": sorted(blocks[0].linears)}
        adapter = run.config.adapter.model_copy(update=names)
        structure = run.structure
        run = RunInputs(run.config.model_copy(update={"adapter": adapter}))
        run.structure = structure
    least, most = min(pairs), max(pairs)
    arms = _rehearse(run, least, problems)
    larger, more = arms, _Problems()
    if most != least:
        larger = _rehearse(run, most, more)
    account.notes += [
        f"should the search choose rank {most[0]} and {most[1]} experts: {error}"
        for text, error in more.errors.items()
        if text not in problems.errors
    ]
    for arm, (layers, parameters) in arms.items():
        highest = larger.get(arm, (layers, parameters))[1]
        account.adapters[arm] = {"layers": layers, "parameters": [parameters, highest]}


def _rehearse(
    run: RunInputs, size: tuple[int, int], problems: _Problems
) -> dict[str, tuple[int, int]]:
    """Let the select stage choose on made-up scores; each arm's layers and adapter parameters."""
    arms: dict[str, Placement] = {}
    binary = run.config.select.model_copy(update={"tune": False})
    stage = RunInputs(run.config.model_copy(update={"select": binary}))
    stage.base_model = run.structure
    with problems.looking("select"):
        evidence = _made_up(stage, size)
        chosen = choose(stage, evidence, 1)  # for the arms, should the number be wrong
        with problems.looking("select"):
            chosen = choose(stage, evidence, max(swept_counts(stage), default=None))
        with problems.looking("select"):
            arms["main"] = placed(stage, evidence, chosen, binary.choose)
        for arm in run.config.baselines:
            with problems.looking(f"baselines.{arm.name}"):
                arms[arm.name] = place_baseline(stage, evidence, chosen, arm)
    return {arm: (len(place.layers), _parameters(run, size, place)) for arm, place in arms.items()}


def _made_up(run: RunInputs, size: tuple[int, int]) -> Evidence:
    """What the stages before select would leave, with numbers drawn at random."""
    draw, settings = np.random.default_rng(0), run.config.score
    shapes = projection_shapes(run.base_model, run.adapter_config(*size))
    names, layers = sorted(shapes[0]), len(shapes)
    numbers = {"L": layers, "L + 1": layers + 1, "P": len(names), "S": 2, "H": _UNITS, "I": _UNITS}

    def drawn(shape: Iterable[str]) -> Any:
        return draw.uniform(0.1, 0.9, [numbers[letter] for letter in shape])

    left_out = {"adapter_samples"}
    left_out |= set() if settings.keep_samples else {"head_gradient", "neuron_gradient"}
    left_out |= set() if settings.first_order else {"head_mean", "neuron_mean"}
    arrays = {
        name: drawn(shape).astype(np.float32 if "S" in shape else np.float64)
        for name, shape in FIELDS.items()
        if name not in left_out
    }
    parameters = parameter_counts(run.base_model, run.adapter_config(*size))
    meta = {"adapter_modules": names, "adapter_parameters": parameters, "rows": 2}
    scores = Scores(**arrays, meta=meta)
    measured = {name: drawn(facts.sizes) for name, facts in known_statistics().items()}
    statistics = LayerStatistics(layers, measured)
    pairs = size_options(run.config.search)
    knee = float(np.median([rank * math.sqrt(experts) for rank, experts in pairs]))
    values = [math.exp(-rank * math.sqrt(experts) / knee) for rank, experts in pairs]
    trials = [Trial(n, *pairs[n], "complete", value, 0.0) for n, value in enumerate(values)]
    return Evidence(scores, statistics, Search(*size, trials=trials))


def _parameters(run: RunInputs, size: tuple[int, int], place: Placement | None = None) -> int:
    shapes = adapter_shapes(run.structure, run.adapter_config(*size, place))
    return sum(math.prod(shape) for shape in shapes.values())


def _sizes(run: RunInputs) -> list[tuple[int, int]]:
    """The pairs (rank, experts) that the search may choose, or the configured one."""
    adapter = run.config.adapter
    pairs = [(adapter.r, adapter.num_experts)]
    return size_options(run.config.search) if run.config.search.trials else pairs


def _check_folder(run: Path) -> None:
    """The run's folder, or the nearest above it that is there, must take new files."""
    there = _nearest(run)
    if not there.is_dir():
        raise FileError(there, "must be a folder to hold the run's, got a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FileError(there, "must be writable to hold the run's folder, it is not")


def _nearest(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _check_memory(run: RunInputs, account: Account, problems: _Problems) -> None:
    """Bytes that training adapters on every layer, at the largest size, takes: an estimate.

    What frozen layers keep for the backward pass is counted as ten states and four widths of the
    feed-forward part for each token. Weights and optimiser state are no estimate: what exceeds the
    device cannot be trained.
    """
    train, model, size = run.config.train, run.structure, max(_sizes(run))
    element, sizes = run.dtype.itemsize, geometry(run.structure)
    tokens = train.batch_size * max(map(len, run.train_rows))
    inputs = input_widths(model, run.adapter_config(*size))
    saved = [saved_bytes_per_token(widths, *size, element_bytes=element) for widths in inputs]
    layer = (10 * sizes.hidden + 4 * sizes.neurons) * element
    kept = 1 if train.gradient_checkpointing else sizes.layers
    activations = tokens * (sizes.layers * sizes.hidden * element + kept * layer + sum(saved))
    answers = train.batch_size * max(len(row.response) + 1 for row in run.train_rows)
    activations += answers * model.config.get_text_config().vocab_size * (element + 8)  # logits
    if getattr(model.config, "quantization_config", None) is None:
        weights = int(sum(p.numel() for p in model.parameters()) * element)
    else:
        files = Path(run.config.model.path).glob("*.safetensors")
        weights = sum(file.stat().st_size for file in files)
    adapters, there = _parameters(run, size) * ADAM_BYTES, run.device_memory
    account.memory = {
        "base model": weights,
        "adapters and optimiser": adapters,
        "activations": activations,
        "there": there,
    }
    with problems.looking():
        if weights + adapters > there:
            raise ValueError(
                f"model and adapters must fit the memory of {run.device} ({_bytes(there)}), got "
                f"{_bytes(weights + adapters)} before any activation: take a smaller model or a "
                "smaller model.dtype"
            )


def _check_disk(run: RunInputs, account: Account, problems: _Problems) -> None:
    """Bytes that the run folder grows by at most: adapters, checkpoints, scores; an estimate."""
    arms = [facts["parameters"][-1] for facts in account.adapters.values()]
    whole, sizes, settings = _parameters(run, max(_sizes(run))), geometry(run.structure), run.config
    rows = min(settings.score.rows, len(run.warmup_rows)) if settings.score.keep_samples else 2
    account.disk = {
        "adapters": 4 * (sum(arms) + whole),
        "checkpoints": 2 * 12 * whole,  # two of weights and Adam's moments
        "scores": 8 * rows * sizes.layers * (sizes.heads + sizes.neurons),
    }
    needed, there = sum(account.disk.values()), _nearest(Path(settings.output_dir))
    account.disk["there"] = free = shutil.disk_usage(there).free
    with problems.looking():
        if needed > free:
            raise FileError(
                settings.output_dir,
                f"must have room for about {_bytes(needed)} of adapters, checkpoints and scores, "
                f"got {_bytes(free)}",
            )
