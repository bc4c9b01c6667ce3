"""The optuna study behind a search: opened safely, owned by processes, cleaned of dead ones."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from floe.proposals import Point, SearchSpace

STUDY = "floe"


@dataclass(frozen=True)
class Owner:
    """A process: host, its boot, its id and start time, so that a reused id is not mistaken for it."""

    host: str
    boot: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        return cls(platform.node(), _boot(), os.getpid(), _started(os.getpid()))


def open_study(
    url: str, identity: dict[str, Any], pruner: optuna.pruners.BasePruner
) -> optuna.Study:
    """Create or load the study in a database; one made with other arguments is refused by name.

    Raises:
        ValueError: if the storage cannot be opened (its password never shown), or holds a search with
            other arguments.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
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


def proposed(
    study: optuna.Study, space: SearchSpace, point: Point, attributes: dict[str, Any]
) -> int:
    """Add a RUNNING trial with its owner in one transaction, so none is ever without; its number."""
    values = {"rank": point[0], "num_experts": point[1]}
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=values,
            distributions=space.distributions(),
            user_attrs=attributes,
        )
    )
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return max(t.number for t in running if t.user_attrs["owner"] == attributes["owner"])


def fail_orphans(study: optuna.Study, me: Owner) -> list[int]:
    """Tell RUNNING trials of dead processes FAIL; their numbers.

    A process is dead if it ran on this host and there is no such process now. Those of other hosts
    are left: whether they live cannot be seen from here.
    """
    told = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = Owner(**trial.user_attrs["owner"])
        gone = owner.boot != me.boot or _started(owner.pid) != owner.started
        if owner.host == me.host and (gone or owner == me):
            study.tell(trial.number, state=TrialState.FAIL)
            told.append(trial.number)
    return told


def masked_url(study: optuna.Study) -> str:
    """The study's storage, fit to be printed."""
    storage: Any = study._storage
    inner = getattr(storage, "_backend", storage)
    return mask(str(getattr(inner, "url", type(inner).__name__)))


def mask(url: str) -> str:
    """A database URL without its password, or a word in place of what cannot be parsed."""
    try:
        parsed = make_url(url)
    except (SQLAlchemyError, ValueError):
        return "an unreadable URL"
    secret = {key: "***" for key in parsed.query if "pass" in key.lower() or "token" in key.lower()}
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
