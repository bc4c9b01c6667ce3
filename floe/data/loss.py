"""The one loss of the package, the negative log-likelihood of each row, and how it is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from floe.decoder_blocks import base_of, find_blocks
from floe.errors import require
from floe.types import Batch

IGNORE_INDEX = -100
_CHUNK_ELEMENTS = 1 << 26  # of the float32 copy of the logits: 256 MiB at a time


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood and number of target tokens of each row.

    Position ``i`` predicts ``labels[:, i + 1]``; a label of -100 is no target, and the first label
    of a row never is one, since nothing predicts it. The arithmetic is float32 whatever the logits'
    dtype (float64 for float64 logits), and a row's sum does not depend on the rows beside it.

    Args:
        logits: ``[S, T, V]``, floating point, any device.
        labels: ``[S, T]``, int64, on the same device; vocabulary indices or -100.

    Returns:
        ``(nll, tokens)``: ``[S]`` float32 (float64 for float64 logits), in nats, differentiable in
        ``logits``, and ``[S]`` int64.

    Raises:
        TypeError: if ``logits`` is not floating point or ``labels`` not int64.
        ValueError: if the shapes do not fit, or a label is neither -100 nor in ``[0, V)``.
    """
    _check(logits, labels)
    targets = labels[:, 1:]
    wanted = targets != IGNORE_INDEX  # [S, T - 1]
    picked = logits[:, :-1][wanted]  # [P, V]; only target positions are copied to float32
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[-1]))
    chunks = zip(picked.split(rows_at_once), targets[wanted].split(rows_at_once), strict=True)
    parts = [
        functional.cross_entropy(part.to(wide), target, reduction="none") for part, target in chunks
    ]
    nll = torch.zeros(targets.shape, dtype=wide, device=logits.device)
    # Written to distinct places, then summed along the row: no atomics, so repeatable everywhere.
    nll = nll.masked_scatter(wanted, torch.cat(parts))
    return nll.sum(dim=1), wanted.sum(dim=1)


def _check(logits: Tensor, labels: Tensor) -> None:
    floating, whole = logits.is_floating_point(), labels.dtype == torch.int64
    require(floating, "logits must be floating point", logits.dtype, TypeError)
    require(whole, "labels must be int64", labels.dtype, TypeError)
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            "logits must be [S, T, V] and labels [S, T], "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if labels.numel() == 0:
        return
    low, high, vocabulary = int(labels.min()), int(labels.max()), logits.shape[-1]
    wrong = low < 0 and bool(((labels < 0) & (labels != IGNORE_INDEX)).any())
    require(not wrong, f"labels must be {IGNORE_INDEX} or >= 0", low)
    require(high < vocabulary, f"labels must be below the vocabulary size {vocabulary}", high)


@contextmanager
def evaluating(model: nn.Module, input_gradients: bool = False) -> Iterator[None]:
    """Eval mode, nothing trainable, no gradients but where they are enabled; then all as before.

    With ``input_gradients`` the embeddings' output requires a gradient, so gradients reach the
    first layer's masks although no parameter asks for one. A layer with gradient checkpointing then
    keeps using it: transformers ties that to the layer's own training flag, which is left on for
    that layer alone, not for the dropout below.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks = []
    if input_gradients:
        embeddings = _embeddings(model)
        hooks = [embeddings.register_forward_hook(lambda _m, _i, y: y.detach().requires_grad_())]
    try:
        model.eval()
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        for block in find_blocks(model) if input_gradients else []:
            block.module.training = bool(getattr(block.module, "gradient_checkpointing", False))
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training:
            module.training = flag
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """The base model alone: a PeftModel's adapters are off, a plain model is left as it is."""
    disable = getattr(model, "disable_adapter", None)
    if not callable(disable):
        yield
        return
    with disable():
        for parameter in model.parameters():  # switching adapters touches their flags; stay frozen
            parameter.requires_grad_(False)
        yield


def _embeddings(model: nn.Module) -> nn.Module:
    base: Any = base_of(model)
    embeddings: nn.Module = base.get_input_embeddings()
    return embeddings


def on_device(batch: Batch, model: nn.Module) -> dict[str, Any]:
    """The batch with its tensors where the model expects its input ids."""
    device = next(_embeddings(model).parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def token_mask(batch: Batch) -> Tensor:
    """True at real tokens, bool [S, T]; without an attention mask every token is real."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def all_token_labels(batch: Batch) -> Tensor:
    """Each real token that follows a real token as its own label, int64 [S, T]; else -100."""
    real = token_mask(batch)
    labels: Tensor = batch["input_ids"].masked_fill(~real, IGNORE_INDEX)
    labels[:, 1:].masked_fill_(~real[:, :-1], IGNORE_INDEX)  # a first token has no prediction
    labels[:, 0] = IGNORE_INDEX
    return labels


def for_loss(batch: Batch, tokens: str) -> dict[str, Any]:
    """The batch whose loss is over its response tokens, or over all tokens of its rows.

    Raises:
        ValueError: ``tokens`` is neither "response" nor "all", or labels are missing.
    """
    require(tokens in ("response", "all"), 'tokens must be "response" or "all"', tokens)
    if tokens == "all":
        kept = {k: v for k, v in batch.items() if k != "logits_to_keep"}
        return kept | {"labels": all_token_labels(batch)}
    if batch.get("labels") is None:
        raise ValueError('batch must hold "labels" for a loss over response tokens, got none')
    return dict(batch)


def batch_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """:func:`row_losses` of the model on one batch, in the model's current mode."""
    inputs = on_device(batch, model)
    labels = inputs.pop("labels")
    return row_losses(model(**inputs, use_cache=False).logits, labels)


def losses(model: nn.Module, batch: Batch, rows: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean NLL of each row's labelled tokens, float [S] in nats, and how many they are, int64 [S].

    Raises:
        ValueError: a row has no label to learn from, or its loss is not finite; ``rows`` are the
            rows' numbers, or the first one's.
    """
    nll, tokens = batch_losses(model, batch)
    for problem, rule in ((tokens == 0, "at least one label"), (~nll.isfinite(), "a finite loss")):
        if bool(problem.any()):
            row = int(problem.nonzero()[0, 0])
            number = rows + row if isinstance(rows, int) else rows[row]
            value = f"{nll[row].item()} nats over {tokens[row].item()} tokens"
            raise ValueError(f"row {number} must have {rule}, got {value}")
    return nll / tokens, tokens
