"""How many trials does a search need? The strategies on a surface that was trained at every point.

First an adapter is trained at every rank and number of experts of a space, by floe's own training
on real rows, and its validation loss kept: the surface. Then each strategy of `floe search` looks
losses up in it, as often as asked, and its trials are counted until it has found a good point
(`benchmarks.search.replay` says what is good). Nothing is trained in that second phase.

    python -m benchmarks.search                    # train what is missing, then replay
    python -m benchmarks.search --plan             # what that would be
    python -m benchmarks.search --report DIR       # the tables again, from the files

Killed at any time, it loses the point it was in. A space smaller than the paper's is called
reduced.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import harness, paper, plot
from benchmarks.search.replay import Surface, read
from benchmarks.search.report import collect, tables
from benchmarks.search.surface import Settings, Study, plan
from benchmarks.settings import Command, count, option, several
from floe.pipeline.inputs import calm_libraries
from floe.rank_search.studies import quiet_optuna


@dataclass(frozen=True)
class Options:
    """What to do in the folder."""

    output: Path = option(harness.ROOT / "runs" / "search", "the folder", Path, metavar="DIR")
    report: Path | None = option(
        None, "replay a folder's surface; train nothing", Path, metavar="DIR"
    )
    plan: bool = option(False, "print the points and the time they need")
    seeds: tuple[int, ...] = option((0,), "of training; each is a whole surface", several(int))
    repeats: int = option(200, "of each strategy", count)
    startup_trials: int = option(10, "random ones before TPE", count)
    threads: int | None = option(None, "of torch on the CPU; default: torch's choice", count)
    json: Path | None = option(None, kind=Path, metavar="FILE")
    plot: Path | None = option(None, "draw the JSON file (needs --json)", Path, metavar="FILE")

    def __post_init__(self) -> None:
        if self.plot and not self.json:
            raise ValueError("--plot draws from the JSON file, so it needs --json FILE too")


COMMAND = Command("search", __doc__, Settings, Options)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    settings, options = COMMAND.parse(arguments)
    if options.report:
        with COMMAND.refusing():
            surfaces = read(options.report)
        report(options.report, surfaces, options)
        return
    with COMMAND.refusing():
        _, clock = harness.prepare(settings, options.threads)
        study = Study(options.output, settings)
        runs = plan(settings, options.seeds)
        if options.plan:
            study.show_plan(runs)
            return
        calm_libraries()
        with study.run_folder.locked():
            study.prepare()
    with study.run_folder.locked(), warnings.catch_warnings():
        study.train_missing(runs, partial(study.train, clock=clock))
    report(study.folder, read(study.folder), options)


def report(folder: Path, surfaces: list[Surface], options: Options) -> None:
    """Replay a folder's surfaces; print the tables, write the records and the plot."""
    with quiet_optuna():
        records = collect(folder, surfaces, options.repeats, options.startup_trials)
    print(f"{tables(records)}\n\n{paper.table_8()}")
    harness.save(options.json, paper={"note": paper.NOTE_8, "table_8": paper.TABLE_8}, **records)
    if options.plot:
        plot.draw(options.json, options.plot)


if __name__ == "__main__":
    main()
