"""What a selection is, and its files: selection.json and masks.npz.

Written whole or not at all, and read strictly.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from floe.errors import FileError
from floe.storage import write_bytes
from floe.types import Floats

FORMAT = 3  # 2: pick and budget_path; 3: untuned
PICKS = ("top", "bottom")
_PLAIN = (
    "policy",
    "preset",
    "budget",
    "score",
    "seed",
    "pick",
    "certificate",
    "moves",
    "tuned",
    "untuned",
    "tuning",
    "agreement",
)
_KEYS = {
    *_PLAIN,
    "format",
    "budget_path",
    "layers",
    "layer_scores",
    "ranking",
    "masks",
    "paper",
    "versions",
}
_FRACTIONS = ("masked_head_fraction", "masked_neuron_fraction")
_PAPER = {"preset", "layers", "layer_scores", "ranking", *_FRACTIONS}


class Masks(NamedTuple):
    """[L, H] and [L, I] float64: 0 = masked, 1 = retained, real-valued after tuning."""

    head_mask: Floats
    neuron_mask: Floats


@dataclass(frozen=True, eq=False)
class PaperSelection:
    """What the "masks" policy chooses, whatever policy decided.

    layers, layer_scores [L] and ranking as in :class:`Selection`; the masked fractions are shares
    of m == 0 per layer, [L].
    """

    preset: str
    layers: tuple[int, ...]
    layer_scores: Floats
    ranking: tuple[int, ...]
    masked_head_fraction: Floats
    masked_neuron_fraction: Floats


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

    policy: str
    preset: str
    budget: float
    score: str
    seed: int
    pick: str
    budget_path: tuple[float, ...]
    layers: tuple[int, ...]
    layer_scores: Floats
    ranking: tuple[int, ...]
    masks: Masks
    certificate: dict[str, Any]
    moves: dict[str, int]
    tuned: bool
    untuned: str
    tuning: list[dict[str, Any]]
    paper: PaperSelection
    agreement: dict[str, float | int | None]
    versions: dict[str, str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write selection.json and masks.npz beside it; equal selections give equal bytes.

        Args:
            path: a folder that exists, or a file in one whose name ends in .json.

        Raises:
            FileError: it cannot be written.
        """
        _save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Selection:
        """Read what :meth:`save` wrote to the same path.

        Raises:
            FileError: a file is missing, damaged, or of another format.
        """
        return _load(path)


def _save(selection: Selection, path: str | os.PathLike[str]) -> None:
    """Write the two files; the json holds the masks' digest, so that no two selections mix."""
    target, masks_path = _places(path)
    buffer = io.BytesIO()
    np.savez(buffer, **selection.masks._asdict())
    masks = buffer.getvalue()
    document = _document(selection)
    document["masks"] = {"file": masks_path.name, "sha256": hashlib.sha256(masks).hexdigest()}
    text = json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n"
    _write(masks_path, masks)
    _write(target, text.encode())


def _load(path: str | os.PathLike[str]) -> Selection:
    """Read the two files back."""
    target, masks_path = _places(path)
    try:
        document = json.loads(_read(target, "selection").decode())
    except ValueError as error:
        raise FileError(target, f"not valid json ({error})") from error
    _check_keys(target, document)
    masks = _read(masks_path, "masks")
    if hashlib.sha256(masks).hexdigest() != document["masks"].get("sha256"):
        raise FileError(masks_path, f"not the masks that {target.name} was written with")
    try:
        return _selection(document, masks)
    except (KeyError, TypeError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise FileError(target, f"not a selection ({type(error).__name__}: {error})") from error


def _places(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    target = Path(path)
    if target.suffix != ".json":
        target = target / "selection.json"
    name = "masks.npz" if target.stem == "selection" else f"{target.stem}.masks.npz"
    return target, target.with_name(name)


def _document(selection: Selection) -> dict[str, Any]:
    paper = selection.paper
    document = {key: getattr(selection, key) for key in (*_PLAIN, "versions")}
    return document | {
        "format": FORMAT,
        "budget_path": list(selection.budget_path),
        "layers": list(selection.layers),
        "layer_scores": selection.layer_scores.tolist(),
        "ranking": list(selection.ranking),
        "paper": {
            "preset": paper.preset,
            "layers": list(paper.layers),
            "layer_scores": paper.layer_scores.tolist(),
            "ranking": list(paper.ranking),
            **{key: getattr(paper, key).tolist() for key in _FRACTIONS},
        },
    }


def _check_keys(path: Path, document: Any) -> None:
    if not isinstance(document, dict):
        raise FileError(path, f"must hold one object, got {type(document).__name__}")
    if document.get("format") == 2:
        document |= {"format": FORMAT, "untuned": ""}
    if document.get("format") != FORMAT:
        raise FileError(
            path, f"format must be {FORMAT}, got {document.get('format')!r}; select again"
        )
    if set(document) != _KEYS:
        missing, unknown = sorted(_KEYS - set(document)), sorted(set(document) - _KEYS)
        raise FileError(
            path, f"must hold the keys of a selection, missing {missing}, unknown {unknown}"
        )
    paper, masks = document["paper"], document["masks"]
    if not isinstance(paper, dict) or set(paper) != _PAPER or not isinstance(masks, dict):
        raise FileError(
            path, f"'paper' must hold the keys {sorted(_PAPER)} and 'masks' be an object"
        )


def _selection(document: dict[str, Any], masks: bytes) -> Selection:
    with np.load(io.BytesIO(masks), allow_pickle=False) as file:
        head_mask, neuron_mask = file["head_mask"], file["neuron_mask"]
    total = len(head_mask)
    paper = document["paper"]
    for name, mask in (("head_mask", head_mask), ("neuron_mask", neuron_mask)):
        if mask.shape != (total, *mask.shape[1:2]) or mask.dtype != np.float64:
            raise ValueError(
                f"{name} must be [{total}, units] float64, got {mask.shape} {mask.dtype}"
            )
    if document["pick"] not in PICKS:
        raise ValueError(f"pick must be one of {PICKS}, got {document['pick']!r}")
    return Selection(
        **{key: document[key] for key in (*_PLAIN, "versions")},
        budget_path=tuple(float(budget) for budget in document["budget_path"]),
        layers=_layers(document, total),
        layer_scores=_floats(document, "layer_scores", total),
        ranking=_ranking(document, total),
        masks=Masks(head_mask, neuron_mask),
        paper=PaperSelection(
            preset=paper["preset"],
            layers=_layers(paper, total),
            layer_scores=_floats(paper, "layer_scores", total),
            ranking=_ranking(paper, total),
            **{key: _floats(paper, key, total) for key in _FRACTIONS},
        ),
    )


def _floats(document: dict[str, Any], key: str, total: int) -> np.ndarray:
    found = np.asarray(document[key], dtype=np.float64)
    if found.shape != (total,) or not np.isfinite(found).all():
        raise ValueError(f"{key} must be {total} finite numbers")
    return found


def _layers(document: dict[str, Any], total: int) -> tuple[int, ...]:
    found = tuple(document["layers"])
    integers = all(type(layer) is int and 0 <= layer < total for layer in found)
    if not found or not integers or list(found) != sorted(set(found)):
        raise ValueError(f"layers must be ascending indices below {total}, got {found}")
    return found


def _ranking(document: dict[str, Any], total: int) -> tuple[int, ...]:
    found = tuple(document["ranking"])
    if any(type(layer) is not int for layer in found) or sorted(found) != list(range(total)):
        raise ValueError(f"ranking must hold each of {total} layers once, got {found}")
    return found


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileError(path, f"no such file; a saved {what} was expected") from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error


def _write(path: Path, content: bytes) -> None:
    try:
        write_bytes(path, content)
    except OSError as error:
        raise FileError(path, f"cannot be written: {error.strerror}") from error
