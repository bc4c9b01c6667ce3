"""One forward of the base model, kept so that it can start again from any block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from floe.data.loss import for_loss, losses, on_device
from floe.decoder_blocks import Block, find_blocks
from floe.importance.block_replay import Call, CallRecorder, hidden_of
from floe.types import Batch


@dataclass
class States:
    """One batch's forward, on the CPU.

    ``calls`` say how each block was called and with which hidden states [S, T, d]; ``last`` is the
    last block's output, ``loss`` each row's mean NLL, float64 [S], ``as_tuple`` whether blocks
    return tuples.
    """

    calls: list[Call]
    last: Tensor
    loss: Tensor
    as_tuple: bool

    def before(self, layer: int) -> Tensor:
        """Hidden states before block ``layer``; L gives those after the last block."""
        if layer == len(self.calls):
            return self.last
        hidden = self.calls[layer].hidden
        assert hidden is not None
        return hidden


def forward_states(model: nn.Module, batch: Batch, first_row: int = 0) -> States:
    """One forward with everything needed to start again from any block.

    Raises:
        ValueError: a row without labels or with a loss that is not finite.
    """
    blocks = find_blocks(model)
    batch = on_device(for_loss(batch, "response"), model)
    outputs: list[Any] = []
    hook = blocks[-1].module.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    try:
        with CallRecorder(blocks) as recorder:
            loss, _ = losses(model, batch, first_row)
            calls = recorder.take()
    finally:
        hook.remove()
    last = hidden_of(outputs[0]).detach().cpu()
    return States(calls, last, loss.detach().double().cpu(), isinstance(outputs[0], tuple))


@contextmanager
def starting_at(blocks: Sequence[Block], layer: int, states: States) -> Iterator[None]:
    """Within it the model's forward starts at ``layer``: blocks before it hand on its input."""
    modules = [block.module for block in blocks[:layer]]
    before = [vars(module).get("forward") for module in modules]
    hidden = states.before(layer)

    def hand_on(given: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        given = kwargs["hidden_states"] if given is None else given
        moved = hidden.to(given.device)
        return (moved,) if states.as_tuple else moved

    try:
        for module in modules:
            vars(module)["forward"] = hand_on
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del vars(module)["forward"]
            if own is not None:  # one that was there already, such as accelerate's
                vars(module)["forward"] = own
