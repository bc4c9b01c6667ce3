"""Adapted linears that read one input: q, k, v of an attention, gate and up of a feed-forward.

A decoder block calls them one after the other with the same tensor. The first call computes all of
them in one op, which reads that tensor once (and draws one dropout mask); the others take what is
ready. That lasts while the module that holds them runs, so nothing computed for one call can reach
another.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

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


class Member(Protocol):
    """An adapted linear, as far as it matters here."""

    r: dict[str, int]
    training: bool
    calls_base: bool

    def tensors(self, name: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor] | None:
        """Those of a `Part` with adapter ``name``; None where they may not be read."""

    def part(self, name: str) -> Part | None:
        """What it brings to an op of all members; None if it runs alone."""

    def call_settings(self, x: Tensor, name: str) -> dict[str, Any]:
        """Keyword arguments of the op, with a fresh dropout seed."""


class _Ready(NamedTuple):
    """What one call computed, by member; each output is handed out once."""

    x: Tensor
    situation: tuple[Any, ...]
    parts: dict[Member, tuple[Part, list[int]]]  # and its versions
    outputs: dict[Member, Tensor]

    def holds_for(self, member: Member, name: str) -> bool:
        """Whether the member would bring the same tensors now, and nothing wrote into them."""
        (part, versions), tensors = self.parts[member], member.tensors(name)
        same = tensors is not None and all(map(operator.is_, tensors, part.tensors))
        return same and part.versions() == versions


class SharedInput:
    """The adapted linears of one input, in the order their parent module calls them."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._parent_runs = False
        self._ready: _Ready | None = None

    def open(self) -> None:
        """The module that holds the members starts to run."""
        self._parent_runs, self._ready = True, None

    def close(self) -> None:
        """It has run: outputs that were not asked for go."""
        self._parent_runs, self._ready = False, None

    def output(self, member: Member, x: Tensor, name: str) -> Tensor | None:
        """The member's output with adapter ``name`` for x; None where it must compute it alone.

        Alone: outside its parent's call, under torch.compile (whose graph is not to depend on what
        was called before), where writes into x are not counted (inference mode), in a replica of
        nn.DataParallel, or when the members' adapters differ in size or settings, or one cannot be
        fused.
        """
        if not self._parent_runs or torch.compiler.is_compiling() or x.is_inference():
            return None
        if "_is_replica" in member.__dict__:
            return None
        situation = _situation(member, x, name)
        ready = self._ready  # another thread may put another there meanwhile
        if ready is not None and ready.x is x and ready.situation == situation:
            mine = ready.outputs.pop(member, None)
            if mine is not None:
                return mine if ready.holds_for(member, name) else None
        parts = self._parts(name)
        if member not in parts:
            return None
        tensors = zip(*(part.tensors for part in parts.values()), strict=True)
        ys = ops.moe_lora_group(x, *tensors, **next(iter(parts)).call_settings(x, name))
        outputs = dict(zip(parts, ys, strict=True))
        mine = outputs.pop(member)
        known = {each: (part, part.versions()) for each, part in parts.items()}
        self._ready = _Ready(x, situation, known, outputs)
        return mine

    def _parts(self, name: str) -> dict[Member, Part]:
        """Of every member with the adapter; empty where they cannot share an op."""
        parts: dict[Member, Part] = {}
        for member in self.members:
            if name not in member.r:
                continue
            part = member.part(name)
            if part is None or any(part.traits != other.traits for other in parts.values()):
                return {}
            parts[member] = part
        return parts if len(parts) > 1 else {}


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
    for shared in _shared(parent):
        shared.open()


def _closes(parent: nn.Module, args: Any, output: Any) -> None:
    for shared in _shared(parent):
        shared.close()


def _shared(parent: nn.Module) -> list[SharedInput]:
    # looked up each time, so that copies of the model get their own
    if torch.compiler.is_compiling():
        return []
    linked = [child.__dict__.get("shared") for child in parent._modules.values() if child]
    return [shared for shared in linked if type(shared) is SharedInput]


def _situation(member: Member, x: Tensor, name: str) -> tuple[Any, ...]:
    """What must not have changed between the first member's call and another's."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return name, x._version, torch.is_grad_enabled(), autocast, member.training, member.calls_base
