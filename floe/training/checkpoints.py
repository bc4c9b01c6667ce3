"""Checkpoints that are known to be whole: each carries a list of its files, checked before use."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from floe.errors import FileError
from floe.storage import differing, read_json, remove_if_empty, sha256, write_json

DONE = "floe_done.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")
_WRITTEN = (
    *("adapter_*", "README.md", "trainer_state.json", "training_args.bin", "optimizer.*"),
    *("scheduler.*", "scaler.*", "rng_state*", f".{DONE}*", DONE),
)


def seal(folder: Path, identity: dict[str, Any]) -> None:
    """Write the list of the Trainer's files in it, sizes and SHA-256, after everything else.

    ``identity`` says in JSON values which run the checkpoint belongs to.
    """
    written = [p for pattern in _WRITTEN for p in folder.rglob(pattern) if p.is_file()]
    names = sorted(p.relative_to(folder).as_posix() for p in written if DONE not in p.name)
    files = {name: _stamp(folder / name) for name in names}
    write_json(folder / DONE, {"format": _FORMAT, "identity": identity, "files": files})


def verify(folder: Path) -> dict[str, Any] | None:
    """The identity a sealed checkpoint was given, or None if a file is missing, cut or changed.

    None also where the folder was renamed, or copied under another step's name.
    """
    state = folder / "trainer_state.json"
    try:
        if state.is_file() and folder.name != f"checkpoint-{read_json(state)['global_step']}":
            return None
        done = read_json(folder / DONE)
        if done["format"] != _FORMAT or not done["files"]:
            return None
        for name, stamp in done["files"].items():
            if (folder / name).stat().st_size != stamp["bytes"] or _stamp(folder / name) != stamp:
                return None
        identity: dict[str, Any] = done["identity"]
    except (FileError, OSError, TypeError, AttributeError):
        return None
    return identity


def newest(folder: Path, identity: dict[str, Any]) -> Path | None:
    """The whole checkpoint of most steps, whatever the files' times say.

    Every damaged one is moved to ``broken/``: the Trainer would write into its folder.

    Raises:
        FileError: if the newest whole one belongs to a run with other settings or data.
    """
    for path in folder.glob("checkpoint-*"):
        if _NAME.fullmatch(path.name) and not path.is_dir():
            raise FileError(path, "lies where a checkpoint's folder may have to be: move it away")
    whole: list[tuple[Path, dict[str, Any]]] = []
    for _, path in checkpoints(folder):
        sealed = verify(path)
        if sealed is None:
            _set_aside(folder, path)
        else:
            whole.append((path, sealed))
    if not whole:
        return None
    path, sealed = whole[-1]
    names = differing(sealed, identity)
    if names:
        raise FileError(
            path,
            f"is a checkpoint of a run with other {', '.join(names)}; "
            "use another output_dir, or delete the checkpoints to start over",
        )
    return path


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """``(step, path)`` of every ``checkpoint-<step>`` folder, oldest first, whole or not."""
    named = [(_NAME.fullmatch(path.name), path) for path in folder.glob("*")]
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def rotate(folder: Path, keep: int) -> None:
    """Delete the sealed checkpoints but the ``keep`` of most steps."""
    sealed = [path for _, path in checkpoints(folder) if (path / DONE).is_file()]
    for path in sealed[:-keep]:
        _remove(path)


def remove_checkpoints(folder: Path) -> None:
    """Delete a finished run's checkpoints and those set aside; files of others stay."""
    for path in [*(path for _, path in checkpoints(folder)), *folder.glob("broken/checkpoint-*")]:
        _remove(path)
    for place in (folder / "broken", folder):
        remove_if_empty(place)


def _remove(path: Path) -> None:
    """Delete a checkpoint file by file, so that what somebody put there stays."""
    try:
        listed = list(read_json(path / DONE)["files"])
    except (FileError, TypeError):  # never sealed
        listed = []
    files = [path / name for name in listed if ".." not in Path(name).parts]
    files += [file for pattern in _WRITTEN for file in path.glob(pattern)]
    for file in files:
        if file.is_file():
            file.unlink()
    for folder in (*(file.parent for file in files), path):
        remove_if_empty(folder)


def _set_aside(root: Path, path: Path) -> None:
    (root / "broken").mkdir(exist_ok=True)
    target, copy = root / "broken" / path.name, 0
    while target.exists():
        copy += 1
        target = root / "broken" / f"{path.name}.{copy}"
    os.replace(path, target)


def _stamp(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
