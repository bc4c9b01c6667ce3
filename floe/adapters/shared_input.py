"""Adapted linears that read one input: q, k, v of an attention, gate and up of a feed-forward.

A decoder block calls them one after the other with the same tensor. The first call computes all of
them in one op, which reads that tensor once (and draws one dropout mask); the others take what is
ready. That lasts while the module that holds them runs, so nothing computed for one call can reach
another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from floe import ops

if TYPE_CHECKING:
    from floe.adapters.linear import MoELoRALinear


class _Part(NamedTuple):
    """What a member brings to an op; ``traits`` are what all its members must have in common."""

    traits: tuple[Any, ...]
    weight: Tensor
    bias: Tensor | None
    shrink: Tensor
    expand: Tensor

    def versions(self) -> tuple[int, ...]:
        """Of the tensors: torch counts the writes into each."""
        bias = -1 if self.bias is None else self.bias._version
        return self.weight._version, bias, self.shrink._version, self.expand._version

    def holds(self, member: MoELoRALinear, name: str) -> bool:
        """Whether the member would bring the same tensors now."""
        base, adapter = member.readable_base(), member.readable_adapter(name)
        return (
            base is not None
            and adapter is not None
            and base[0] is self.weight
            and base[1] is self.bias
            and adapter[0] is self.shrink
            and adapter[1] is self.expand
        )


class _Ready(NamedTuple):
    """Outputs of one call, by member; each is handed out once."""

    x: Tensor
    situation: tuple[Any, ...]
    parts: dict[MoELoRALinear, tuple[_Part, tuple[int, ...]]]
    outputs: dict[MoELoRALinear, Tensor]


class SharedInput:
    """The adapted linears of one input, in the order their parent module calls them."""

    def __init__(self, members: Sequence[MoELoRALinear]) -> None:
        self.members = list(members)
        self._parent_runs = False
        self._ready: _Ready | None = None

    def open(self) -> None:
        """The module that holds the members starts to run."""
        self._parent_runs, self._ready = True, None

    def close(self) -> None:
        """It has run: outputs that were not asked for go."""
        self._parent_runs, self._ready = False, None

    def output(self, member: MoELoRALinear, x: Tensor, name: str) -> Tensor | None:
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
        ready = self._ready  # another thread may put its own there meanwhile
        if ready is not None and ready.x is x and ready.situation == situation:
            mine = ready.outputs.pop(member, None)
            if mine is not None:
                part, versions = ready.parts[member]
                return mine if part.holds(member, name) and part.versions() == versions else None
        found = self._outputs(x, name)
        if found is None or member not in found.outputs:
            return None
        self._ready = found._replace(situation=situation)
        return found.outputs.pop(member)

    def _outputs(self, x: Tensor, name: str) -> _Ready | None:
        parts: dict[MoELoRALinear, _Part] = {}
        for member in self.members:
            if name not in member.r:
                continue
            part = _part(member, name)
            if part is None or any(part.traits != other.traits for other in parts.values()):
                return None
            parts[member] = part
        if len(parts) < 2:
            return None
        _, weights, biases, shrinks, expands = zip(*parts.values(), strict=True)
        settings = next(iter(parts)).call_settings(x, name)
        ys = ops.moe_lora_group(x, weights, biases, shrinks, expands, **settings)
        known = {member: (part, part.versions()) for member, part in parts.items()}
        return _Ready(x, (), known, dict(zip(parts, ys, strict=True)))


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
    # found anew each time, so that copies of the model get their own
    if torch.compiler.is_compiling():
        return []
    found = [child.__dict__.get("shared") for child in parent._modules.values() if child]
    return [shared for shared in found if type(shared) is SharedInput]


def _situation(member: MoELoRALinear, x: Tensor, name: str) -> tuple[Any, ...]:
    """What must not have changed between the first member's call and another's."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return name, x._version, torch.is_grad_enabled(), autocast, member.training, member.calls_base


def _part(member: MoELoRALinear, name: str) -> _Part | None:
    """What the member brings to an op of all members; None if it has to run alone."""
    base, adapter = member.readable_base(), member.readable_adapter(name)
    if (
        base is None
        or adapter is None  # wrapped on its own: gathered only while its own forward runs
        or not member.share_input[name]
        or member.active_names() != [name]
        or any(t is not None and t.is_inference() for t in (*base, *adapter))
    ):
        return None
    (weight, bias), (shrink, expand) = base, adapter
    traits = (
        shrink.shape, expand.shape[1:], shrink.dtype, expand.dtype, shrink.device,
        member.scaling[name], member.dropout[name] if member.training else 0.0,
        member.backend[name],
    )  # fmt: skip
    return _Part(traits, weight, bias, shrink, expand)
