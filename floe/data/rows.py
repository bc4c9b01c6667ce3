"""Tokenised rows and batches: labels from structure, left padding, logits only where needed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from floe.data.chat import ChatTemplate, Turn
from floe.data.loss import IGNORE_INDEX
from floe.data.sources import load_rows
from floe.errors import DataError
from floe.types import Batch

__all__ = [
    "Collator",
    "Encoded",
    "TokenRow",
    "accepts_logits_to_keep",
    "encode",
    "encode_choices",
    "encode_prompt",
    "encode_questions",
    "fingerprint",
    "load_rows",
    "make_batches",
    "row_order",
    "rows_of_both",
    "sample",
    "shorten_prompt",
    "split",
    "stop_tokens",
    "to_device",
]

Item = TypeVar("Item")
Rows = Sequence[Mapping[str, Any]] | Mapping[int, Mapping[str, Any]]

# Why a row is dropped.
NO_COMPLETION = "without a completion"
NO_PROMPT = "without a prompt"
NO_CHOICE = "with a choice of no tokens"
TOO_LONG = "too long for max_length"


@dataclass(frozen=True)
class TokenRow:
    """One tokenised row: ``prompt`` then ``response`` (in training rows with its end, eos).

    ``index`` is the row's place in the data it came from; ``task`` groups rows in the evaluation.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    index: int = 0
    task: str | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def labels(self) -> tuple[int, ...]:
        """The response's tokens in place, -100 elsewhere; a row's first token is never a target."""
        labels = (IGNORE_INDEX,) * len(self.prompt) + self.response
        return (IGNORE_INDEX, *labels[1:])

    @property
    def targets(self) -> int:
        """Number of tokens that carry loss."""
        return len(self.response) - (0 if self.prompt else 1)


@dataclass(frozen=True)
class Encoded:
    """What encoding made of a data set, and what it left out.

    ``rows``: what is used. ``given``: how many rows came. ``dropped``: reason -> numbers of the
    rows left out for it, each row under one reason. ``cut``: numbers of the used rows whose prompt
    lost its left. A row's number is its 0-based place in its data.
    """

    rows: list[TokenRow]
    given: int
    dropped: dict[str, list[int]]
    cut: list[int]

    @property
    def lost(self) -> int:
        """How many rows were left out."""
        return sum(len(numbers) for numbers in self.dropped.values())


def encode(
    rows: Rows,
    tokenizer: Any,
    *,
    template: str | None = None,
    max_length: int = 1024,
    source: str = "rows",
) -> Encoded:
    """Tokenise prompt and completion rows for training and loss evaluation.

    A row becomes ``[bos] prompt completion eos``; the loss is on ``completion eos``. Under a chat
    template a row is all that the template writes for question and answer, and eos where that does
    not hold it; the loss is on the answer and all that follows. Too long a row loses the left of
    its prompt (bos stays), never a part of its response; a row whose response and one token before
    it do not fit is dropped, as is one with an empty completion. All are listed.

    Args:
        rows: as :func:`load_rows` gives them, or some of those by their numbers.
        tokenizer: a ``transformers`` tokenizer with an eos token.
        template: None or ``"none"``, ``"chat"`` (the tokenizer's chat template, one user turn), or
            any text with ``{prompt}`` in it. Where a chat template writes today's date, it is given
            a fixed one.
        max_length: tokens per row, prompt and response with eos.
        source: what to call the data in errors.

    Raises:
        ValueError: for a template without ``{prompt}``, a tokenizer without eos or chat template.
        DataError: for a row with a lone surrogate, or one that the chat template refuses or does
            not write as it is; if no row is left: the text names the setting to change.
    """
    _check_length(max_length)
    writer = _Writer(tokenizer, template)
    if template != "chat" and tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an eos token, got None")

    def one(row: Mapping[str, Any]) -> _Written | str:
        if not row["completion"].strip():
            return NO_COMPLETION
        prompt, bos, response = writer.row(row["prompt"], row["completion"], end=True)
        return (prompt, bos, [response]) if response else NO_COMPLETION

    encoded = _encode(rows, one, max_length, source)
    _check_some_left(encoded, max_length, source)
    return encoded


def encode_choices(
    rows: Rows,
    tokenizer: Any,
    *,
    template: str | None = None,
    max_length: int = 1024,
    source: str = "rows",
) -> Encoded:
    """Tokenise every choice of every row after its prompt, without an end.

    The result has one entry a choice, in order, its row's number as ``index``; a row whose choices
    do not all fit, or whose prompt or a choice has no tokens, is dropped.

    Raises:
        ValueError, DataError: as :func:`encode`, and DataError for a row without choices; not if
            no row is left.
    """
    _check_length(max_length)
    writer = _Writer(tokenizer, template)

    def one(row: Mapping[str, Any]) -> _Written | str:
        if "choices" not in row:
            raise ValueError("must have choices and answer")
        written = [writer.row(row["prompt"], text, end=False) for text in row["choices"]]
        prompt, bos, _ = written[0]
        choices = [choice for *_, choice in written]
        if not prompt:
            return NO_PROMPT
        return (prompt, bos, choices) if all(choices) else NO_CHOICE

    return _encode(rows, one, max_length, source)


def encode_questions(
    rows: Rows,
    tokenizer: Any,
    *,
    template: str | None = None,
    max_length: int = 1024,
    max_new_tokens: int = 32,
    source: str = "rows",
) -> Encoded:
    """Tokenise the prompts alone, cut to leave ``max_new_tokens`` of ``max_length`` to an answer.

    A row whose prompt has no tokens is dropped.

    Raises:
        ValueError, DataError: as :func:`encode`; not if no row is left.
    """
    _check_length(max_length)
    if not 1 <= max_new_tokens < max_length:
        raise ValueError(f"max_new_tokens must be in [1, {max_length - 1}], got {max_new_tokens}")
    writer = _Writer(tokenizer, template)

    def one(row: Mapping[str, Any]) -> _Written | str:
        prompt, bos = writer.prompt(row["prompt"])
        return (prompt, bos, [()]) if prompt else NO_PROMPT

    return _encode(rows, one, max_length - max_new_tokens, source)


def rows_of_both(first: Encoded, second: Encoded, max_length: int, source: str) -> Encoded:
    """The first's rows without those the second dropped; both are encodings of the same data.

    Raises:
        DataError: if no row is left.
    """
    gone = {number for numbers in first.dropped.values() for number in numbers}
    dropped = {reason: [*numbers] for reason, numbers in first.dropped.items()}
    for reason, numbers in second.dropped.items():
        new = {*numbers} - gone
        if new:
            dropped[reason] = sorted(new | {*dropped.get(reason, [])})
    out = {number for numbers in dropped.values() for number in numbers}
    rows = [row for row in first.rows if row.index not in out]
    both = Encoded(rows, first.given, dropped, sorted({*first.cut, *second.cut} - out))
    _check_some_left(both, max_length, source)
    return both


def encode_prompt(
    prompt: str, tokenizer: Any, template: str | None = None
) -> tuple[tuple[int, ...], bool]:
    """Tokens of a prompt under a template, and whether the first is a bos."""
    return _Writer(tokenizer, template).prompt(prompt)


def stop_tokens(tokenizer: Any, template: str | None = None) -> list[int]:
    """The tokens that end an answer: eos, and the chat template's end of turn, if it is a token."""
    writer = _Writer(tokenizer, template)
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if writer.chat is not None:
        ending = writer.tokens(writer.chat.ending())
        stops += [token for token in ending if token in writer.marks][:1]
    return sorted(set(stops))


_Tokens = tuple[int, ...]
_Written = tuple[_Tokens, bool, list[_Tokens]]  # prompt, whether it begins with bos, responses


def _encode(
    rows: Rows, one: Callable[[Mapping[str, Any]], _Written | str], longest: int, source: str
) -> Encoded:
    """Every row as ``one`` writes it, or dropped for the reason that it gives instead."""
    kept: list[TokenRow] = []
    dropped: dict[str, list[int]] = {}
    cut: list[int] = []
    for number, row in rows.items() if isinstance(rows, Mapping) else enumerate(rows):
        try:
            found = one(row)
        except ValueError as error:
            raise DataError(source, str(error), number) from error
        if not isinstance(found, str):
            prompt, bos, responses = found
            room = longest - max(len(response) for response in responses)
            if room >= 1:
                short = shorten_prompt(prompt, room, bos)
                kept += [
                    TokenRow(short, response, number, row.get("task")) for response in responses
                ]
                cut += [number] if len(prompt) > room else []
                continue
            found = TOO_LONG
        dropped.setdefault(found, []).append(number)
    return Encoded(kept, len(rows), dropped, cut)


def _check_some_left(encoded: Encoded, max_length: int, source: str) -> None:
    if not encoded.rows:
        reasons = ", ".join(f"{len(rows)} {reason}" for reason, rows in encoded.dropped.items())
        message = f"no row with a target is left of {encoded.given}: {reasons}"
        raise DataError(source, f"{message} (max_length={max_length})")


class _Writer:
    """Prompts and answers as tokens, under one template."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.chat = ChatTemplate(tokenizer) if template == "chat" else None
        self.marks = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
        self._frame = "{prompt}" if template in (None, "none", "chat") else str(template)
        if "{prompt}" not in self._frame:
            raise ValueError(f"template must be none, chat or hold {{prompt}}, got {template!r}")

    def tokens(self, text: str) -> _Tokens:
        """Tokens of a text, none added."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r} at character {error.start}"
            raise ValueError(f"text must be Unicode, got the lone surrogate {found}") from error
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, prompt: str) -> tuple[_Tokens, bool]:
        """Tokens up to where the answer begins, and whether the first is a bos."""
        if self.chat is not None:
            return self._opening(self.chat.turn(prompt))
        bos = self.tokenizer.bos_token_id
        text = self._frame.replace("{prompt}", prompt)
        tokens = self.tokens(text)
        with_special = self.tokenizer(text, add_special_tokens=True)["input_ids"]
        if bos is None or with_special[:1] != [bos]:
            return tokens, False
        return (tokens if tokens[:1] == (bos,) else (bos, *tokens)), True

    def _opening(self, turn: Turn) -> tuple[_Tokens, bool]:
        """Tokens before an answer; a chat template writes bos itself, where the model wants it."""
        tokens, bos = self.tokens(turn.opening), self.tokenizer.bos_token_id
        return tokens, bos is not None and tokens[:1] == (bos,)

    def row(self, prompt: str, answer: str, *, end: bool) -> tuple[_Tokens, bool, _Tokens]:
        """:meth:`prompt`, and the answer's tokens with their ``end``; none for an empty answer."""
        eos = self.tokenizer.eos_token_id
        if self.chat is None:
            tokens = self.tokens(answer)
            return *self.prompt(prompt), (*tokens, eos) if end and tokens else tokens
        turn = self.chat.turn(prompt, answer)
        opening, bos = self._opening(turn)
        if not self.tokens(turn.answer):
            return opening, bos, ()
        written = turn.answer + (turn.ending if end else "")
        tokens = self.tokens(turn.opening + written)
        # What follows the prompt in one piece; if a token would lie across, the answer on its own.
        whole = tokens[: len(opening)] == opening
        tokens = tokens[len(opening) :] if whole else self.tokens(written)
        ending = {*self.tokens(turn.ending)} if end else set()
        if end and eos is None and not ending & self.marks:
            raise ValueError("tokenizer must have an eos token, got None")
        # Also a runtime that knows no end but eos is to stop.
        return opening, bos, (*tokens, eos) if end and eos not in {None, *ending} else tokens


def shorten_prompt(prompt: tuple[int, ...], room: int, bos: bool) -> tuple[int, ...]:
    """The last ``room`` tokens; with ``bos`` the first token stays and the last ``room - 1``."""
    if len(prompt) <= room:
        return prompt
    if bos:
        return (prompt[0], *prompt[len(prompt) - room + 1 :])
    return prompt[len(prompt) - room :]


def _check_length(max_length: int) -> None:
    if isinstance(max_length, bool) or not isinstance(max_length, int):
        raise TypeError(f"max_length must be an int, got {type(max_length).__name__}")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")


def accepts_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model's own forward (under any PEFT wrapper) can compute the last logits only."""
    inner: Any = model
    inner = inner.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


@dataclass(frozen=True)
class Collator:
    """Turns rows into a batch that goes straight to a Hugging Face causal model.

    ``input_ids``, ``attention_mask`` and ``position_ids`` are int64 ``[S, T]``, padded on the left;
    positions count real tokens, so padding changes no answer, and ``pad_id`` is never read as a
    target. With ``keep_logits`` the batch has ``logits_to_keep``, the last T' = longest response
    + 1 positions, int64 ``[T']``, and its ``labels`` are int64 ``[S, T']``; otherwise ``[S, T]``.
    (Positions, not a number: a model slices by a number, and on the CPU the product of a sliced
    tensor with the vocabulary copies the whole weight once a row.)
    """

    pad_id: int = 0
    keep_logits: bool = True

    @classmethod
    def for_model(cls, model: nn.Module, pad_id: int = 0) -> Collator:
        """The collator whose batches the model accepts."""
        return cls(pad_id, accepts_logits_to_keep(model))

    def __call__(self, rows: Sequence[TokenRow]) -> Batch:
        """Build one batch; the rows must not be empty."""
        if not rows or not all(len(row) for row in rows):
            raise ValueError("a batch needs at least one row, each with at least one token")
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for s, row in enumerate(rows):
            ids[s, width - len(row) :] = torch.tensor(row.prompt + row.response)
            mask[s, width - len(row) :] = 1
            labels[s, width - len(row) :] = torch.tensor(row.labels)
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "labels": labels,
        }
        if self.keep_logits:
            kept = min(width, 1 + max(len(row.response) for row in rows))
            batch["labels"] = labels[:, width - kept :].contiguous()
            batch["logits_to_keep"] = torch.arange(width - kept, width)
        return batch


def row_order(rows: Sequence[TokenRow], sort_by_length: bool = True) -> list[int]:
    """The order of rows in :func:`make_batches`: longest first, ties by place; or as they are."""
    if not sort_by_length:
        return list(range(len(rows)))
    return sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))


def make_batches(
    rows: Sequence[TokenRow],
    batch_size: int,
    sort_by_length: bool = True,
    collator: Collator | None = None,
) -> list[Batch]:
    """Cut the rows into batches of at most ``batch_size``, in the order of :func:`row_order`.

    Raises:
        ValueError: if ``batch_size`` is not positive or there is no row.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not rows:
        raise ValueError("rows must not be empty")
    collator = collator or Collator()
    order = row_order(rows, sort_by_length)
    return [
        collator([rows[i] for i in order[start : start + batch_size]])
        for start in range(0, len(order), batch_size)
    ]


def split(rows: Sequence[Item], fraction: float, seed: int = 41) -> tuple[list[Item], list[Item]]:
    """Hold out ``fraction`` of the rows (rounded, at least one): ``(kept, held out)``, in order.

    Raises:
        ValueError: if the fraction is not inside (0, 1) or one side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be inside (0, 1), got {fraction}")
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise ValueError(f"rows must be at least 2 to hold {fraction} of them out, got {len(rows)}")
    held = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    return (
        [row for i, row in enumerate(rows) if i not in held],
        [row for i, row in enumerate(rows) if i in held],
    )


def sample(rows: Sequence[Item], n: int, seed: int = 41) -> list[Item]:
    """``n`` rows drawn without replacement, in row order; all of them if there are no more.

    For one seed a smaller sample is a part of every larger one.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    chosen = np.random.default_rng(seed).permutation(len(rows))[:n]
    return [rows[i] for i in sorted(chosen.tolist())]


def fingerprint(rows: Iterable[TokenRow]) -> str:
    """SHA-256 of the rows' tokens and their split into prompt and response, in order."""
    digest = hashlib.sha256()
    for row in rows:
        head = np.array([len(row.prompt), len(row.response)], dtype="<i8")
        digest.update(head.tobytes() + np.array(row.prompt + row.response, dtype="<i8").tobytes())
    return digest.hexdigest()


def to_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
