"""The run folder: stages that are done stay done, unfinished ones resume.

Nothing half-written is ever seen: a stage works in ``<stage>.work``, which survives a kill; its
result appears under ``<stage>`` by one rename, together with ``DONE.json``: a hash of everything
the stage read, and size and sha256 of every file it wrote. A stage whose inputs hash to the same
value and whose files verify is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from floe.atomic import replace_folder, write_json, write_text
from floe.errors import FileError

FORMAT = 1
_LARGE = 1 << 20
_HUGE = 10**30


class RunFolder:
    """One run's folder. Open it with :meth:`locked` before writing: one process at a time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @contextmanager
    def locked(self) -> Iterator[RunFolder]:
        """Hold the folder; a second process gets a FileError at once."""
        lock = FileLock(self.path / "lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise FileError(self.path, "another process is working in this run folder") from error
        except OSError as error:
            reason = f"cannot be worked in: {error.strerror or error}; see output_dir"
            raise FileError(self.path, reason) from error
        try:
            yield self
        finally:
            lock.release()

    def done(self, stage: str) -> dict[str, Any] | None:
        """``DONE.json`` of a finished stage, or None."""
        file = self.path / stage / "DONE.json"
        return read_json(file) if file.is_file() else None

    def stage(
        self,
        name: str,
        inputs: dict[str, Any],
        build: Callable[[Path], None],
        announce: Callable[[str, str], None] = lambda stage, what: None,
    ) -> str:
        """Run ``build(work_folder)`` unless the stage is done with the same inputs.

        ``build`` writes its files into the folder it is given and finds there what an interrupted
        attempt with the same inputs left. An exception leaves that folder for the next attempt.
        Returns the inputs' hash.
        """
        digest = hash_of(inputs)
        final = self.path / name
        if self._is_current(final, digest):
            announce(name, "unchanged")
            return digest
        work = self.path / f"{name}.work"
        self._prepare(work, digest)
        announce(name, "started")
        self.event(stage=name, what="started", inputs=digest)
        began = time.monotonic()
        build(work)
        self._publish(work, final, digest, inputs, time.monotonic() - began)
        self.event(stage=name, what="finished", seconds=round(time.monotonic() - began, 3))
        announce(name, "finished")
        return digest

    def event(self, **fields: Any) -> None:
        """Append one line to ``events.jsonl``."""
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"time": time.time(), **fields}, sort_keys=True) + "\n")

    def _is_current(self, final: Path, digest: str) -> bool:
        file = final / "DONE.json"
        if not file.is_file():
            return False
        done = read_json(file)
        return done.get("inputs_hash") == digest and all(
            (final / name).is_file() and (final / name).stat().st_size == facts["size"]
            and (facts["size"] > _LARGE or sha256(final / name) == facts["sha256"])
            for name, facts in done.get("outputs", {}).items()
        )  # fmt: skip

    def _prepare(self, work: Path, digest: str) -> None:
        marker = work / ".inputs"
        if work.exists() and (not marker.is_file() or marker.read_text() != digest):
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        write_text(marker, digest)

    def _publish(
        self, work: Path, final: Path, digest: str, inputs: dict[str, Any], seconds: float
    ) -> None:
        (work / ".inputs").unlink(missing_ok=True)
        files = sorted(p for p in work.rglob("*") if p.is_file())
        outputs = {
            str(p.relative_to(work)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files
        }
        write_json(
            work / "DONE.json",
            {
                "format": FORMAT,
                "stage": str(final.relative_to(self.path)),
                "inputs_hash": digest,
                "inputs": inputs,
                "outputs": outputs,
                "seconds": round(seconds, 3),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )
        final.parent.mkdir(parents=True, exist_ok=True)
        replace_folder(work, final)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, of values that any of its readers can hold.

    Taking a key that is not there is a FileError, too, in any object of the file.

    Raises:
        FileError: it is missing, damaged or something else; or a value in it is a whole number
            beyond 63 bits, beyond 1e200, text above 100,000 characters, or nested above 64 deep:
            its key is named.
    """
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=partial(_Object, path),
            parse_int=_whole,
        )
    except FileNotFoundError:
        raise FileError(path, "is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(path, f"cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FileError(path, f"must hold a JSON object, got {type(value).__name__}")
    check_values(path, value)
    return value


def check_values(path: str | os.PathLike[str], value: Any) -> None:
    """FileError, with its key, for a value of a file that is out of :func:`read_json`'s bounds."""
    flaw = _flaw(value)
    if flaw is not None:
        raise FileError(path, f"{flaw[0].removeprefix('.')[:200]} must be {flaw[1]}")


class _Object(dict[str, Any]):
    """An object in a file: the file is at fault where a key is taken that is not there."""

    def __init__(self, path: Path, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.path = path
        if len(self) != len(pairs):
            raise ValueError("a key occurs twice")

    def __missing__(self, key: str) -> Any:
        raise FileError(self.path, f"{key} is missing")


def _whole(digits: str) -> int:
    return int(digits) if len(digits) < 30 else _HUGE  # reading more digits takes quadratic time


def _flaw(value: Any, depth: int = 0) -> tuple[str, str] | None:
    """The place of the first value out of bounds and its rule, or None."""
    if depth > 64:
        return "", "nested at most 64 deep"
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            found = _flaw(part, depth + 1)
            if found is not None:
                place = f".{key}" if isinstance(value, dict) else f"[{key}]"
                return place + found[0], found[1]
    elif isinstance(value, str):
        return ("", "text of at most 100,000 characters") if len(value) > 100_000 else None
    elif isinstance(value, int):
        return ("", "a whole number of at most 63 bits") if abs(value) >= 2**63 else None
    elif isinstance(value, float) and 1e200 < abs(value) < float("inf"):
        return "", "a number of at most 1e200"
    return None


def hash_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def environment() -> dict[str, Any]:
    """Machine and versions, for ``env.json``; loads nothing heavy."""
    names = ("torch", "triton", "transformers", "peft", "optuna", "datasets", "numpy", "floe-lora")
    versions: dict[str, Any] = {}
    for name in names:
        try:
            versions[name.replace("-lora", "")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name.replace("-lora", "")] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": os.cpu_count(),
        "commit": _commit(),
        **versions,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """Commit of the source tree floe runs from; None where it is none, or git cannot tell."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return found.stdout.strip() if found.returncode == 0 else None
