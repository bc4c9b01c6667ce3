"""Running a model block by block: record how each block is called, then call it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from floe.data.loss import losses, on_device, token_mask
from floe.decoder_blocks import Block
from floe.types import Batch


@dataclass
class Call:
    """How one block was called on one batch: hidden states [S, T, d] and what came along."""

    hidden: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class BackwardRecord:
    """One batch on its way back: its blocks' calls and the gradient of the next block's output.

    ``real`` is True at tokens, bool [S, T]; ``tokens`` counts the labels in the loss.
    """

    calls: list[Call]
    gradient: Tensor
    real: Tensor
    tokens: int


class CallRecorder:
    """Records, on the CPU, every block's call during the forwards made within it.

    Tensors shared by the blocks (attention masks, rotary tables) are kept once per forward.

    Args:
        blocks: the decoder blocks in order. keep: indices of the blocks whose hidden states are
            kept; None = all.
    """

    def __init__(self, blocks: list[Block], keep: set[int] | None = None) -> None:
        self.blocks, self.keep = blocks, keep
        self._calls: dict[int, Call] = {}
        self._moved: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # the original is held so its id stays its own
        self._hooks: list[Any] = []

    def __enter__(self) -> CallRecorder:
        for block in self.blocks:
            hook = self._hook_for(block.index)
            self._hooks.append(block.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> list[Call]:
        """The calls of the forward just made, one per block."""
        missing = [block.index for block in self.blocks if block.index not in self._calls]
        if missing:
            raise RuntimeError(f"the model's forward did not call its blocks {missing} as modules")
        calls = [self._calls[block.index] for block in self.blocks]
        self._calls, self._moved = {}, {}
        return calls

    def _hook_for(self, index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            kept = self.keep is None or index in self.keep
            self._calls[index] = Call(
                hidden.detach().cpu() if kept else None,
                tuple(self._offload(a) for a in args[1:]),
                {name: self._offload(value) for name, value in rest.items()},
            )

        return hook

    def _offload(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._moved:
                self._moved[id(value)] = (value, value.detach().cpu())
            return self._moved[id(value)][1]
        return _map(self._offload, value)


def record_backward(
    model: nn.Module, blocks: list[Block], batch: Batch, rows: int | Sequence[int]
) -> BackwardRecord:
    """One forward; only what follows the last block (norm, head, loss) is differentiated.

    The gradient is that of the sum of the rows' mean losses; ``rows`` numbers them in errors.
    """
    batch = on_device(batch, model)
    leaf: list[Tensor] = []

    def cut(_module: nn.Module, _args: object, output: object) -> object:
        leaf.append(hidden_of(output).detach().requires_grad_())
        return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

    hook = blocks[-1].module.register_forward_hook(cut)
    try:
        with CallRecorder(blocks) as recorder, torch.enable_grad():
            loss, tokens = losses(model, batch, rows)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            calls = recorder.take()
            return BackwardRecord(calls, gradient.cpu(), token_mask(batch), int(tokens.sum()))
    finally:
        hook.remove()


def call_block(block: Block, call: Call, hidden: Tensor) -> Tensor:
    """The block's output [S, T, d] on ``hidden``, with everything else as recorded."""

    def move(value: Any) -> Any:
        return value.to(hidden.device) if isinstance(value, Tensor) else _map(move, value)

    kwargs = {name: move(value) for name, value in call.kwargs.items()}
    return hidden_of(block.module(hidden, *(move(a) for a in call.args), **kwargs))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output, which older models return as the first of a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def device_of_block(block: Block) -> torch.device:
    """Where the block's parameters are."""
    return next(block.module.parameters()).device


def _map(function: Any, value: Any) -> Any:
    """``function`` on the members of tuples, lists and dicts; anything else unchanged."""
    if isinstance(value, (tuple, list)):
        return type(value)(function(v) for v in value)
    if isinstance(value, Mapping):
        return {name: function(v) for name, v in value.items()}
    return value
