"""Which layers' adapters learn best? The policies on real data, with one training path for all.

For each mix of questions and each seed: rows are split anew; all layers are warmed up on half of
the training rows; every arm's policy chooses K layers from the scores of 256 of those; fresh
adapters on them train on the same rows in the same order. An arm's learning rate is the best of
the grid on seed 0 (by validation rows); what is compared is the loss on test rows, which nothing
was chosen by. Forgetting is the rise of the loss on the other mix's validation rows.

    python -m benchmarks.quality --seeds 0           # train what is missing, then report
    python -m benchmarks.quality --seeds 0 --plan    # what that would be
    python -m benchmarks.quality --phase time        # seconds of a step, on a quiet machine
    python -m benchmarks.quality --report DIR        # the tables again, from the files

Killed at any time, it loses the run it was in.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness, resume
from benchmarks.quality import times
from benchmarks.quality.report import SCOUT, read, summarise, tables
from benchmarks.quality.runs import Run, Settings, Study, check_arm
from benchmarks.settings import Command, option, several
from floe.pipeline.inputs import calm_libraries
from floe.storage import write_json

ARMS = "adapter_fisher,random,even,all,last,masks/global,probe"


def arm(text: str) -> str:
    """Kind of an arm's name."""
    try:
        return check_arm(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True)
class Options:
    """What to do in the folder."""

    output: Path = option(harness.ROOT / "runs" / "quality", "the folder", Path, metavar="DIR")
    report: Path | None = option(
        None, "print the tables of a folder; train nothing", Path, metavar="DIR"
    )
    plan: bool = option(False, "print the runs and the time they need")
    phase: str = option("train", choices=("train", "time"))
    arms: tuple[str, ...] = option(
        tuple(ARMS.split(",")), f"policies; default {ARMS}", several(arm)
    )
    draws: int = option(5, "of the arm random, in every mix and seed")
    seeds: tuple[int, ...] = option((0, 1, 2), kind=several(int))
    steps: tuple[int, ...] = option((100,), kind=several(int))
    threads: int | None = option(None, "of torch; default: torch's choice", int)
    clock: str = option("wall", "of --phase time", choices=("wall", "processor"))
    rounds: int = option(9, "of --phase time")
    device: str = "cpu"


COMMAND = Command("quality", __doc__, Settings, Options)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    settings, options = COMMAND.parse(arguments)
    if options.report:
        report(options.report)
        return
    with COMMAND.refusing():
        _, clock = harness.prepare(options, options.threads)
        study = Study(options.output, settings)
    runs = plan(options, settings)
    if options.plan:
        study.show_plan(runs)
        return
    calm_libraries()
    with study.run_folder.locked(), warnings.catch_warnings():
        if options.phase == "time":
            times.measure(study, options.rounds, options.clock, clock)
        else:
            study.train_missing(runs, study.train)
    report(study.folder)


def plan(options: Options, settings: Settings) -> list[Run]:
    """Runs in order: a table is balanced whenever they are stopped.

    Steps, then seeds, then the arms (a random one's first draw before its others), then the mixes,
    then the rates, of which all are tried on ``SCOUT`` alone.
    """
    draws = {arm: options.draws if arm == "random" else 1 for arm in options.arms}
    arms = [(arm, 0) for arm in options.arms]
    arms += [(arm, draw) for arm in options.arms for draw in range(1, draws[arm])]
    return [
        Run(mix, seed, arm, draw, steps, rate)
        for steps in options.steps
        for seed in options.seeds
        for arm, draw in arms
        for mix in settings.mixes
        for rate in (settings.rates if (seed, draw) == SCOUT else (None,))
    ]


def report(folder: Path) -> None:
    """Print the tables and write ``report.json``."""
    records = read(folder)
    rows = summarise(records)
    environments = resume.environments(records.runs)
    print(tables(rows))
    facts = {"rows": rows, "settings": records.settings, "environments": environments}
    write_json(folder / "report.json", {"format": 1, **facts})


if __name__ == "__main__":
    main()
