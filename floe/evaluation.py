"""Loss and accuracy of a model on rows with 95 % intervals, and how its routers use experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from floe.adapters import MoELoRALinear, adapted_layers
from floe.artifacts.results import Interval, Router
from floe.data.batches import Collator, TokenRow, make_batches, row_order
from floe.data.loss import batch_losses, evaluating, on_device
from floe.data.rows import encode_choices, encode_questions, stop_tokens
from floe.decoder_blocks import base_of
from floe.errors import DataError, require
from floe.types import Batch, Flags, Floats, Integers

RESAMPLES = 2000
OnRows = Callable[[int], None]
_Z = 1.959963984540054  # the normal's 97.5 % point


class _ByRow:
    """What is measured for rows that have numbers: places are looked up, never assumed."""

    rows: Integers

    def _number(self, count: int, *others: int) -> None:
        """Check the lengths; rows without numbers are numbered as they come."""
        rows = np.arange(count) if self.rows is None else np.asarray(self.rows, dtype=np.int64)
        if {len(rows), *others} != {count}:
            raise ValueError(f"all values must be of {count} rows, got {[len(rows), *others]}")
        object.__setattr__(self, "rows", rows)

    def places(self, numbers: Sequence[int]) -> list[int]:
        """Where the rows of these numbers stand; ValueError for one that is not here just once."""
        place_of = {int(number): place for place, number in enumerate(self.rows)}
        missing = [number for number in numbers if number not in place_of]
        if missing or len(place_of) < len(self.rows):
            what = f"no row {missing[0]}" if missing else "numbers that occur twice"
            raise ValueError(f"numbers must be of rows that were measured once, got {what}")
        return [place_of[number] for number in numbers]


@dataclass(frozen=True)
class Losses(_ByRow):
    """Per row: summed negative log-likelihood, nats, float64 [n]; and target tokens, int64 [n].

    ``rows`` are the rows' numbers in their data, int64 [n]; None counts them as they come.
    """

    nll: Floats
    tokens: Integers
    rows: Integers = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        self._number(len(self.nll), len(self.tokens))

    def take(self, numbers: Sequence[int]) -> Losses:
        """Only the rows of these numbers; ValueError for a row that is not there."""
        places = self.places(numbers)
        return Losses(self.nll[places], self.tokens[places], np.array(numbers, dtype=np.int64))


@dataclass(frozen=True)
class Answers(_ByRow):
    """Per row: the answer given and whether it was right; ``rows`` as in :class:`Losses`."""

    given: list[Any]
    correct: Flags
    rows: Integers = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        self._number(len(self.given), len(self.correct))

    def accuracy(self, numbers: Sequence[int] | None = None) -> Interval:
        """Accuracy over all rows, or over those of these numbers."""
        correct = self.correct if numbers is None else self.correct[self.places(numbers)]
        return wilson(int(correct.sum()), len(correct))


def evaluate_loss(
    model: nn.Module, batches: Sequence[Batch], on_rows: OnRows | None = None
) -> Losses:
    """Loss of every row of the batches, in order; the loss is :func:`~floe.data.loss.row_losses`.

    ``on_rows`` is called after each batch with the number of its rows.

    Raises:
        ValueError: if there is no batch.
        FloatingPointError: if a row's loss is NaN or infinite.
    """
    if not batches:
        raise ValueError("batches must not be empty")
    with evaluating(model):
        parts = []
        for batch in batches:
            parts.append(batch_losses(model, batch))
            if on_rows is not None:
                on_rows(len(parts[-1][1]))
    nll = torch.cat([values.double().cpu() for values, _ in parts])
    losses = Losses(nll.numpy(), torch.cat([counts.cpu() for _, counts in parts]).numpy())
    bad = np.flatnonzero(~np.isfinite(losses.nll))
    if len(bad):
        raise FloatingPointError(
            f"the loss of row {bad[0]} must be finite, got {losses.nll[bad[0]]}"
        )
    return losses


def evaluate_rows(
    model: nn.Module,
    rows: Sequence[TokenRow],
    batch_size: int = 16,
    pad_id: int = 0,
    on_rows: OnRows | None = None,
) -> Losses:
    """Loss of every row, in the order of the rows whatever the batching, with their ``index``."""
    batches = make_batches(rows, batch_size, Collator.for_model(model, pad_id))
    losses = evaluate_loss(model, batches, on_rows).take(np.argsort(row_order(rows)).tolist())
    return replace(losses, rows=np.array([row.index for row in rows], dtype=np.int64))


def validation_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Token-weighted mean loss of the batches, nats per target token."""
    return mean_loss(evaluate_loss(model, batches))


def summarise_loss(losses: Losses, *, resamples: int = RESAMPLES, seed: int = 41) -> Interval:
    """Token-weighted mean and its percentile bootstrap interval over rows.

    Raises:
        ValueError: if there is no row or no target token.
    """
    value = mean_loss(losses)
    low, high = _interval(losses, losses.nll, resamples, seed)
    return Interval(value, low, high, len(losses.nll), tokens=int(losses.tokens.sum()))


def paired_difference(
    a: Losses, b: Losses, *, resamples: int = RESAMPLES, seed: int = 41
) -> Interval:
    """Mean loss of ``a`` minus that of ``b`` on the same rows; both arms share every resample.

    Raises:
        ValueError: if the rows differ.
    """
    if not (np.array_equal(a.tokens, b.tokens) and np.array_equal(a.rows, b.rows)):
        raise ValueError("a and b must be losses of the same rows, got other numbers or tokens")
    low, high = _interval(a, a.nll - b.nll, resamples, seed)
    return Interval(mean_loss(a) - mean_loss(b), low, high, len(a.nll))


def mean_loss(losses: Losses) -> float:
    """Summed loss over summed target tokens, nats per token; ValueError without any token."""
    if losses.tokens.sum() == 0:
        raise ValueError("losses must cover at least one target token, got none")
    return float(losses.nll.sum() / losses.tokens.sum())


def _interval(losses: Losses, sums: Floats, resamples: int, seed: int) -> tuple[float, float]:
    require(resamples >= 1, "resamples must be at least 1", resamples)
    rng, count = np.random.default_rng(seed), len(sums)
    means: list[Floats] = []
    at_once = max(1, 4_000_000 // count)
    for start in range(0, resamples, at_once):
        drawn = rng.integers(0, count, (min(at_once, resamples - start), count))
        # A resample of rows without any target has no mean; it leaves the interval.
        tokens = losses.tokens[drawn].sum(1)
        means.append(sums[drawn].sum(1)[tokens > 0] / tokens[tokens > 0])
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def wilson(correct: int, rows: int) -> Interval:
    """Share ``correct / rows`` with its 95 % Wilson score interval.

    Raises:
        ValueError: unless 0 <= correct <= rows and rows >= 1.
    """
    if not (0 <= correct <= rows and rows >= 1):
        raise ValueError(f"correct must be in [0, rows] with rows >= 1, got {correct} of {rows}")
    share, spread = correct / rows, _Z * _Z / rows
    middle = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / rows + spread / (4 * rows)) / (1 + spread)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Interval(share, low, high, rows, correct=correct)


def group_by_task(rows: Sequence[TokenRow]) -> dict[str, list[int]]:
    """Numbers (``index``) of the rows of each task, tasks sorted; rows without one are left out."""
    groups: dict[str, list[int]] = {}
    for row in rows:
        if row.task is not None:
            groups.setdefault(row.task, []).append(row.index)
    return dict(sorted(groups.items()))


def evaluate_choices(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    max_length: int = 1024,
    batch_size: int = 16,
    score: Literal["mean", "sum"] = "mean",
    source: str = "rows",
    on_rows: OnRows | None = None,
) -> Answers:
    """Answer each row by the choice most likely after its prompt; ties go to the lower index.

    ``score="mean"`` compares log-likelihood per token of the choice (eos not counted), ``"sum"``
    the total. Long prompts lose their left, the same for all of a row's choices. ``on_rows`` as in
    :func:`evaluate_loss`, with choices for rows.

    Returns:
        ``given``: the index chosen per row.

    Raises:
        ValueError: for another ``score`` or no rows.
        DataError: for a row without choices, or with one that does not fit in ``max_length``.
    """
    require(score in ("mean", "sum"), "score must be 'mean' or 'sum'", score)
    if not rows:
        raise ValueError("rows must not be empty")
    encoded = encode_choices(
        rows, tokenizer, template=template, max_length=max_length, source=source
    )
    dropped = [place for places in encoded.dropped.values() for place in places]
    if dropped:
        message = f"prompt and choices must hold tokens and fit in max_length={max_length}"
        raise DataError(source, message, min(dropped))
    pad = tokenizer.pad_token_id or 0
    losses = evaluate_rows(model, encoded.rows, batch_size, pad, on_rows)
    values = -losses.nll / (losses.tokens if score == "mean" else 1)
    starts = np.cumsum([0] + [len(row["choices"]) for row in rows])
    given = [int(np.argmax(values[start:stop])) for start, stop in pairwise(starts)]
    right = [row["answer"] == answer for row, answer in zip(rows, given, strict=True)]
    return Answers(given, np.array(right, dtype=bool))


def evaluate_generation(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    max_length: int = 1024,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    source: str = "rows",
    on_rows: OnRows | None = None,
) -> Answers:
    """Answer each row by greedy generation; right if it equals the completion, blanks aside.

    An answer ends at the first of eos, the model's own stop tokens (``generation_config``) and the
    chat template's end of turn. Nothing else of the ``generation_config`` is used: no penalties, no
    least length. Runs of white space are compared as one blank, and none at the ends.

    Returns:
        ``given``: the generated text per row, without special tokens.

    Raises:
        ValueError: for no rows, or ``max_new_tokens`` outside [1, max_length).
        DataError: for a row without a prompt.
    """
    if not rows:
        raise ValueError("rows must not be empty")
    encoded = encode_questions(
        rows,
        tokenizer,
        template=template,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        source=source,
    )
    for places in encoded.dropped.values():
        raise DataError(source, "prompt must hold at least one token", places[0])
    stops = _stop_tokens(model, tokenizer, template)
    given = [""] * len(rows)
    order = row_order(encoded.rows)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            asked = [encoded.rows[i] for i in places]
            texts = _generate(model, tokenizer, asked, max_new_tokens, stops)
            for place, text in zip(places, texts, strict=True):
                given[place] = text
            if on_rows is not None:
                on_rows(len(places))
    pairs = zip(given, rows, strict=True)
    right = [text.split() == row["completion"].split() for text, row in pairs]
    return Answers(given, np.array(right, dtype=bool))


def _stop_tokens(model: nn.Module, tokenizer: Any, template: str | None) -> list[int]:
    ends = getattr(getattr(base_of(model), "generation_config", None), "eos_token_id", None)
    listed = ends if isinstance(ends, list | tuple) else [ends]
    return sorted({*stop_tokens(tokenizer, template), *(t for t in listed if t is not None)})


def _generate(
    model: Any, tokenizer: Any, rows: list[TokenRow], max_new_tokens: int, stops: list[int]
) -> list[str]:
    from transformers import GenerationConfig

    pad = next((t for t in (tokenizer.pad_token_id, *stops) if t is not None), 0)
    batch = on_device(Collator(pad, keep_logits=False)(rows), model)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=stops or None,
        use_cache=True,
    )
    base: Any = base_of(model)
    before = base.generation_config
    base.generation_config = settings  # generate() fills what is not set here from the model's own
    try:
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=settings,
        )
    finally:
        base.generation_config = before
    new = out[:, batch["input_ids"].shape[1] :].tolist()
    ends = (next((i for i, token in enumerate(row) if token in stops), None) for row in new)
    answers = [row[:end] for row, end in zip(new, ends, strict=True)]
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def router_statistics(model: nn.Module, batches: Sequence[Batch]) -> list[Router]:
    """Use of the experts by each adapted module over all tokens that are not padding.

    With gates w[t, i] of token t and expert i: usage = mean_t w[t]; load entropy = H(usage) / ln M;
    token entropy = mean_t H(w[t]) / ln M; mutual information = their difference: 0 when every token
    is routed alike. With one expert both entropies are 1.

    Args:
        model: an adapted model; its active adapter is looked at.
        batches: as :func:`floe.data.batches.make_batches` makes them.

    Returns:
        One per module, by layer then module name.

    Raises:
        ValueError: if nothing is adapted or there is no batch.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model must have adapted layers, got none")
    if not batches:
        raise ValueError("batches must not be empty")
    uses: list[GateUse] = []
    mask: list[Tensor] = []
    with ExitStack() as hooks, evaluating(model):
        for layer, modules in sorted(layers.items()):
            for name, module in sorted(modules.items()):
                uses.append(GateUse(layer, name))
                hook = partial(_observe, uses[-1], module, mask)
                hooks.callback(module.register_forward_pre_hook(hook).remove)
        for batch in batches:
            inputs = on_device(batch, model)
            inputs.pop("labels", None)
            mask[:] = [inputs["attention_mask"].bool()]
            model(**inputs, use_cache=False)
    return [use.router() for use in uses]


def _observe(
    use: GateUse, linear: MoELoRALinear, mask: list[Tensor], _: nn.Module, args: tuple[Any, ...]
) -> None:
    x: Tensor = args[0][mask[0]]  # [P, K]: tokens that are not padding
    use.add(linear.gates(linear.active_adapters[0], x))


@dataclass
class GateUse:
    """Sums over the gates of one module's tokens, and the statistics of its router from them."""

    layer: int
    module: str
    usage: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))  # [M]: sum
    entropy: float = 0.0
    tokens: int = 0

    def add(self, gates: Tensor) -> None:
        """Count gates [T, M] of any floating dtype."""
        gates = gates.double()
        self.usage = self.usage + gates.sum(0).cpu()
        self.entropy += float(_entropy(gates).sum())
        self.tokens += len(gates)

    def router(self) -> Router:
        """The statistics of :func:`router_statistics` over all gates so far."""
        usage = self.usage / self.tokens
        scale = math.log(len(usage))
        load = float(_entropy(usage)) / scale if scale else 1.0
        token = self.entropy / self.tokens / scale if scale else 1.0
        return Router(self.layer, self.module, tuple(usage.tolist()), load, token, load - token)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)
