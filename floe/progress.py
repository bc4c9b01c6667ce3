"""Progress of a run on a terminal, and as one line a minute where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """What a pipeline tells while it works. This one is silent; subclasses show it."""

    def stage(self, name: str, what: str) -> None:
        """A stage ``started``, ``finished`` or was ``unchanged``; or a remark about it."""

    def say(self, text: str) -> None:
        """A line the user should read."""

    def step(self, name: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` parts of a stage; ``note`` is the loss or what is being done."""


class TerminalProgress(Progress):
    """A bar for the stage at work, with time left and loss; a line for each finished one."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._began: dict[str, float] = {}
        self._bar: Any = RichProgress(
            TextColumn("{task.description:>22}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),  # it may quote an error
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, Any] = {}
        self._bar.start()

    def stage(self, name: str, what: str) -> None:
        """Print the line of a finished or skipped stage."""
        if what == "started":
            self._began[name] = time.monotonic()
            return
        for task in [t for t in self._tasks if t == name or t.startswith(f"{name} ")]:
            self._bar.remove_task(self._tasks.pop(task))
        seconds = time.monotonic() - self._began.get(name, time.monotonic())
        mark = f"{seconds:7.1f} s" if what == "finished" else what
        self._bar.console.print(f"{name:>22}  {mark}")

    def say(self, text: str) -> None:
        """Print the line."""
        self._bar.console.print(text, highlight=False, markup=False)

    def step(self, name: str, done: int, total: int, note: str = "") -> None:
        """Move the bar."""
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total, note="")
        self._bar.update(self._tasks[name], completed=done, total=total, note=note)

    def close(self) -> None:
        """Take the bars away."""
        self._bar.stop()


class LineProgress(Progress):
    """One line at every stage's start and end and about one a minute between, on stderr."""

    def __init__(self, every: float = 60.0) -> None:
        self._every, self._last = every, time.monotonic()

    def stage(self, name: str, what: str) -> None:
        """A line."""
        self._line(f"{name}: {what}")

    def say(self, text: str) -> None:
        """A line."""
        self._line(text)

    def step(self, name: str, done: int, total: int, note: str = "") -> None:
        """A line if a minute has passed since the last."""
        if time.monotonic() - self._last >= self._every:
            self._line(f"{name}: {done}/{total} {note}".rstrip())

    def _line(self, text: str) -> None:
        self._last = time.monotonic()
        sys.stderr.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
        sys.stderr.flush()


@contextmanager
def open_progress(quiet: bool) -> Iterator[Progress]:
    """Bars on a terminal, lines elsewhere, nothing when ``quiet``."""
    if quiet:
        yield Progress()
    elif sys.stderr.isatty():
        terminal = TerminalProgress()
        try:
            yield terminal
        finally:
            terminal.close()
    else:
        yield LineProgress()
