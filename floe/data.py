"""Tokenised rows and batches: labels from structure, left padding, logits only where needed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from floe.errors import DataError
from floe.losses import IGNORE_INDEX
from floe.readers import load_rows

__all__ = [
    "Collator",
    "Encoded",
    "TokenRow",
    "accepts_logits_to_keep",
    "encode",
    "encode_prompt",
    "encode_response",
    "fingerprint",
    "load_rows",
    "make_batches",
    "row_order",
    "sample",
    "shorten_prompt",
    "split",
    "to_device",
]

Batch = dict[str, Any]
Item = TypeVar("Item")
NO_COMPLETION, TOO_LONG = "without a completion", "too long for max_length"


@dataclass(frozen=True)
class TokenRow:
    """One tokenised row: ``prompt`` then ``response`` (which ends with eos in training rows).

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
    """What :func:`encode` made: the rows, and which lost what, by their place in what was given.

    ``dropped`` maps a reason to the rows that were left out for it; of the rows ``cut`` the prompt
    lost its left.
    """

    rows: list[TokenRow]
    dropped: dict[str, list[int]]
    cut: list[int]

    @property
    def given(self) -> int:
        """Number of rows that came."""
        return len(self.rows) + sum(map(len, self.dropped.values()))

    def losses(self) -> str:
        """What was lost, in words; empty if nothing was."""
        found = [f"{len(rows)} {reason}" for reason, rows in self.dropped.items() if rows]
        lost = f"{sum(map(len, self.dropped.values()))} dropped: {', '.join(found)}"
        cut = f"{len(self.cut)} cut at the left of the prompt" if self.cut else ""
        return "; ".join([lost] * bool(found) + [cut] * bool(cut))


def encode(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    template: str | None = None,
    max_length: int = 1024,
    source: str = "rows",
) -> Encoded:
    """Tokenise prompt and completion rows for training and loss evaluation.

    A row becomes ``[bos] prompt completion eos``; the loss is on ``completion eos``. Too long a row
    loses the left of its prompt (bos stays), never a part of its response; a row whose response and
    one token before it do not fit is dropped, as is one with an empty completion. All are counted.

    Args:
        rows: as :func:`load_rows` gives them.
        tokenizer: a ``transformers`` tokenizer with an eos token.
        template: None or ``"none"``, ``"chat"`` (the tokenizer's chat template, one user turn), or
            any text with ``{prompt}`` in it.
        max_length: tokens per row, prompt and response with eos.
        source: what to call the data in errors.

    Raises:
        ValueError: for a template without ``{prompt}``, a tokenizer without eos or chat template.
        DataError: if no row is left; the text names the setting to change.
    """
    _check_length(max_length)
    kept: list[TokenRow] = []
    dropped: dict[str, list[int]] = {NO_COMPLETION: [], TOO_LONG: []}
    cut: list[int] = []
    for index, row in enumerate(rows):
        if not row["completion"].strip():
            dropped[NO_COMPLETION].append(index)
            continue
        prompt, bos = encode_prompt(row["prompt"], tokenizer, template)
        response = encode_response(row["completion"], tokenizer, eos=True)
        room = max_length - len(response)
        if room < 1:
            dropped[TOO_LONG].append(index)
            continue
        if len(prompt) > room:
            cut.append(index)
        kept.append(TokenRow(shorten_prompt(prompt, room, bos), response, index, row.get("task")))
    found = Encoded(kept, dropped, cut)
    if not kept:
        message = f"no row with a target is left of {len(rows)}: {found.losses()}"
        raise DataError(source, f"{message} (max_length={max_length})")
    return found


def encode_prompt(
    prompt: str, tokenizer: Any, template: str | None = None
) -> tuple[tuple[int, ...], bool]:
    """Tokens of a prompt under a template, and whether the first is a bos the tokenizer added."""
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("template must not be 'chat' for a tokenizer without a chat template")
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return _tokens(text, tokenizer), False
    if template is not None and template != "none":
        if "{prompt}" not in template:
            raise ValueError(f"template must be none, chat or hold {{prompt}}, got {template!r}")
        prompt = template.replace("{prompt}", prompt)
    tokens = _tokens(prompt, tokenizer)
    bos = tokenizer.bos_token_id
    with_special = tokenizer(prompt, add_special_tokens=True)["input_ids"]
    if bos is not None and with_special[:1] == [bos] and tokens[:1] != (bos,):
        return (bos, *tokens), True
    return tokens, False


def encode_response(text: str, tokenizer: Any, *, eos: bool) -> tuple[int, ...]:
    """Tokens of a completion or an answer choice, and eos after them if asked."""
    tokens = _tokens(text, tokenizer)
    if not eos:
        return tokens
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an eos token, got None")
    return (*tokens, tokenizer.eos_token_id)


def _tokens(text: str, tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


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
        batch: Batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "labels": labels,
        }
        if self.keep_logits:
            kept = min(width, 1 + max(len(row.response) for row in rows))
            batch |= {"labels": labels[:, width - kept :].contiguous(),
                      "logits_to_keep": torch.arange(width - kept, width)}  # fmt: skip
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


def to_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """The batch with its tensors on ``device``."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
