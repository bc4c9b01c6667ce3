"""Work in pieces, each done by one worker and kept in a file that any later run can use.

Workers are the processes of ``torch.distributed`` (torchrun starts them); without it there is one.
A piece is a function of what the workbook's identity names, so it does not matter who did it, or
when: a killed run continues with the pieces that are missing.

A model's arithmetic depends in its last bits on what shares a batch. So calibration rows are cut
into chunks of a fixed number of rows, and run in passes that a chunk alone decides: the same
scores, bit for bit, whatever batches they came in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import distributed

from floe.data.batches import TokenRow
from floe.errors import FileError
from floe.storage import hash_of, load_arrays, save_arrays
from floe.types import Array

Arrays = dict[str, Array]
_FORMAT = 1
CHUNK_ROWS = 32
PASS_TOKENS = 2048  # padded tokens of one forward pass; part of what a score is, like the chunks


def chunks(rows: Sequence[TokenRow], whole_batches: bool = False) -> list[range]:
    """Indices of consecutive rows, CHUNK_ROWS at a time.

    With ``whole_batches`` a chunk ends with the batch that fills it, for estimators that mean the
    batches they were given.
    """
    parts, start = [], 0
    while start < len(rows):
        end = min(start + CHUNK_ROWS, len(rows))
        while whole_batches and end < len(rows) and rows[end].batch == rows[end - 1].batch:
            end += 1
        parts.append(range(start, end))
        start = end
    return parts


def passes(
    rows: Sequence[TokenRow], indices: Sequence[int], tokens: int = PASS_TOKENS
) -> list[list[int]]:
    """``indices`` in groups of at most ``tokens`` padded tokens, at least one row each.

    The longest rows first, ties by index, so that rows of a group are of like length.
    """
    groups: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (-len(rows[i]), i)):
        if groups and (len(groups[-1]) + 1) * len(rows[groups[-1][0]]) <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class Workbook:
    """The pieces of one measurement, in files ``<name>.npz`` of a folder, or in memory.

    Args:
        folder: made if it is not there, the same for all workers; None = in memory, for one worker.
        identity: whatever decides the pieces' content (JSON values). Files written under another
            identity are written anew.

    Raises:
        ValueError: several workers without a folder, or with different identities.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, identity: Mapping[str, Any]) -> None:
        self.identity = hash_of(identity)
        self.number, self.count = 0, 1  # this process, and how many work together
        if distributed.is_available() and distributed.is_initialized():
            self.number, self.count = distributed.get_rank(), distributed.get_world_size()
        self.folder = None if folder is None else Path(folder)
        if self.count > 1:
            self._check_agreement()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._kept: dict[str, Arrays] = {}

    def missing(self, names: Sequence[str], first_worker: int = 0) -> Iterator[tuple[int, str]]:
        """Pieces this worker has to do, with their places in ``names``: every ``count``-th."""
        for place, name in enumerate(names):
            if (place + first_worker) % self.count == self.number and self._read(name) is None:
                yield place, name

    def work(
        self, names: Sequence[str], build: Callable[[int], Arrays], first_worker: int = 0
    ) -> None:
        """Do this worker's pieces: ``build(place in names)`` returns the arrays of a piece."""
        header = {"format": _FORMAT, "meta": {"identity": self.identity}}
        for place, name in self.missing(names, first_worker):
            arrays = build(place)
            if self.folder is None:
                self._kept[name] = arrays
            else:
                save_arrays(self.folder / f"{name}.npz", "piece", header, arrays)

    def wait(self) -> None:
        """Until every worker has done its pieces."""
        if self.count > 1:
            distributed.barrier()

    def take(self, name: str) -> Arrays:
        """A finished piece.

        Raises:
            FileError: it is not there or cannot be read.
        """
        arrays = self._read(name)
        if arrays is None:
            place = (self.folder or Path()) / f"{name}.npz"
            raise FileError(place, "must hold a finished piece of the scores, got none")
        self._kept.pop(name, None)
        return arrays

    def _read(self, name: str) -> Arrays | None:
        """The arrays of a piece; None if there is none of this identity, or it is damaged."""
        if self.folder is None:
            return self._kept.get(name)
        try:
            header, arrays = load_arrays(self.folder / f"{name}.npz", "piece", _FORMAT)
        except FileError:
            return None
        return arrays if header["meta"].get("identity") == self.identity else None

    def _check_agreement(self) -> None:
        if self.folder is None:
            raise ValueError(
                f"folder must be one that all {self.count} workers share, got None: "
                "they exchange what they measured through it"
            )
        everyone: list[Any] = [None] * self.count
        distributed.all_gather_object(everyone, self.identity)
        different = [number for number, other in enumerate(everyone) if other != everyone[0]]
        if different:
            raise ValueError(
                "all workers must hold the same model, rows and options, got others in workers "
                f"{different} than in worker 0"
            )
