"""Running a model block by block: record how each block is called, then call it alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from floe.data.batches import accepts_logits_to_keep
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

    Tensors shared by the blocks (attention masks, rotary tables) are kept once per forward. Hidden
    states are kept of the blocks whose indices are in ``keep``; None = of all.
    """

    def __init__(self, blocks: list[Block], keep: set[int] | None = None) -> None:
        self.blocks, self.keep = blocks, keep
        self._calls: dict[int, Call] = {}
        # By id; the original is held so that its id stays its own.
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> CallRecorder:
        for block in self.blocks:
            hook = partial(self._record, block.index)
            handle = block.module.register_forward_pre_hook(hook, with_kwargs=True)
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def take(self) -> list[Call]:
        """The calls of the forward just made, one per block."""
        missing = [block.index for block in self.blocks if block.index not in self._calls]
        if missing:
            raise RuntimeError(f"the model's forward did not call its blocks {missing} as modules")
        calls = [self._calls[block.index] for block in self.blocks]
        self._calls, self._moved = {}, {}
        return calls

    def _record(self, index: int, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        kept = self.keep is None or index in self.keep
        args, rest = tree_map_only(Tensor, self._offload, (args[1:], rest))
        self._calls[index] = Call(hidden.detach().cpu() if kept else None, args, rest)

    def _offload(self, value: Tensor) -> Tensor:
        if id(value) not in self._moved:
            self._moved[id(value)] = (value, value.detach().cpu())
        return self._moved[id(value)][1]


def record_calls(model: nn.Module, blocks: list[Block], batch: Batch) -> tuple[list[Call], Tensor]:
    """One forward: the blocks' calls without hidden states, and the first's input, [S, T, d]."""
    fewest = {"logits_to_keep": 1} if accepts_logits_to_keep(model) else {}
    inputs = on_device(batch, model) | fewest
    inputs.pop("labels", None)
    with CallRecorder(blocks, keep={0}) as recorder:
        model(**inputs, use_cache=False)
        calls = recorder.take()
    hidden, calls[0].hidden = calls[0].hidden, None
    assert hidden is not None
    return calls, hidden


def record_backward(
    model: nn.Module, blocks: list[Block], batch: Batch, rows: int | Sequence[int]
) -> BackwardRecord:
    """One forward; only what follows the last block (norm, head, loss) is differentiated.

    The gradient is that of the sum of the rows' mean losses; ``rows`` numbers them in errors.
    """
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


def replay_backward(block: Block, record: BackwardRecord) -> tuple[Tensor, Tensor]:
    """The block on one batch, forward and back: its input and the gradient of its output.

    No parameter gets a gradient. Leaves in the record the gradient of the block's input, which is
    that of the block before's output.
    """
    device = device_of_block(block)
    call, above = record.calls[block.index], record.gradient.to(device)
    assert call.hidden is not None
    hidden = call.hidden.to(device).requires_grad_()
    call.hidden = None  # not needed again: memory falls as the replay goes back
    with torch.enable_grad():
        (below,) = torch.autograd.grad(call_block(block, call, hidden), [hidden], above)
    record.gradient = below.cpu()
    return hidden.detach(), above


def call_block(block: Block, call: Call, hidden: Tensor) -> Tensor:
    """The block's output [S, T, d] on ``hidden``, with everything else as recorded."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.to(hidden.device), (call.args, call.kwargs))
    return hidden_of(block.module(hidden, *args, **kwargs))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a block's output, which older models return as the first of a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def device_of_block(block: Block) -> torch.device:
    """Where the block's parameters are."""
    return next(block.module.parameters()).device
