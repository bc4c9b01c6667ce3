"""The optuna study behind a search, and which of its trials are the search's own.

Other programs may touch a study: a dashboard, a script. A trial is the search's own by what
``begin_trial`` wrote with it, and ended by what ``end_trial`` did; all others are passed over.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from floe.artifacts.results import Trial
from floe.errors import SearchError
from floe.rank_search.storage import Say, mask, open_storage
from floe.storage import differing

Point = tuple[int, int]  # rank, number of experts
STUDY = "floe"
MEMORY = "memory"  # attribute of study and trials: the settings that decide how much a trial takes
OUT_OF_MEMORY = "failed: out of memory"
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


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


def open_study(
    place: str | Path, identity: dict[str, Any], prune: bool, say: Say = lambda note: None
) -> optuna.Study:
    """Create or load the study in a database (a URL, or a SQLite file's path).

    Raises:
        ValueError: if the database cannot be opened (its password is never shown), or its study is
            of other arguments, which are named, or none of a search; nothing is written to it then.
        SearchError: if another program holds the database for too long.
    """
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if prune:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=0)
    study = optuna.create_study(
        storage=open_storage(place, say),
        study_name=STUDY,
        direction="minimize",
        pruner=pruner,
        sampler=optuna.samplers.RandomSampler(),  # asked nothing: propose has its own
        load_if_exists=True,
    )
    made = study.user_attrs.get("identity")
    untouched = not study.user_attrs and not study.get_trials(deepcopy=False)
    if untouched and study.directions == [StudyDirection.MINIMIZE]:
        study.set_user_attr("identity", identity)  # made just now, or by a process that died here
    elif not isinstance(made, dict):
        raise ValueError(
            f"the study {STUDY!r} in {mask(place)} must be one that a search of floe made, got "
            f"another program's with {len(study.get_trials(deepcopy=False))} trials; use another "
            "storage"
        )
    elif other := differing(made, identity):
        raise ValueError(
            f"the study in {mask(place)} must have been made with the same arguments, got other "
            f"{', '.join(other)}; use another directory or storage"
        )
    return study


def begin_trial(
    study: optuna.Study,
    distributions: Mapping[str, IntDistribution],
    point: Point,
    owner: Owner,
    index: int,
    redraws: int,
) -> optuna.trial.Trial:
    """Add a RUNNING trial with its owner in one transaction, so that none is ever without.

    Raises:
        ValueError: if a trial of another program has other kinds of parameters of these names.
    """
    number = _add(
        study,
        state=TrialState.RUNNING,
        params={"rank": point[0], "num_experts": point[1]},
        distributions=distributions,
        user_attrs={
            "owner": dataclasses.asdict(owner),
            "index": index,
            "redraws": redraws,
            MEMORY: study.user_attrs.get(MEMORY),
        },
    )
    return optuna.trial.Trial(study, number)


@dataclass
class Outcome:
    """What a trial gave: its validation loss, or why it has none; ``losses`` by step on the way.

    ``adapter`` is the digest of the adapter it saved.
    """

    value: float | None = None
    reason: str = ""
    seconds: float = 0.0
    adapter: str = ""
    losses: dict[int, float] = field(default_factory=dict)


def end_trial(study: optuna.Study, trial: optuna.trial.Trial, outcome: Outcome) -> None:
    """Record a trial's outcome, ``seconds`` last of what it wrote.

    Where another program told the trial meanwhile, the outcome becomes a trial of its own.
    """
    state = TrialState.PRUNED if outcome.value is None else TrialState.COMPLETE
    facts = {"loss": outcome.value, "reason": outcome.reason}
    facts |= {"adapter": outcome.adapter, "seconds": outcome.seconds}

    def tell() -> None:
        for name, fact in facts.items():
            trial.set_user_attr(name, fact)
        study.tell(trial, outcome.value, state=state)

    if not _while_running(tell):
        _add(
            study,
            state=state,
            value=outcome.value,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={**trial.user_attrs, **facts},
            intermediate_values=outcome.losses,
        )


def should_stop(study: optuna.Study, trial: optuna.trial.Trial, losses: dict[int, float]) -> bool:
    """Whether the study's pruner gives up a trial with these losses by step, the last one new."""
    step = max(losses)
    _while_running(lambda: trial.report(losses[step], step))
    so_far = optuna.trial.create_trial(state=TrialState.RUNNING, intermediate_values=losses)
    return bool(study.pruner.prune(own_study(study), so_far))


def _while_running(write: Callable[[], None]) -> bool:
    """Do what needs a running trial; False if another program has told it."""
    try:
        write()
    except (RuntimeError, ValueError) as error:  # optuna's kinds for a trial that has ended
        if isinstance(error, SearchError):
            raise
        return False
    return True


def _add(study: optuna.Study, **facts: Any) -> int:
    """Add a trial as ``study.add_trial`` does; its id in the storage."""
    trial = optuna.trial.create_trial(**facts)
    try:
        number: int = study._storage.create_new_trial(study._study_id, template_trial=trial)
    except ValueError as error:
        raise ValueError(
            f"the study {study.study_name!r} must hold whole-number rank and num_experts, got "
            f"others in a trial of another program ({error}); use another directory or storage"
        ) from None
    return number


def finished(study: optuna.Study) -> list[Trial]:
    """The search's trials that ended, in order; not those a dead process left."""
    return [_trial(trial) for trial in _ended(study)]


def best_trial(study: optuna.Study) -> Trial | None:
    """The complete trial of the lowest value; ties go to the earlier one."""
    complete = [t for t in finished(study) if t.value is not None]
    return min(complete, key=lambda t: (t.value, t.number), default=None)


def adapter_digest(study: optuna.Study, number: int) -> str:
    """The digest of the adapter that this finished trial saved; empty for one of older versions."""
    trial = next(t for t in _ended(study) if t.user_attrs["index"] == number)
    return str(trial.user_attrs.get("adapter", ""))


def own_study(study: optuna.Study) -> optuna.Study:
    """The search's ended trials alone, in order and in memory: what draws and stops trials sees."""
    past = optuna.create_study(direction="minimize")
    past.add_trials(_ended(study))
    return past


def tried_points(study: optuna.Study) -> set[Point]:
    """Points that are trained or being trained; not those a dead process left."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    trials = [*_ended(study), *filter(_is_own, running)]
    return {(t.params["rank"], t.params["num_experts"]) for t in trials}


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    """Those that ran out of memory under other settings of memory count as never begun."""
    first: dict[int, FrozenTrial] = {}
    memory = study.user_attrs.get(MEMORY)
    for trial in sorted(study.get_trials(deepcopy=False, states=_ENDED), key=_ran_out_of_memory):
        other = trial.user_attrs.get(MEMORY) != memory and _ran_out_of_memory(trial)
        if _is_own(trial) and _is_recorded(trial) and not other:
            first.setdefault(trial.user_attrs["index"], trial)
    return [first[index] for index in sorted(first)]


def _is_own(trial: FrozenTrial) -> bool:
    written, owner = trial.user_attrs, trial.user_attrs.get("owner")
    return (
        isinstance(written.get("index"), int)
        and "redraws" in written
        and isinstance(owner, dict)
        and owner.keys() == Owner.__dataclass_fields__.keys()
        and trial.params.keys() == {"rank", "num_experts"}
    )


def _ran_out_of_memory(trial: FrozenTrial) -> bool:
    return str(trial.user_attrs.get("reason", "")).startswith(OUT_OF_MEMORY)


def _is_recorded(trial: FrozenTrial) -> bool:
    """Whether the search itself ended a trial of its own, not another program."""
    if "seconds" not in trial.user_attrs:
        return False
    complete = trial.state == TrialState.COMPLETE
    loss = trial.user_attrs.get("loss", trial.value if complete else None)
    return bool(loss == trial.value if complete else loss is None)


def _trial(trial: FrozenTrial) -> Trial:
    written, complete = trial.user_attrs, trial.state == TrialState.COMPLETE
    reason = written.get("reason", "")
    return Trial(
        number=written["index"],
        rank=trial.params["rank"],
        num_experts=trial.params["num_experts"],
        state="complete" if complete else "failed" if reason.startswith("failed") else "pruned",
        value=trial.value if complete else None,
        seconds=written["seconds"],
        redraws=written["redraws"],
        reason=reason,
    )


def fail_orphans(study: optuna.Study, me: Owner, alone: bool) -> list[int]:
    """Tell the search's RUNNING trials of dead processes FAIL; their numbers.

    With ``alone`` (the caller holds the lock of the study's own database) every one is an orphan.
    Otherwise a process is dead if it ran on this host and there is no such process now.

    Raises:
        SearchError: if a trial's process lives, or is on another host, where that cannot be seen.
    """
    told = []
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in filter(_is_own, running):
        owner = Owner(**trial.user_attrs["owner"])
        gone = owner.boot != me.boot or _started(owner.pid) != owner.started
        if not (alone or owner == me or (owner.host == me.host and gone)):
            raise SearchError(
                f"trial {trial.number} of this study is running in process {owner.pid} on host "
                f"{owner.host}; wait for it, or tell the trial FAIL if that process is dead"
            )
        study.tell(trial.number, state=TrialState.FAIL)
        told.append(trial.number)
    return told


@contextmanager
def one_process(lock: Path) -> Iterator[None]:
    """Hold a file lock; SearchError at once if another process does."""
    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        raise SearchError(f"another process is searching in {lock.parent}; one at a time") from None
    with held:
        yield


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Warnings only from optuna's logger; its level is put back."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else "unknown"


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot; empty if there is none."""
    try:
        if sys.platform == "linux":
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        os.kill(pid, 0)
    except PermissionError:  # of another user
        return "unknown"
    except OSError:
        return ""
    return "unknown"
