"""What a report shows: a run folder's artifacts, read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import TypeVar

from floe.artifacts.audit import Audit
from floe.artifacts.records import DataAccount, DataPart, Environment, StageRecord
from floe.artifacts.results import (
    Evaluation,
    Outcome,
    Placements,
    Profile,
    Router,
    Routers,
    Search,
    Training,
)
from floe.artifacts.schema import read
from floe.artifacts.selection import Selection
from floe.errors import FileError, hide_secrets
from floe.importance.scores import Scores

T = TypeVar("T")
_STAGES = ("search", "score", "select", "train", "profile", "eval")


@dataclass(frozen=True)
class Run:
    """Everything a report shows; ``scores`` and ``choice`` always, the rest if it was run.

    ``stages`` are the finished ones in the order of the pipeline; ``selection`` is the hash of what
    the select stage read, empty without its record.
    """

    name: str
    config: str
    env: Environment
    scores: Scores
    choice: Selection
    search: Search | None
    training: Mapping[str, Training]
    evaluation: Evaluation | None
    routers: list[Router]
    profile: Profile | None
    stages: Mapping[str, StageRecord]
    audit: Audit | None
    selection: str
    data: Mapping[str, DataPart]

    @property
    def layer_count(self) -> int:
        """L."""
        return self.scores.layer_count

    @property
    def model(self) -> str:
        """The model's name as the scoring stage recorded it; of a local path only the last part."""
        name = str(self.scores.meta.get("model") or "unnamed model")
        return PurePath(name).name if PurePath(name).is_absolute() else name

    @property
    def is_paper(self) -> bool:
        """Whether the chosen policy is the paper's masks, so that there is nothing to compare."""
        return self.choice.policy == "masks"

    @property
    def outcomes(self) -> Mapping[str, Outcome]:
        """What the evaluation says of each arm."""
        return self.evaluation.arms if self.evaluation else {}

    @cached_property
    def arms(self) -> list[str]:
        """Every arm: base, main, those adapting all layers, then the rest by name."""
        places = {"base": 0, "main": 1}
        names = self.training.keys() | self.outcomes.keys()
        return sorted(names, key=lambda arm: (places.get(arm, 3 - self.adapts_all(arm)), arm))

    @property
    def trained(self) -> dict[str, Training]:
        """The training of each arm that was trained, in the order of the arms."""
        return {arm: self.training[arm] for arm in self.arms if arm in self.training}

    @property
    def evaluated(self) -> dict[str, Outcome]:
        """The outcome of each arm that was evaluated, in the order of the arms."""
        return {arm: self.outcomes[arm] for arm in self.arms if arm in self.outcomes}

    def adapts_all(self, arm: str) -> bool:
        """Whether an arm adapts every layer of the model."""
        return arm in self.training and len(self.training[arm].layers) == self.layer_count


def read_run(folder: Path) -> Run:
    """Reads a run folder.

    Required: config.yaml, env.json, score/scores.npz and select/selection.json.

    Raises:
        FileError: naming the path of a missing, unreadable or damaged artifact.
    """
    if not folder.is_dir():
        raise FileError(folder, "is not a folder; give the folder of a run")
    for name in ("score/scores.npz", "config.yaml"):
        if not (folder / name).is_file():
            raise FileError(folder / name, "is missing; the report needs it")
    try:
        config = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(folder / "config.yaml", f"cannot be read: {error}") from error
    env, scores = read(Environment, folder / "env.json"), Scores.load(folder / "score/scores.npz")
    layers, choice = scores.layer_count, Selection.load(folder / "select")
    if len(choice.layer_scores) != layers:
        rule = f"layer_scores must be of the {layers} layers of the scores"
        raise FileError(folder / "select/selection.json", f"{rule}, got {len(choice.layer_scores)}")

    def optional(kind: type[T], file: str) -> T | None:
        return read(kind, folder / file, layers) if (folder / file).is_file() else None

    placed = optional(Placements, "arms/placements.json")  # the arms of the last configuration
    search, account = optional(Search, "search/result.json"), optional(DataAccount, "data.json")
    routers = optional(Routers, "eval/router.json")
    profile = optional(Profile, "profile/profile.json")
    stages = _stages(folder, placed)
    audit = folder / "audit/audit.json"
    files = sorted(folder.glob("train/*/metrics.json"))
    arms = [read(Training, f, layers) for f in files if placed is None or f.parent.name in placed]
    return Run(
        name=folder.resolve().name,
        config=hide_secrets(config),  # of a run that wrote it before passwords were masked
        env=env,
        scores=scores,
        choice=choice,
        search=search and replace(search, trials=sorted(search.trials, key=lambda t: t.number)),
        training={arm.arm: arm for arm in arms},
        evaluation=optional(Evaluation, "eval/results.json"),
        routers=routers.modules if routers else [],
        profile=profile and replace(profile, points=sorted(profile.points, key=lambda p: p.layers)),
        stages=stages,
        audit=Audit.load(audit, layers) if audit.is_file() else None,
        selection=stages["select"].inputs_hash if "select" in stages else "",
        data=account.parts if account else {},
    )


def _stages(folder: Path, placed: Placements | None) -> dict[str, StageRecord]:
    """Finished stages in pipeline order; the report's own record would change what it reports."""
    names = []
    for path in (*folder.glob("*/DONE.json"), *folder.glob("*/*/DONE.json")):
        name = path.parent.relative_to(folder).as_posix()
        stage, _, part = name.partition("/")
        gone = stage == "train" and placed is not None and part not in placed
        if stage in _STAGES and not gone and not name.endswith(".work"):
            names.append(name)
    names.sort(key=lambda name: (_STAGES.index(name.split("/")[0]), name != "train/main", name))
    return {name: read(StageRecord, folder / name / "DONE.json") for name in names}
