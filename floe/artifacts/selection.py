"""What is chosen: layers and masks; selection.json with masks.npz."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import AfterValidator, ConfigDict, InstanceOf
from typing_extensions import TypedDict  # of Python 3.12, as pydantic needs it

from floe.artifacts.schema import (
    NEVER,
    Flag,
    Layer,
    Layers,
    LayerScores,
    Number,
    Ranking,
    Text,
    Whole,
    broken,
    document,
    parse,
)
from floe.errors import FileError
from floe.storage import read_json, write_bytes, write_json
from floe.types import Array, Floats

PICKS = ("top", "bottom")


class Masks(NamedTuple):
    """[L, H] and [L, I] float64: 0 = masked, 1 = retained, real-valued after tuning."""

    head_mask: Floats
    neuron_mask: Floats


@dataclass(frozen=True, eq=False)
class PaperSelection:
    """What the "masks" policy chooses, whatever policy decided.

    layers, layer_scores [L] and ranking as in :class:`Selection`; the masked fractions are shares
    of m == 0 per layer, [L], None where they are not known.
    """

    preset: Text
    layers: Layers
    layer_scores: LayerScores
    ranking: Ranking
    masked_head_fraction: LayerScores | None
    masked_neuron_fraction: LayerScores | None


class Tuned(TypedDict):
    """One attempt of mask tuning: what is left of the component's output error, before, after."""

    layer: Layer
    component: Text
    accepted: Flag
    residual_before: Number | None
    residual_after: Number | None


class Agreement(TypedDict):
    """spearman of two score vectors (None if one is constant), overlap of the two choices, and
    expected_overlap of two random choices of these sizes.
    """

    spearman: Number | None
    overlap: Whole
    expected_overlap: Number


def _check_pick(value: str) -> str:
    if value not in PICKS:
        raise broken(f"one of {PICKS}")
    return value


def _check_figure(value: Any) -> Any:
    if not isinstance(value, bool | int | float):
        raise broken("a number, or true or false")
    return value


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen layers and how they were chosen. Layers are 0-based indices.

    Attributes:
        policy, preset, budget, score, seed: the options; budget is a fraction of the Taylor mass.
        pick: "top" if layers of high score were chosen, "bottom" if those of low score.
        budget_path: the budgets that score "path" averages over, ascending; empty otherwise.
        layers: chosen, ascending.
        layer_scores: [L] float64, higher = more important; their scale is the policy's.
        ranking: all layers, the first to choose in front: the most important, or with pick "bottom"
            the least.
        masks: the paper's masks under ``preset``.
        certificate: of the masks before tuning: value, cost, budget, upper_bound, gap, optimal.
        moves: repairs, adds and swaps of the refinement.
        tuned: whether the masks went through the tuning stage; untuned: why not, else empty.
        tuning: one record per tuned component: layer, component, accepted, residual_before,
            residual_after.
        paper: the "masks" policy's own choice from the same masks, always from the top.
        agreement: spearman of the two score vectors (None if one is constant), overlap of the two
            choices and expected_overlap of two random choices of these sizes.
        versions: of what computed this.
    """

    FORMAT: ClassVar[int] = 3  # 2: pick and budget_path; 3: untuned
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    policy: Text
    preset: Text
    budget: Number
    score: Text
    seed: Whole
    pick: Annotated[Text, AfterValidator(_check_pick)]
    budget_path: tuple[Number, ...]
    layers: Layers
    layer_scores: LayerScores
    ranking: Ranking
    masks: InstanceOf[Masks] = field(metadata=NEVER)
    certificate: dict[str, Annotated[Any, AfterValidator(_check_figure)]]
    moves: dict[str, Whole]
    tuned: Flag
    untuned: Text
    tuning: list[Tuned]
    paper: PaperSelection
    agreement: Agreement
    versions: dict[str, Text]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write selection.json and masks.npz beside it; equal selections give equal bytes.

        Args:
            path: a folder that exists, or a file in one whose name ends in .json.

        Raises:
            FileError: it cannot be written.
        """
        target, masks_path = _places(path)
        buffer = io.BytesIO()
        np.savez(buffer, **self.masks._asdict())
        masks = buffer.getvalue()
        digest = hashlib.sha256(masks).hexdigest()  # so that no two selections mix
        mine = {"format": self.FORMAT, "masks": {"file": masks_path.name, "sha256": digest}}
        try:
            write_bytes(masks_path, masks)
            write_json(target, document(self) | mine)
        except OSError as error:
            raise FileError(
                error.filename or target, f"cannot be written: {error.strerror}"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read what :meth:`save` wrote to the same path.

        Raises:
            FileError: a file is missing, damaged, or of another format.
        """
        target, masks_path = _places(path)
        values: dict[str, Any] = dict(read_json(target))
        number = values.pop("format", None)
        if number == 2:
            values["untuned"] = ""
        elif number != cls.FORMAT:
            raise FileError(target, f"format must be {cls.FORMAT}, got {number!r}; select again")
        masks = _read_masks(masks_path, target, values.get("masks"))
        return parse(cls, values | {"masks": masks}, target, layers=len(masks.head_mask))


def _places(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    target = Path(path)
    if target.suffix != ".json":
        target = target / "selection.json"
    name = "masks.npz" if target.stem == "selection" else f"{target.stem}.masks.npz"
    return target, target.with_name(name)


def _read_masks(path: Path, target: Path, known: Any) -> Masks:
    """The masks that ``target`` was written with, by the digest in it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileError(path, "is missing, the masks of a selection") from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    if not isinstance(known, dict) or known.get("sha256") != digest:
        raise FileError(path, f"not the masks that {target.name} was written with")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays: dict[str, Array] = {name: file[name] for name in Masks._fields}
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise FileError(path, f"cannot be read as masks: {error}") from error
    total = len(arrays["head_mask"])
    for name, mask in arrays.items():
        if mask.shape != (total, *mask.shape[1:2]) or mask.dtype != np.float64:
            rule = f"{name} must be [{total}, units] float64"
            raise FileError(path, f"{rule}, got {mask.shape} {mask.dtype}")
    return Masks(**arrays)
