"""Adapted linears that read one input: q, k, v of an attention, gate and up of a feed-forward.

A decoder block calls them one after the other with the same tensor. The first call computes all of
them in one op, which reads that tensor once (and draws one dropout mask); the others take what is
ready.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from floe import ops

if TYPE_CHECKING:
    from floe.adapters.moe_lora import MoELoRALinear


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
        situation = _situation(x, name)
        ready = self._ready  # another thread may put its own there meanwhile
        if ready is not None and ready.x is x and ready.situation == situation:
            found = ready.outputs.pop(member, None)
            if not ready.outputs:
                self._ready = None
            if found is not None:
                return found
        if not self._agree(name):
            return None
        outputs = dict(zip(self.members, self._outputs(x, name), strict=True))
        mine = outputs.pop(member)
        self._ready = _Ready(x, situation, outputs)
        return mine

    def _outputs(self, x: Tensor, name: str) -> list[Tensor]:
        members = self.members
        bases = [member.base_layer for member in members]
        shrinks, expands = zip(*(member.adapter(name) for member in members), strict=True)
        return ops.moe_lora_group(
            x, [base.weight for base in bases], [base.bias for base in bases], shrinks, expands,
            **members[0].call_settings(x, name),
        )  # fmt: skip

    def _agree(self, name: str) -> bool:
        wanted = _traits(self.members[0], name)
        return all(member.may_fuse() and _traits(member, name) == wanted for member in self.members)


def _situation(x: Tensor, name: str) -> tuple[Any, ...]:
    """What must not have changed between the first member's call and another's."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    version = None if x.is_inference() else x._version
    return name, version, torch.is_grad_enabled(), autocast


def _traits(member: MoELoRALinear, name: str) -> tuple[Any, ...]:
    """What the members of one op must have in common; a trait of its own where it has none."""
    if member.active_names() != [name]:
        return (id(member),)
    shrink, expand = member.adapter(name)
    if isinstance(shrink, DTensor) or isinstance(member.base_layer.weight, DTensor):
        return (id(member),)  # sharded on its own: gathered only while its own forward runs
    return (
        shrink.shape, expand.shape[1:], shrink.dtype, expand.dtype, shrink.device,
        member.scaling[name], member.dropout[name] if member.training else 0.0,
        member.backend[name], member.share_input[name] or id(member),
    )  # fmt: skip
