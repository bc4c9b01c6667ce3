"""Adapted linears that read one input: q, k, v of an attention, gate and up of a feed-forward.

A decoder block calls them one after the other with the same tensor. The first call computes all of
them in one op, which reads that tensor once (and draws one dropout mask); the others take what is
ready.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from floe import ops

if TYPE_CHECKING:
    from floe.adapters.moe_lora import MoELoRALinear


class _Part(NamedTuple):
    """``traits`` are what all members of one op must have in common."""

    traits: tuple[Any, ...]
    weight: Tensor
    bias: Tensor | None
    shrink: Tensor
    expand: Tensor


@dataclass
class _Ready:
    """Outputs of one call, by member; each is handed out once."""

    x: Tensor
    situation: tuple[Any, ...]
    outputs: dict[MoELoRALinear, Tensor]


class SharedInput:
    """The adapted linears of one input, in the order the block calls them."""

    def __init__(self, members: Sequence[MoELoRALinear]) -> None:
        self.members = list(members)
        self._ready: _Ready | None = None

    def output(self, member: MoELoRALinear, x: Tensor, name: str) -> Tensor | None:
        """The member's output with adapter ``name`` for x; None where it must compute it alone.

        Alone: under torch.compile (whose graph is not to depend on what was called before), or
        when the members' adapters differ in size or settings, or one cannot be fused.
        """
        if torch.compiler.is_compiling():
            return None
        situation = _situation(member, x, name)
        ready = self._ready  # another thread may put its own there meanwhile
        if ready is not None and ready.x is x and ready.situation == situation:
            mine = ready.outputs.pop(member, None)
            if not ready.outputs:
                self._ready = None
            if mine is not None:
                return mine
        found = self._outputs(x, name)
        if found is None:
            return None
        outputs = dict(zip(self.members, found, strict=True))
        mine = outputs.pop(member)
        self._ready = _Ready(x, situation, outputs)
        return mine

    def _outputs(self, x: Tensor, name: str) -> list[Tensor] | None:
        parts: list[_Part] = []
        for member in self.members:
            part = _part(member, name)
            if part is None or (parts and part.traits != parts[0].traits):
                return None
            parts.append(part)
        _, weights, biases, shrinks, expands = zip(*parts, strict=True)
        settings = self.members[0].call_settings(x, name)
        return ops.moe_lora_group(x, weights, biases, shrinks, expands, **settings)


def _situation(member: MoELoRALinear, x: Tensor, name: str) -> tuple[Any, ...]:
    """What must not have changed between the first member's call and another's."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    version = None if x.is_inference() else x._version
    return name, version, torch.is_grad_enabled(), autocast, member.training, member.calls_base


def _part(member: MoELoRALinear, name: str) -> _Part | None:
    """What the member brings to an op of all members; None if it has to run alone."""
    base = member.readable_base()
    if base is None or not member.share_input[name] or member.active_names() != [name]:
        return None
    (weight, bias), (shrink, expand) = base, member.adapter(name)
    if isinstance(shrink, DTensor) or isinstance(weight, DTensor):
        return None  # sharded on its own: gathered only while its own forward runs
    traits = (
        shrink.shape, expand.shape[1:], shrink.dtype, expand.dtype, shrink.device,
        member.scaling[name], member.dropout[name] if member.training else 0.0,
        member.backend[name],
    )  # fmt: skip
    return _Part(traits, weight, bias, shrink, expand)
