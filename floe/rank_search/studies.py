"""The optuna study behind a search: opened safely, owned by processes, cleaned of dead ones."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from floe.atomic import flush
from floe.rank_search.proposals import Point, SearchSpace

STUDY = "floe"


@dataclass(frozen=True)
class Owner:
    """A process: host, boot, id and start time, so that a reused id is not mistaken for it."""

    host: str
    boot: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        return cls(platform.node(), _boot(), os.getpid(), _started(os.getpid()))


def open_study(url: str, identity: dict[str, Any], prune: bool) -> optuna.Study:
    """Create or load the study in a database; one made with other arguments is refused by name.

    Raises:
        ValueError: if the storage cannot be opened (its password is never shown), or holds a search
            with other arguments.
    """
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if prune:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=0)
    try:
        _create_whole(url)
        storage = optuna.storages.RDBStorage(url)
        study = optuna.create_study(
            storage=storage,
            study_name=STUDY,
            direction="minimize",
            pruner=pruner,
            load_if_exists=True,
        )
    except (SQLAlchemyError, StorageInternalError, ImportError) as error:
        # the driver's text may repeat the URL, so neither it nor its traceback is passed on
        name = type(error).__name__
        raise ValueError(
            f"storage must be a database that opens, got {mask(url)} ({name})"
        ) from None
    expected = json.loads(json.dumps(identity))
    found = study.user_attrs.get("identity")
    if found is None:
        study.set_user_attr("identity", expected)
    elif found != expected:
        keys = sorted(found.keys() | expected.keys())
        names = [name for name in keys if found.get(name) != expected.get(name)]
        raise ValueError(
            f"the study in {mask(url)} must have been made with the same arguments, got other "
            f"{', '.join(names)}; use another directory or storage"
        )
    return study


def _create_whole(url: str) -> None:
    """Make a SQLite file that is not there yet beside its place, with every table and index.

    Optuna creates them one by one. Killed in between, the file would keep its tables without the
    index that makes a study's name unique, and every later start would add one more study.
    """
    parsed = make_url(url)
    place = parsed.database
    if not parsed.drivername.startswith("sqlite") or not place or place.startswith((":", "file:")):
        return
    with FileLock(f"{place}.lock"):
        if Path(place).exists():
            return
        fresh = Path(f"{place}.new")
        for leftover in (fresh, Path(f"{fresh}-journal")):
            leftover.unlink(missing_ok=True)
        storage = optuna.storages.RDBStorage(f"sqlite:///{fresh}")
        storage.engine.dispose()
        flush(fresh)
        fresh.replace(place)
        flush(fresh.parent)


def begin_trial(
    study: optuna.Study, space: SearchSpace, point: Point, owner: Owner, index: int, redraws: int
) -> optuna.trial.Trial:
    """Add a RUNNING trial with its owner in one transaction, so that none is ever without."""
    attributes = {"owner": dataclasses.asdict(owner), "index": index, "redraws": redraws}
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params={"rank": point[0], "num_experts": point[1]},
            distributions=space.distributions(),
            user_attrs=attributes,
        )
    )
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    mine = [t for t in running if t.user_attrs["owner"] == attributes["owner"]]
    return optuna.trial.Trial(study, max(mine, key=lambda t: t.number)._trial_id)


@dataclass(frozen=True)
class Trial:
    """One trained point: complete, pruned (stopped early) or failed (not finite, out of memory).

    ``value`` is the validation loss in nats per token (None unless complete), ``seconds`` the time
    of training and validation, ``redraws`` how many suggestions before it were already trained.
    """

    number: int
    rank: int
    num_experts: int
    state: str
    value: float | None
    seconds: float
    redraws: int
    reason: str = ""


def finished(study: optuna.Study) -> list[Trial]:
    """Trials that ended, in order; not those a dead process left."""
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    return [_trial(trial) for trial in study.get_trials(deepcopy=False, states=ended)]


def best_trial(study: optuna.Study) -> Trial | None:
    """The complete trial of the lowest value; ties go to the earlier one."""
    complete = [t for t in finished(study) if t.value is not None]
    return min(complete, key=lambda t: (t.value, t.number), default=None)


def _trial(trial: FrozenTrial) -> Trial:
    reason = trial.user_attrs.get("reason", "")
    if trial.state == TrialState.COMPLETE:
        state = "complete"
    else:
        state = "failed" if reason.startswith("failed") else "pruned"
    return Trial(
        number=trial.user_attrs["index"],
        rank=trial.params["rank"],
        num_experts=trial.params["num_experts"],
        state=state,
        value=trial.value if state == "complete" else None,
        seconds=trial.user_attrs["seconds"],
        redraws=trial.user_attrs["redraws"],
        reason=reason,
    )


def fail_orphans(study: optuna.Study, me: Owner, alone: bool) -> list[int]:
    """Tell RUNNING trials of dead processes FAIL; their numbers.

    With ``alone`` (the caller holds the lock of the study's own database) every one is an orphan.
    Otherwise a process is dead if it ran on this host and there is no such process now.

    Raises:
        RuntimeError: if a trial's process lives, or is on another host, where that cannot be seen.
    """
    told = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = Owner(**trial.user_attrs["owner"])
        gone = owner.boot != me.boot or _started(owner.pid) != owner.started
        if not (alone or owner == me or (owner.host == me.host and gone)):
            raise RuntimeError(
                f"trial {trial.number} of this study is running in process {owner.pid} on host "
                f"{owner.host}; wait for it, or tell the trial FAIL if that process is dead"
            )
        study.tell(trial.number, state=TrialState.FAIL)
        told.append(trial.number)
    return told


@contextmanager
def one_process(lock: Path) -> Iterator[None]:
    """Hold a file lock; RuntimeError at once if another process does."""
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout as error:
        raise RuntimeError(
            f"another process is searching in {lock.parent}; one at a time"
        ) from error


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Warnings only from optuna's logger; its level is put back."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def mask(url: str) -> str:
    """A database URL without its password, or a word in place of what cannot be parsed."""
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):
        return "an unreadable URL"
    secret = {
        key: "hidden" for key in parsed.query if "pass" in key.lower() or "token" in key.lower()
    }
    return parsed.update_query_dict(secret).render_as_string(hide_password=True)


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else "unknown"


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot; empty if there is none."""
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return ""
        return stat.rpartition(")")[2].split()[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "unknown"
