"""The run folder: done stays done, begun work resumes, nothing is discarded unasked.

A stage works in ``<stage>.work``, which survives a kill. When its work is done, ``DONE.json`` is
written there: what the stage was made from, and size and sha256 of every file of its result. Then
the folder becomes ``<stage>``. A stage made from the same inputs whose files verify is skipped.

Work made from other inputs is discarded only if the caller says so; else the stage is refused, with
what differs. Files that floe did not write stay where they are.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from floe.errors import FileError
from floe.storage import CARD, STAGING, flush, hash_of, read_json, sha256, write_json

FORMAT = 2
"""Of ``DONE.json``. 2: the inputs by the names of their settings."""
REFUSED = "refused without --redo"
_DONE, _MARKER = "DONE.json", ".inputs.json"
_SETTLED = 2 * 10**9  # ns: a file changed more recently may change again in the same clock tick

Inputs = Mapping[str, Any]
Announce = Callable[[str], None]


class RunFolder:
    """One run's folder. Open it with :meth:`locked` before writing: one process at a time."""

    def __init__(self, path: str | os.PathLike[str], read_only: bool = False) -> None:
        self.path, self.read_only = Path(path), read_only
        self._digests = _Digests(self.path / "digests.json", not read_only)

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
        return _record(self.path / stage / _DONE)

    def digest(self, path: Path) -> str:
        """sha256 of a file's bytes; a second look at an unchanged file is free."""
        return self._digests.of(path)

    def stage(
        self,
        name: str,
        inputs: Inputs,
        build: Callable[[Path], None],
        announce: Callable[[str, str], None] = lambda stage, what: None,
        *,
        results: Collection[str] = (),
        tidy: Callable[[Path], None] = lambda work: None,
        growing: Collection[str] = (),
        notes: Inputs | None = None,
        may_discard: Callable[[set[str]], bool] = lambda changed: False,
    ) -> None:
        """Run ``build(work_folder)`` unless the stage is done with the same inputs.

        ``build`` writes its files into the folder it is given and finds there what an interrupted
        attempt with the same inputs left. An exception leaves that folder for the next attempt.

        Args:
            name: of the stage, and of its folder.
            inputs: what decides the result: JSON values by name.
            announce: called with the stage and "started", "finished", "unchanged", or a remark.
            results: files and folders that are the result; empty = all that ``build`` leaves.
            tidy: removes from the work folder what only ``build`` needs, when the result is sealed
                or discarded. May be called again.
            growing: inputs whose change lets ``build`` go on from the finished result, and so does
                another program's change of its files: ``build`` must check what it finds.
            notes: settings behind the inputs, for the sentence that says what differs.
            may_discard: told which inputs and notes differ from those of finished or begun work.

        Raises:
            FileError: work made from other inputs, or by another version of floe, may not be
                discarded; or there is a work folder that floe did not make.
        """

        def say(what: str) -> None:
            announce(name, what)

        stage = _Stage(self.path / name, inputs, notes or {}, results, tidy, set(growing))
        if self._is_current(stage, say):
            say("unchanged")
            return
        if stage.is_sealed():  # an earlier attempt died while it published
            stage.publish()
            if self._is_current(stage, say):
                say("finished")
                return
        stage.prepare(may_discard, say)
        say("started")
        self.event(stage=name, what="started", inputs=hash_of(inputs))
        began = time.monotonic()
        build(stage.work)
        stage.seal(name, time.monotonic() - began)
        stage.publish()
        self.event(stage=name, what="finished", seconds=round(time.monotonic() - began, 3))
        say("finished")

    def state(
        self,
        name: str,
        inputs: Inputs,
        may_discard: Callable[[set[str]], bool],
        *,
        growing: Collection[str] = (),
        notes: Inputs | None = None,
    ) -> str:
        """What :meth:`stage` would find: "done", or in words what it would do. Writes nothing."""
        said: list[str] = []
        stage = _Stage(self.path / name, inputs, notes or {}, (), lambda work: None, set(growing))
        if self._is_current(stage, said.append, keep_notes=True):
            return "done"
        return said[0] if said else stage.outlook(may_discard)

    def event(self, **fields: Any) -> None:
        """Append one line to ``events.jsonl``."""
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"time": time.time(), **fields}, sort_keys=True) + "\n")

    def _is_current(self, stage: _Stage, say: Announce, keep_notes: bool = False) -> bool:
        """Whether the result is there, made from the stage's inputs, byte for byte as written."""
        done = _record(stage.final / _DONE)
        if done is None or stage.changed(done):
            return False
        for name, facts in _outputs(stage.final, done).items():
            file = stage.final / name
            whole = file.is_file() and file.stat().st_size == facts["size"]
            if file.name == CARD:  # the user's to edit
                continue
            if not whole or self.digest(file) != facts["sha256"]:
                say(f"made again: {name} is damaged or missing")
                return False
        if (
            done["notes"] != stage.notes and not keep_notes
        ):  # settings that differ, and lead to the same
            write_json(stage.final / _DONE, done | {"notes": stage.notes})
        return True


class _Stage:
    """One stage on its way from its inputs to its folder."""

    def __init__(
        self,
        final: Path,
        inputs: Inputs,
        notes: Inputs,
        results: Collection[str],
        tidy: Callable[[Path], None],
        growing: set[str],
    ) -> None:
        self.final, self.work = final, final.with_name(f"{final.name}.work")
        self.inputs, self.notes = json.loads(json.dumps(inputs)), json.loads(json.dumps(notes))
        self.results, self.tidy, self.growing = results, tidy, growing

    def changed(self, record: dict[str, Any]) -> set[str]:
        """Names of the inputs in which a record of finished or begun work differs."""
        if record.get("format") != FORMAT:
            return {"floe"}
        old = record["inputs"]
        return {k for k in old.keys() | self.inputs.keys() if old.get(k) != self.inputs.get(k)}

    def _noted(self, record: dict[str, Any]) -> set[str]:
        old = record.get("notes", {})
        return {k for k in old.keys() | self.notes.keys() if old.get(k) != self.notes.get(k)}

    def prepare(self, may_discard: Callable[[set[str]], bool], say: Announce) -> None:
        """Make the work folder ready: go on with what is there, or begin anew, if that may be."""

        def check(place: Path, what: str, record: dict[str, Any]) -> None:
            reason = self._difference(record)
            if not may_discard(self.changed(record) | self._noted(record)):
                raise FileError(
                    place,
                    f"{what} with {reason}; only --redo discards it (run(..., redo=True)), "
                    "under another name the run keeps both",
                )
            say(f"made anew: {reason}")

        begun, done = self._begun(), _record(self.final / _DONE)
        if begun is not None and self.changed(begun) - self.growing:
            if self._holds_work():
                check(self.work, "holds unfinished work", begun)
            self._discard()
            begun = None
        if begun is None and done is not None:
            if self.growing and self.changed(done) <= self.growing:
                self._begin_with(done)
            elif self.changed(done):
                check(self.final, "is finished", done)
        self._mark()

    def outlook(self, may_discard: Callable[[set[str]], bool]) -> str:
        """What :meth:`prepare` would do, in words."""
        begun, done = _record(self.work / _MARKER), _record(self.final / _DONE)
        if begun is not None and not self.changed(begun) - self.growing:
            return "to do, from where it stopped"
        record = begun if begun is not None and self._holds_work() else done
        changed = set() if record is None else self.changed(record)
        if record is None or not changed:
            return "to do"
        if record is done and changed <= self.growing:
            return "to do, from what is done"
        needs = "to do again" if may_discard(changed | self._noted(record)) else REFUSED
        return f"{needs}: {self._difference(record)}"

    def is_sealed(self) -> bool:
        """Whether the work folder holds a finished result."""
        done = _record(self.work / _DONE)
        return done is not None and done.get("format") == FORMAT

    def seal(self, name: str, seconds: float) -> None:
        """Write ``DONE.json`` beside the results: from here on they only have to be moved."""
        outputs = {}
        for file in self._files():
            place = file.relative_to(self.work).as_posix()
            if self._is_result(place):
                flush(file)
                outputs[place] = {"size": file.stat().st_size, "sha256": sha256(file)}
        write_json(
            self.work / _DONE,
            {
                "format": FORMAT, "stage": name, "inputs_hash": hash_of(self.inputs),
                "inputs": self.inputs, "notes": self.notes, "outputs": outputs,
                "seconds": round(seconds, 3),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )  # fmt: skip

    def publish(self) -> None:
        """Move the sealed result to its place; an older one's files go, by name."""
        self.tidy(self.work)
        for left in self.work.rglob(f"{STAGING}*"):  # of a writer that was killed
            shutil.rmtree(left, ignore_errors=True)
        (self.work / _MARKER).unlink(missing_ok=True)
        old = _record(self.final / _DONE)
        if old is not None:
            _remove(self.final, [*_outputs(self.final, old), _DONE])
        if self.final.is_symlink() or self.final.exists():  # it holds files of others
            self._move_into_final()
        else:
            self.work.rename(self.final)
        flush(self.final.parent)

    def _move_into_final(self) -> None:
        """File by file, ``DONE.json`` last: whoever is killed in between can go on."""
        for file in sorted(self._files(), key=lambda file: file == self.work / _DONE):
            target = self.final / file.relative_to(self.work)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(_free_name(target))
            shutil.move(file, target)
        shutil.rmtree(self.work)  # folders alone

    def _begun(self) -> dict[str, Any] | None:
        """The record of work that can be gone on with."""
        found = _record(self.work / _MARKER)
        if found is None and (self.work / ".inputs").is_file():
            return {"format": 1}
        if found is None and self._holds_work():
            raise FileError(
                self.work,
                f"must be a folder that floe began, got one without {_MARKER}; move it away",
            )
        if found is not None and found.get("copying"):
            self._discard()
            return None
        return found

    def _begin_with(self, done: dict[str, Any]) -> None:
        """Copy a finished result; a copy that was cut short is known by its marker."""
        self._mark(copying=True)
        for name in _outputs(self.final, done):
            source, target = self.final / name, self.work / name
            if source.name != CARD and source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)

    def _mark(self, copying: bool = False) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        marker = {"format": FORMAT, "inputs": self.inputs, "notes": self.notes}
        write_json(self.work / _MARKER, marker | ({"copying": True} if copying else {}))

    def _discard(self) -> None:
        """Empty the work folder of what the stage makes."""
        if self.results:
            self.tidy(self.work)
        _remove(self.work, [p.relative_to(self.work).as_posix() for p in self._files()
                            if self._is_result(p.relative_to(self.work).as_posix())])  # fmt: skip
        for name in (_DONE, _MARKER, ".inputs"):
            (self.work / name).unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Every file of the work folder, symbolic links among them, but the marker."""
        found = []
        for folder, names, files in os.walk(self.work):
            links = [name for name in names if (Path(folder) / name).is_symlink()]
            found += [Path(folder) / name for name in [*files, *links]]
        return sorted(p for p in found if p != self.work / _MARKER)

    def _holds_work(self) -> bool:
        names = (p.relative_to(self.work).as_posix() for p in self._files())
        return any(not _is_hidden(n) and not n.endswith(".lock") for n in names)

    def _is_result(self, name: str) -> bool:
        mine = not self.results or any(
            name == one or name.startswith(f"{one}/") for one in self.results
        )
        return mine and name != _DONE and not _is_hidden(name)

    def _difference(self, record: dict[str, Any]) -> str:
        if record.get("format") != FORMAT:
            return "the inputs of another version of floe, which cannot be compared"
        changes = _changes(record["inputs"], self.inputs)
        behind = _changes(record.get("notes", {}), self.notes)
        return ", ".join(changes) + (f" ({', '.join(behind)})" if behind else "")


class _Digests:
    """sha256 of files, remembered by what the file system says of each."""

    def __init__(self, file: Path, kept: bool) -> None:
        self._file, self._kept = file, kept
        self._known: dict[str, list[Any]] | None = None

    def of(self, path: Path) -> str:
        """A file's digest; read only if its size, times or inode differ from the last look."""
        if self._known is None:
            self._known = self._load()
        name, began, before = os.path.abspath(path), time.time_ns(), _stamp(path)
        entry = self._known.get(name)
        if entry is not None and entry[0] == before:
            return str(entry[1])
        digest, changed = sha256(path), max(path.stat().st_mtime_ns, path.stat().st_ctime_ns)
        if began - changed > _SETTLED and _stamp(path) == before:
            self._known[name] = [before, digest]
            if self._kept:
                write_json(self._file, self._known)
        return digest

    def _load(self) -> dict[str, list[Any]]:
        try:
            known = read_json(self._file)
        except FileError:  # none yet, or damaged: every file is read again
            return {}
        return {k: v for k, v in known.items() if isinstance(v, list) and len(v) == 2}


def _stamp(path: Path) -> str:
    facts = path.stat()
    return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {facts.st_ino}"


def _record(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.is_file() else None


def _outputs(folder: Path, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files a record lists; none may be outside its folder, for they are deleted by name."""
    outputs: dict[str, dict[str, Any]] = record.get("outputs", {})
    for name in outputs:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise FileError(folder / _DONE, f"must list files inside its folder, got {name!r}")
    return outputs


def _remove(root: Path, names: list[str]) -> None:
    """Delete these files, then those of their folders, and ``root``, that are empty."""
    folders: set[Path] = set()
    for name in names:
        (root / name).unlink(missing_ok=True)
        folders.update((root / name).relative_to(root).parents)
    for folder in sorted(folders, key=lambda one: -len(one.parts)):
        path = root / folder
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def _is_hidden(name: str) -> bool:
    """Such as .DS_Store: what file managers and file systems leave; no stage writes any."""
    return any(part.startswith(".") for part in name.split("/"))


def _free_name(path: Path) -> Path:
    taken, number = path, 0
    while taken.exists() or taken.is_symlink():
        number += 1
        taken = path.with_name(f"{path.name}.{number}")
    return taken


def _changes(old: Inputs, new: Inputs) -> list[str]:
    """``name old -> new`` for every value that differs, in order of name."""
    before, after = _flat(old), _flat(new)
    return [
        f"{name} {_short(before.get(name))} -> {_short(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _flat(values: Inputs, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def _short(value: Any) -> str:
    """A value in a sentence; a digest by its first 8 digits."""
    if isinstance(value, str) and len(value) == 64:
        return value[:8]
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
