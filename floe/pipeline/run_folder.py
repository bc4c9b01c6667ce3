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
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from floe.artifacts.records import FORMAT, StageFile, StageRecord, WorkRecord
from floe.artifacts.schema import read, write
from floe.errors import FileError
from floe.storage import (
    CARD,
    STAGING,
    differing,
    flush,
    hash_of,
    read_json,
    sha256,
    write_json,
)

REFUSED = "refused without --redo"
_ANEW, _RESUME, _GROW = "to do", "to do, from where it stopped", "to do, from what is done"
_DONE, _MARKER = "DONE.json", ".inputs.json"
_SETTLED = 2 * 10**9  # ns: a file changed more recently may change again in the same clock tick

Record = TypeVar("Record", bound=WorkRecord)
Announce = Callable[[str, str], None]
MayDiscard = Callable[[set[str]], bool]


@dataclass(frozen=True)
class Stage:
    """One folder of a run, named as it is: what decides its result, and what builds it.

    ``build`` writes into the folder it is given. It finds there what an interrupted attempt with
    the same inputs left; an exception leaves that for the next attempt. Where ``growing`` inputs
    alone changed it goes on from the finished result, and so it does where another program changed
    the result's files: it must check what it finds.
    """

    name: str
    inputs: Mapping[str, Any]  # what decides the result: JSON values by name
    build: Callable[[Path], None]
    results: Collection[str] = ()  # files and folders that are the result; empty = all
    tidy: Callable[[Path], None] = lambda work: None  # removes what only build needs; may repeat
    growing: Collection[str] = ()
    followers: Collection[str] = ()  # stages that rest on what a growing one hands on,
    handed: str = ""  # the files of this folder
    disposable: bool = False  # made so quickly that nobody is asked before it is made anew
    notes: Mapping[str, Any] = field(default_factory=dict)  # settings behind the inputs, to be told

    def __post_init__(self) -> None:
        for name in ("inputs", "notes"):  # as they will be read back
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))


class RunFolder:
    """One run's folder. Open it with :meth:`locked` before writing: one process at a time."""

    def __init__(self, path: str | os.PathLike[str], read_only: bool = False) -> None:
        self.path, self.read_only = Path(path), read_only

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

    def done(self, stage: str) -> StageRecord | None:
        """``DONE.json`` of a finished stage, or None."""
        return _record(StageRecord, self.path / stage / _DONE)

    def make(
        self,
        stage: Stage,
        announce: Announce = lambda stage, what: None,
        may_discard: MayDiscard = lambda changed: False,
    ) -> None:
        """Build the stage in its work folder, unless it is done with the same inputs.

        Args:
            stage: what to make.
            announce: called with its name and "started", "finished", "unchanged", or a remark.
            may_discard: told which inputs and notes differ from those of finished or begun work.

        Raises:
            FileError: work made from other inputs, or by another version of floe, may not be
                discarded; or there is a work folder that floe did not make.
        """
        say, work = partial(announce, stage.name), _Work(self.path, stage)
        if self._is_current(stage, say):
            say("unchanged")
            return
        if work.is_sealed():  # an earlier attempt died while it published
            work.publish()
            if self._is_current(stage, say):
                say("finished")
                return
        work.prepare(may_discard, say)
        say("started")
        self.event(stage=stage.name, what="started", inputs=hash_of(stage.inputs))
        began = time.monotonic()
        stage.build(work.folder)
        work.check_followers(may_discard)
        work.seal(time.monotonic() - began)
        work.publish()
        self.event(stage=stage.name, what="finished", seconds=round(time.monotonic() - began, 3))
        say("finished")

    def outlook(self, stage: Stage, may_discard: MayDiscard) -> str:
        """What :meth:`make` would find: "done", or in words what it would do. Writes nothing."""
        said: list[str] = []
        if self._is_current(stage, said.append):
            return "done"
        return said[0] if said else _Work(self.path, stage).outlook(may_discard)

    def event(self, **fields: Any) -> None:
        """Append one line to ``events.jsonl``."""
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"time": time.time(), **fields}, sort_keys=True) + "\n")

    def digest(self, path: Path) -> str:
        """sha256 of a file; read again only if its size, times or inode differ from before."""
        name, began, before = os.path.abspath(path), time.time_ns(), _stamp(path)
        if self._digests.get(name, [None])[0] == before:
            return str(self._digests[name][1])
        digest, changed = sha256(path), max(path.stat().st_mtime_ns, path.stat().st_ctime_ns)
        if began - changed > _SETTLED and _stamp(path) == before:
            self._digests[name] = [before, digest]
            if not self.read_only:
                write_json(self.path / "digests.json", self._digests)
        return digest

    @cached_property
    def _digests(self) -> dict[str, list[Any]]:
        """Absolute path -> what the file system said of the file, and its digest."""
        try:
            known = read_json(self.path / "digests.json")
        except FileError:  # none yet, or damaged: every file is read again
            return {}
        return {k: v for k, v in known.items() if isinstance(v, list) and len(v) == 2}

    def _is_current(self, stage: Stage, say: Callable[[str], None]) -> bool:
        """Whether the result is there, made from the stage's inputs, byte for byte as written."""
        final, done = self.path / stage.name, self.done(stage.name)
        if done is None or _changed(done, stage):
            return False
        for name, facts in _outputs(final, done).items():
            file = final / name
            whole = file.is_file() and file.stat().st_size == facts.size
            if file.name == CARD:  # the user's to edit
                continue
            if not whole or self.digest(file) != facts.sha256:
                say(f"made again: {name} is damaged or missing")
                return False
        if done.notes != stage.notes and not self.read_only:  # other settings, the same result
            write(final / _DONE, replace(done, notes=stage.notes))
        return True


class _Work:
    """A stage's work folder, and how it becomes the stage's folder."""

    def __init__(self, root: Path, stage: Stage) -> None:
        self.stage, self.final = stage, root / stage.name
        self.folder = self.final.with_name(f"{self.final.name}.work")

    def plan(self) -> tuple[str, list[tuple[Path, str, WorkRecord]]]:
        """How the work would start; and finished or begun work that it would discard."""
        begun = _record(WorkRecord, self.folder / _MARKER)
        done = _record(StageRecord, self.final / _DONE)
        growing, start = set(self.stage.growing), _ANEW
        lost: list[tuple[Path, str, WorkRecord]] = []
        if begun is not None and not begun.copying:
            if not _changed(begun, self.stage) - growing:
                return _RESUME, []
            if self._holds_work():
                lost.append((self.folder, "holds unfinished work", begun))
        if done is not None:
            changed = _changed(done, self.stage)
            if growing and changed <= growing:
                start = _GROW
            elif changed:
                lost.append((self.final, "is finished", done))
        return start, lost

    def outlook(self, may_discard: MayDiscard) -> str:
        """What :meth:`prepare` would do, in words."""
        start, lost = self.plan()
        for _, _, record in lost:
            again = "to do again" if self._may_go(record, may_discard) else REFUSED
            return f"{again}: {_difference(record, self.stage)}"
        return start

    def prepare(self, may_discard: MayDiscard, say: Callable[[str], None]) -> None:
        """Make the work folder ready: go on with what is there, or begin anew, if that may be."""
        begun = (self.folder / _MARKER).is_file()
        if not begun and self._holds_work():
            raise FileError(
                self.folder,
                f"must be a folder that floe began, got one without {_MARKER}; move it away",
            )
        start, lost = self.plan()
        for place, what, record in lost:
            reason = _difference(record, self.stage)
            if not self._may_go(record, may_discard):
                raise FileError(
                    place,
                    f"{what} with {reason}; only --redo discards it (run(..., redo=True)), "
                    "under another name the run keeps both",
                )
            say(f"made anew: {reason}")
        if begun and start != _RESUME:
            self._discard()
        if start == _GROW:
            self._begin_with_result()
        self._mark()

    def _may_go(self, record: WorkRecord, may_discard: MayDiscard) -> bool:
        return self.stage.disposable or may_discard(_changed(record, self.stage, with_notes=True))

    def is_sealed(self) -> bool:
        """Whether the folder holds a finished result."""
        done = _record(StageRecord, self.folder / _DONE)
        return done is not None and done.format == FORMAT

    def seal(self, seconds: float) -> None:
        """Write ``DONE.json`` beside the results: from here on they only have to be moved."""
        outputs = {}
        for name in filter(self._is_result, self._files()):
            flush(self.folder / name)
            size = (self.folder / name).stat().st_size
            outputs[name] = StageFile(size, sha256(self.folder / name))
        done = StageRecord(
            format=FORMAT,
            stage=self.stage.name,
            inputs_hash=hash_of(self.stage.inputs),
            inputs=self.stage.inputs,
            notes=self.stage.notes,
            outputs=outputs,
            seconds=round(seconds, 3),
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        write(self.folder / _DONE, done)

    def check_followers(self, may_discard: MayDiscard) -> None:
        """Refuse what would take from finished stages the files that they rest on."""
        rest = [f for f in self.stage.followers if (self.final.parent / f / _DONE).is_file()]
        done = _record(StageRecord, self.final / _DONE) if rest else None
        if done is None or self._may_go(done, may_discard):
            return
        old = {name: facts.sha256 for name, facts in done.outputs.items() if self._is_handed(name)}
        new = {name: sha256(self.folder / name) for name in self._files() if self._is_handed(name)}
        if old != new:
            raise FileError(
                self.folder,
                f"holds another {self.stage.handed} than {self.final.name}/, on which the finished "
                f"{', '.join(rest)} rests; only --redo takes it (run(..., redo=True)), under "
                "another name the run keeps both, and the settings before go on as it was",
            )

    def _is_handed(self, name: str) -> bool:
        return name.startswith(f"{self.stage.handed}/") and Path(name).name != CARD

    def publish(self) -> None:
        """Move the sealed result to its place; an older one's files go, by name."""
        self.stage.tidy(self.folder)
        for left in self.folder.rglob(f"{STAGING}*"):  # of a writer that was killed
            shutil.rmtree(left, ignore_errors=True)
        (self.folder / _MARKER).unlink(missing_ok=True)
        old = _record(StageRecord, self.final / _DONE)
        if old is not None:
            _remove(self.final, [*_outputs(self.final, old), _DONE])
        if self.final.is_symlink() or self.final.exists():  # it holds files of others
            self._move_into_final()
        else:
            self.folder.rename(self.final)
        flush(self.final.parent)

    def _move_into_final(self) -> None:
        """File by file, ``DONE.json`` last: a process killed in between can go on."""
        for name in sorted(self._files(), key=lambda name: name == _DONE):
            target = self.final / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(_free_name(target))
            shutil.move(self.folder / name, target)
        shutil.rmtree(self.folder)  # only folders are left

    def _begin_with_result(self) -> None:
        """Copy the finished result; a copy that was cut short is known by its marker."""
        self._mark(copying=True)
        for name in _outputs(self.final, read(StageRecord, self.final / _DONE)):
            source, target = self.final / name, self.folder / name
            if source.name != CARD and source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)

    def _mark(self, copying: bool = False) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        inputs, notes = self.stage.inputs, self.stage.notes
        marker = WorkRecord(format=FORMAT, inputs=inputs, notes=notes, copying=copying or None)
        write(self.folder / _MARKER, marker)

    def _discard(self) -> None:
        """Empty the folder of what the stage makes."""
        if self.stage.results:
            self.stage.tidy(self.folder)
        _remove(self.folder, list(filter(self._is_result, self._files())))
        for name in (_DONE, _MARKER):
            (self.folder / name).unlink(missing_ok=True)

    def _files(self) -> list[str]:
        """Names of all files in the folder, symbolic links among them, but the marker."""
        names = []
        for folder, folders, files in os.walk(self.folder):
            links = [name for name in folders if (Path(folder) / name).is_symlink()]
            names += [(Path(folder) / name).relative_to(self.folder) for name in [*files, *links]]
        return sorted(name.as_posix() for name in names if name != Path(_MARKER))

    def _holds_work(self) -> bool:
        return any(not _is_hidden(n) and not n.endswith(".lock") for n in self._files())

    def _is_result(self, name: str) -> bool:
        wanted = self.stage.results
        mine = not wanted or any(name == part or name.startswith(f"{part}/") for part in wanted)
        return mine and name != _DONE and not _is_hidden(name)


def _record(kind: type[Record], file: Path) -> Record | None:
    try:
        return read(kind, file) if file.is_file() else None
    except FileError as error:
        advice = "delete this file: the stage is made again, and files that are there are kept"
        raise FileError(file, f"{str(error).removeprefix(f'{file}: ')}; {advice}") from error


def _changed(record: WorkRecord, stage: Stage, with_notes: bool = False) -> set[str]:
    """Names of the inputs in which a record of finished or begun work differs from the stage."""
    if record.format != FORMAT:
        return {"floe"}
    notes = differing(record.notes, stage.notes) if with_notes else []
    return {*differing(record.inputs, stage.inputs), *notes}


def _difference(record: WorkRecord, stage: Stage) -> str:
    """``name old -> new`` for every value that differs, and for the notes behind them."""
    if record.format != FORMAT:
        return "the inputs of another version of floe, which cannot be compared"
    pairs = [(_flat(record.inputs), _flat(stage.inputs)), (_flat(record.notes), _flat(stage.notes))]
    inputs, notes = (
        ", ".join(
            f"{name} {_short(old.get(name))} -> {_short(new.get(name))}"
            for name in differing(old, new)
        )
        for old, new in pairs
    )
    return f"{inputs} ({notes})" if notes else inputs


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _short(value: Any) -> str:
    """A value in a sentence; a digest by its first 8 digits."""
    if isinstance(value, str) and len(value) == 64:
        return value[:8]
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _outputs(folder: Path, record: StageRecord) -> dict[str, StageFile]:
    """The files a record lists; none may be outside its folder, for they are deleted by name."""
    for name in record.outputs:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise FileError(folder / _DONE, f"must list files inside its folder, got {name!r}")
    return record.outputs


def _remove(root: Path, names: list[str]) -> None:
    """Delete these files, then those of their folders, and ``root``, that are empty."""
    folders: set[Path] = set()
    for name in names:
        (root / name).unlink(missing_ok=True)
        folders.update(Path(name).parents)
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
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


def _stamp(path: Path) -> str:
    facts = path.stat()
    return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {facts.st_ino}"
