"""Adapted linears that read one input: q, k, v of an attention, gate and up of a feed-forward.

A decoder block calls them one after the other with the same tensor. The first call computes all of
them in one op, which reads that tensor once (and draws one dropout mask); the others take what is
ready. That lasts while the module that holds them runs, so nothing computed for one call can reach
another.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from floe import ops


class Part(NamedTuple):
    """What a member brings to an op; ``traits`` are what all its members must have in common."""

    traits: tuple[Any, ...]
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor]  # weight, bias, shrink, expand

    def versions(self) -> list[int]:
        """Of the tensors: torch counts the writes into each."""
        return [tensor._version for tensor in self.tensors if tensor is not None]


class _Ready(NamedTuple):
    """What one call computed, by member; each output is handed out once."""

    x: Tensor
    situation: tuple[Any, ...]
    parts: dict[Any, tuple[Part, list[int]]]  # and its versions
    outputs: dict[Any, Tensor]


class SharedInput:
    """The adapted linears of one input, each a MoELoRALinear, in the order of their calls."""

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = list(members)
        self._parent_runs = False
        self._ready: _Ready | None = None

    def output(self, member: Any, x: Tensor, name: str) -> Tensor | None:
        """The member's output with adapter ``name`` for x; None where it must compute it alone.

        Alone: outside its parent's call, where writes into x are not counted (inference mode), in a
        replica of nn.DataParallel, or when the members' adapters differ in size or settings, or one
        cannot be fused.
        """
        if not self._parent_runs or "_is_replica" in member.__dict__:
            return None
        traced = torch.compiler.is_compiling()  # then tensors have no versions to read
        if not traced and x.is_inference():
            return None
        mode = _mode(member, x, name)
        situation = mode if traced else (x._version, *mode)
        ready = self._ready  # another thread may put another there meanwhile
        if ready is not None and ready.x is x and ready.situation == situation:
            mine: Tensor | None = ready.outputs.pop(member, None)
            if mine is not None and traced:
                _refuse_a_change(x)
                return mine
            if mine is not None:
                (part, versions), tensors = ready.parts[member], member.tensors(name)
                same = tensors is not None and all(map(operator.is_, tensors, part.tensors))
                return mine if same and part.versions() == versions else None
        parts = self._parts(name)
        if member not in parts:
            return None
        tensors = zip(*(part.tensors for part in parts.values()), strict=True)
        ys = ops.moe_lora_group(x, *tensors, **member.call_settings(x, name))
        outputs, known = dict(zip(parts, ys, strict=True)), {}
        if traced:
            _remember(x)
        else:
            known = {each: (part, part.versions()) for each, part in parts.items()}
        mine, self._ready = outputs.pop(member), _Ready(x, situation, known, outputs)
        return mine

    def _parts(self, name: str) -> dict[Any, Part]:
        """Of every member with the adapter; empty where they cannot share an op."""
        parts: dict[Any, Part] = {}
        for member in self.members:
            if name not in member.settings:
                continue
            part = member.part(name)
            if part is None or any(part.traits != other.traits for other in parts.values()):
                return {}
            parts[member] = part
        return parts if len(parts) > 1 else {}


# While torch.compile follows a call, what stands for a tensor counts the writes into it. The code
# that is followed cannot read that; what comptime runs meanwhile can. Its import takes a second.


def _remember(x: Tensor) -> None:
    from torch._dynamo.comptime import comptime

    @comptime
    def _(context: Any) -> None:
        fake = context.get_local("x").as_fake()
        fake.floe_version = fake._version


def _refuse_a_change(x: Tensor) -> None:
    from torch._dynamo.comptime import comptime

    @comptime
    def _(context: Any) -> None:
        fake = context.get_local("x").as_fake()
        if fake.floe_version != fake._version:
            raise RuntimeError(
                "the input of projections that share it must not be changed in place between "
                "their calls under torch.compile: set share_input=False in FloeConfig"
            )


def link(parent: nn.Module) -> None:
    """Let ``parent`` tell its adapted children when it runs; once is enough."""
    if _opens not in parent._forward_pre_hooks.values():
        parent.register_forward_pre_hook(_opens)
        parent.register_forward_hook(_closes, always_call=True)


def unlink(parent: nn.Module) -> None:
    """Undo :func:`link`."""
    for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_opens, _closes)]:
            del hooks[key]
            parent._forward_hooks_always_called.pop(key, None)


def _opens(parent: nn.Module, args: Any) -> None:
    _set_running(parent, True)


def _closes(parent: nn.Module, args: Any, output: Any) -> None:
    _set_running(parent, False)


def _set_running(parent: nn.Module, runs: bool) -> None:
    """Tell the parent's members, looked up each time, so that copies of a model get their own.

    Outputs that nobody took go.
    """
    for child in parent._modules.values():
        shared = child.__dict__.get("shared") if child else None
        if type(shared) is SharedInput:
            shared._parent_runs, shared._ready = runs, None


def _mode(member: Any, x: Tensor, name: str) -> tuple[Any, ...]:
    """What must not have changed between the first member's call and another's."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return name, torch.is_grad_enabled(), autocast, member.training, member.calls_base
