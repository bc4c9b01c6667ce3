"""Tensors with poison around them: a kernel that reads or writes beside its tensors is seen.

What is read from beside an input is NaN and spreads; what is written beside an output changes the
poison, which is compared when `guarded` ends.
"""

from contextlib import contextmanager

import torch

_GUARD = 64  # elements before and behind


def place(tensor, row_gap=0):
    """``tensor``'s values in a new tensor inside NaN, rows (of a matrix) ``row_gap`` apart."""
    if tensor.dim() == 2 and row_gap:
        wide = torch.full((tensor.shape[0], tensor.shape[1] + row_gap), torch.nan).to(tensor)
        inner = _inside(wide)[:, : tensor.shape[1]]
    else:
        inner = _inside(tensor)
    return inner.copy_(tensor)


@contextmanager
def guarded():
    """Within it, ``Tensor.new_empty`` and ``torch.empty`` of floats give NaN inside poison."""
    made, new_empty, empty = [], torch.Tensor.new_empty, torch.empty

    def poisoned(shape, dtype, device):
        buffer = _buffer(shape, dtype, device)
        made.append((buffer, buffer.numel() - 2 * _GUARD))
        return _view(buffer, shape)

    def guarded_new_empty(self, *shape, dtype=None, device=None):
        if not (dtype or self.dtype).is_floating_point:
            return new_empty(self, *shape, dtype=dtype, device=device)
        return poisoned(_shape(shape), dtype or self.dtype, device or self.device)

    def guarded_empty(*shape, dtype=torch.float32, device=None):
        return poisoned(_shape(shape), dtype, device)

    torch.Tensor.new_empty, torch.empty = guarded_new_empty, guarded_empty
    try:
        yield
    finally:
        torch.Tensor.new_empty, torch.empty = new_empty, empty
    for buffer, inside in made:
        around = torch.cat([buffer[:_GUARD], buffer[_GUARD + inside :]])
        assert around.isnan().all(), "written beside an output"


def _shape(shape):
    return tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape


def _inside(like):
    return _view(_buffer(like.shape, like.dtype, like.device), like.shape)


def _buffer(shape, dtype, device):
    return torch.full(
        (torch.Size(shape).numel() + 2 * _GUARD,), torch.nan, dtype=dtype, device=device
    )


def _view(buffer, shape):
    return buffer[_GUARD : buffer.numel() - _GUARD].view(shape)
