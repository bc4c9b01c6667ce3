"""What every measurement shares: a frozen model in eval mode and the loss of each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from floe.data.loss import row_losses
from floe.decoder_blocks import base_of, find_blocks
from floe.types import Batch


@contextmanager
def frozen(model: nn.Module, input_gradients: bool = False) -> Iterator[None]:
    """Eval mode without one trainable parameter; all flags come back as they were.

    With ``input_gradients`` the embeddings' output requires a gradient, so gradients reach the
    first layer's masks although no parameter asks for one. A layer with gradient checkpointing then
    keeps using it: transformers ties that to the layer's own training flag, which is left on for
    that layer alone, not for the dropout below.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks = [_require_gradients(embeddings_of(model))] if input_gradients else []
    try:
        model.eval()
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        for block in find_blocks(model) if input_gradients else []:
            block.module.training = bool(getattr(block.module, "gradient_checkpointing", False))
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


def device_of(model: nn.Module) -> torch.device:
    """Where the model expects its input ids."""
    return next(embeddings_of(model).parameters()).device


def embeddings_of(model: nn.Module) -> nn.Module:
    """The module that turns input ids into hidden states."""
    base: Any = base_of(model)
    embeddings: nn.Module = base.get_input_embeddings()
    return embeddings


def _require_gradients(module: nn.Module) -> RemovableHandle:
    return module.register_forward_hook(lambda _m, _i, output: output.detach().requires_grad_())


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def token_mask(batch: Batch) -> Tensor:
    """True at real tokens, bool [S, T]; without an attention mask every token is real."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def all_token_labels(batch: Batch) -> Tensor:
    """Each real token that follows a real token as its own label, int64 [S, T]; else -100."""
    real = token_mask(batch)
    labels: Tensor = batch["input_ids"].masked_fill(~real, -100)
    labels[:, 1:].masked_fill_(~real[:, :-1], -100)  # a first token is predicted from nothing
    labels[:, 0] = -100
    return labels


def for_loss(batch: Batch, tokens: str) -> dict[str, Any]:
    """The batch whose loss is over its response tokens, or over all tokens of its rows.

    Raises:
        ValueError: ``tokens`` is neither "response" nor "all", or labels are missing.
    """
    if tokens not in ("response", "all"):
        raise ValueError(f'tokens must be "response" or "all", got {tokens!r}')
    if tokens == "all":
        kept = {k: v for k, v in batch.items() if k != "logits_to_keep"}
        return kept | {"labels": all_token_labels(batch)}
    if batch.get("labels") is None:
        raise ValueError('batch must hold "labels" for a loss over response tokens, got none')
    return dict(batch)


def losses(model: nn.Module, batch: Batch, rows: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean NLL of each row's labelled tokens, float [S] in nats, and how many they are, int64 [S].

    Raises:
        ValueError: a row has no label to learn from, or its loss is not finite; ``rows`` are the
            rows' numbers, or the first one's.
    """
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs, use_cache=False).logits
    nll, tokens = row_losses(logits, batch["labels"])
    for problem, rule in ((tokens == 0, "at least one label"), (~nll.isfinite(), "a finite loss")):
        if bool(problem.any()):
            row = int(problem.nonzero()[0, 0])
            number = rows + row if isinstance(rows, int) else rows[row]
            came = f"{nll[row].item()} nats over {tokens[row].item()} tokens"
            raise ValueError(f"row {number} must have {rule}, got {came}")
    return nll / tokens, tokens
