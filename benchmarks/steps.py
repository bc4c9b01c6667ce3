"""What a call launches and which library products it runs, in order, without running either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from floe_triton import launch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Step:
    """One launch or library call. ``tensors``: everything it reads or writes, each once."""

    name: str
    flops: int
    tensors: tuple[Tensor, ...]
    launch: launch.Launch | None = None


class Recorder(TorchDispatchMode):
    """The steps of what runs within it, in order: recorded launches between library calls."""

    def __init__(self, launches: list[launch.Launch]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._launches = launches
        self._taken = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, which is a step unless it only allocates or views."""
        result = func(*args, **(kwargs or {}))
        name, read, written = func.__name__.split(".")[0], tensors(args), tensors(result)
        known = {storage(tensor) for tensor in read}
        in_place = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        new = written if in_place else [t for t in written if storage(t) not in known]
        if read and new and not name.startswith(("empty", "new_empty")):
            self.take_launches()
            self.steps.append(Step(name, _flops(name, read), (*read, *new)))
        return result

    def take_launches(self) -> None:
        """Move the launches recorded since the last call to the steps."""
        for each in self._launches[self._taken :]:
            moved = tuple(tensors(list(each.arguments.values())))
            self.steps.append(Step(each.kernel.__name__, each.flops, moved, each))
        self._taken = len(self._launches)


@contextmanager
def recording(capability: int) -> Iterator[Recorder]:
    """Record what runs within, for an architecture."""
    with launch.recording(capability) as launches, Recorder(launches) as recorder:
        yield recorder
        recorder.take_launches()


def tensors(values: Any) -> list[Tensor]:
    """Every tensor in nested lists and tuples."""
    if isinstance(values, Tensor):
        return [values]
    if not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in tensors(value)]


def storage(tensor: Tensor) -> int:
    """What views of one memory share."""
    return tensor.untyped_storage()._cdata


def size(tensor: Tensor) -> int:
    """Its bytes."""
    return tensor.numel() * tensor.element_size()


def _flops(name: str, read: list[Tensor]) -> int:
    """Of the products; everything else is bound by memory."""
    if name not in ("mm", "addmm", "addmm_"):
        return 0
    left, right = read[-2:]
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]
