"""What the kill tests run in other processes."""

import dataclasses
import gc
import os
import signal
import sys
import warnings
from pathlib import Path

import torch

from floe.adapters import FloeConfig, get_model
from floe.rank_search.search import search
from floe.rank_search.space import SearchSpace
from floe.training.schedule import TrainSettings
from floe.training.train import adapter_parameters, train
from helpers.tiny import tiny_model, tiny_rows

TRAINING = TrainSettings(
    learning_rate=1e-2,
    warmup_ratio=0.0,
    grad_accum=2,
    max_steps=14,
    save_steps=1,
    validation_points=(0.0, 0.5, 1.0),
)


def note(folder):
    """A progress callback that appends one line a call."""
    path = Path(folder) / "progress"

    def progress(*values):
        with path.open("a") as file:
            file.write(f"{values[0]}\n")

    return progress


def training(folder):
    """One run with dropout and a checkpoint each step; writes its adapter and losses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = FloeConfig(r=2, num_experts=2, dropout=0.25)
        model, rows = get_model(tiny_model(), config, seed=1), tiny_rows(20)
        result = train(
            model,
            rows,
            settings=TRAINING,
            output_dir=folder + "/run",
            validation=rows[:6],
            on_progress=note(folder),
        )
    values = [p.detach() for p in adapter_parameters(model).values()]
    torch.save((values, result.train_loss, result.validation_loss), folder + "/out.tmp")
    os.replace(folder + "/out.tmp", folder + "/out.pt")
    return result


def searching(folder, sampler="tpe"):
    """A search of six points over a space of twelve; writes its trials and best adapter."""
    gc.freeze()
    rows = tiny_rows(40)
    settings = TrainSettings(
        learning_rate=2e-2, warmup_ratio=0.0, grad_accum=4, max_steps=2, save_steps=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = search(
            tiny_model(layers=1),
            rows[:32],
            rows[32:],
            directory=folder + "/search",
            space=SearchSpace(rank=(1, 4, 1), num_experts=(1, 3, 1)),
            trials=6,
            sampler=sampler,
            startup_trials=3,
            settings=settings,
            adapter={"dropout": 0.25},
            on_progress=note(folder),
        )
    values = [p.detach() for n, p in result.model.named_parameters() if "floe_" in n]
    trials = [dataclasses.replace(trial, seconds=0.0) for trial in result.trials]
    torch.save((values, [vars(t) for t in trials], result.best_trial), folder + "/out.tmp")
    os.replace(folder + "/out.tmp", folder + "/out.pt")
    return result


def opening_a_study(folder, statements):
    """Open a search's study; SIGKILL before the statement of that number that makes a table."""
    from sqlalchemy import Engine, event

    from floe.rank_search.studies import open_study

    seen = []

    @event.listens_for(Engine, "before_cursor_execute")
    def count(connection, cursor, statement, *_):
        seen.extend(["made"] * statement.lstrip().startswith("CREATE"))
        if len(seen) == statements:
            os.kill(os.getpid(), signal.SIGKILL)

    open_study(f"sqlite:///{folder}/study.db", {"space": 1}, prune=False)


def comparing(folder, options):
    """The comparison of policies with these options."""
    from benchmarks.quality import __main__ as quality

    gc.freeze()
    quality.main(options)


def replaying(folder, options):
    """The benchmark of search strategies with these options."""
    from benchmarks.search import __main__ as search

    gc.freeze()
    search.main(options)


CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.move", "shutil.rmtree"}


def running(folder, config, fatal=None):
    """A whole run up to its evaluation; SIGKILL before the ``fatal``-th change of its folder.

    The number of changes is written to ``folder/changes`` at the end.
    """
    from floe.config_file import parse_config
    from floe.pipeline.run import run

    gc.freeze()
    torch.set_num_threads(1)
    inside, done = str(Path(config["output_dir"]) / config["name"]), []

    def count(event, values):
        writes = event == "open" and isinstance(values[2], int) and values[2] & os.O_ACCMODE
        if (writes or event in CHANGES) and str(values[0]).startswith(inside):
            done.append(event)
            if len(done) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(parse_config(config), until="eval")
    (Path(folder) / "changes").write_text(str(len(done)))
