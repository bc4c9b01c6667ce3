"""The command line: ``floe run CONFIG.yaml``, and one command a stage.

The only module that prints.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from floe.machine import share_cores

if TYPE_CHECKING:
    from floe.config import RunConfig
    from floe.progress import Progress

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune large language models with routed low-rank experts on the layers that matter.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 bad data or file, 4 out of memory, "
    "130 interrupted. With FLOE_TRACEBACK=1 every error shows its traceback.",
)

FAILED, USAGE, BAD_INPUT, OUT_OF_MEMORY, INTERRUPTED = 1, 2, 3, 4, 130
# What the errors of libraries that write files say when the disk is full.
_DISK = ("No space left on device", "PytorchStreamWriter failed", "(os error ")

Config = Annotated[Path, typer.Argument(help="YAML file of the run; `floe init` writes one.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Change a setting: a.b=value.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, the rest on stderr.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check all that the run will read; write nothing.")
]
Redo = Annotated[
    bool, typer.Option("--redo", help="Make stages of other settings again, in their place.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def main() -> None:
    """Entry point of ``floe``: turns errors into one line and an exit code."""
    _open_streams()
    share_cores()
    with _exit_codes():
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer's way of saying it was
            raise KeyboardInterrupt
        sys.stdout.flush()  # here a full disk or a closed pipe can still be told
        sys.exit(code if isinstance(code, int) else 0)


def _open_streams() -> None:
    """Streams that can be written to: text of any kind on any terminal, and closed ones."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted; the same command continues where this one stopped")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader has what it wanted
        sys.exit(FAILED)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of typer's click
            from floe.errors import hide_secrets

            usage: Any = error
            usage.message = hide_secrets(str(usage.message))  # it repeats arguments
            usage.show()
            sys.exit(USAGE)
        code = _code_of(error)
        if code is None or os.environ.get("FLOE_TRACEBACK"):
            _say("".join(traceback.format_exception(error)).rstrip())
        _say(f"floe: {_words(error, code)}")
        sys.exit(FAILED if code is None else code)
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):  # told already; the interpreter must not tell it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _code_of(error: Exception) -> int | None:
    """Exit code of an error a user can act on.

    None for a fault of floe itself, which keeps its traceback.
    """
    from floe.errors import CheckError, DataError, FileError

    if isinstance(error, CheckError):
        return _code_of(error.problems[0])
    text, told = str(error), _is_told(error)
    rules: list[tuple[bool, int]] = [
        (isinstance(error, (FileError, DataError)), BAD_INPUT),
        (isinstance(error, MemoryError), OUT_OF_MEMORY),
        (type(error).__name__ == "OutOfMemoryError", OUT_OF_MEMORY),  # torch's, on GPUs
        (isinstance(error, RuntimeError) and "can't allocate memory" in text, OUT_OF_MEMORY),
        (isinstance(error, ValueError), USAGE),
        (isinstance(error, (FloatingPointError, OSError, ImportError)), FAILED),
        (any(sign in text for sign in _DISK), FAILED),
        (isinstance(error, TypeError) and told, USAGE),
        (isinstance(error, RuntimeError) and told, FAILED),
    ]
    return next((code for holds, code in rules if holds), None)


def _is_told(error: Exception) -> bool:
    """Whether floe's own code raised this, and so says in it what is wrong."""
    last = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return str(last.f_globals.get("__name__")).partition(".")[0] in ("floe", "floe_triton")


def _words(error: Exception, code: int | None) -> str:
    """The last line of a failed command: what, where, what to do."""
    from floe.errors import one_line

    name = type(error).__name__
    if code is None:
        return one_line(f"{name}: {error}. This is a fault of floe: please report the lines above")
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        again = "; the same command continues" if error.errno == errno.ENOSPC else ""
        return one_line(f"{place}{error.strerror}{again}")
    if _is_told(error):
        return str(error)
    return one_line(f"{name}: {error}" if str(error) else name)


def _say(text: str) -> None:
    from floe.errors import hide_secrets

    print(hide_secrets(text), file=sys.stderr, flush=True)


@contextmanager
def _work(
    config: Path, override: list[str] | None, quiet: bool
) -> Iterator[tuple[RunConfig, Progress]]:
    """The settings of a run, and its progress on the terminal while it lasts."""
    from floe.config_file import load_config
    from floe.pipeline.inputs import calm_libraries
    from floe.progress import open_progress

    settings = load_config(config, override)
    calm_libraries()
    with open_progress(quiet) as progress:
        yield settings, progress


def _run_until(last: str) -> Callable[..., None]:
    def command(
        config: Config,
        override: Overrides = None,
        as_json: AsJson = False,
        quiet: Quiet = False,
        dry_run: DryRun = False,
        redo: Redo = False,
    ) -> None:
        helper = os.environ.get("RANK", "0") != "0"  # torchrun's first worker speaks for all
        with _work(config, override, quiet or helper) as (settings, progress):
            from floe.artifacts.schema import document
            from floe.pipeline.run import run

            result = run(settings, until=last, progress=progress, dry_run=dry_run, redo=redo)
        if helper:
            return
        if dry_run and result.account is not None:
            account = result.account
            print(json.dumps(document(account), sort_keys=True) if as_json else account.text())
            if account.refused:
                raise typer.Exit(BAD_INPUT)
        elif as_json:
            print(json.dumps(result.summary(), sort_keys=True))
        else:
            print(*filter(None, (result.table(), result.outcome())), sep="\n")

    return command


for _name, _help in {
    "search": "Find rank and number of experts; the best trial is the warm-up model.",
    "score": "Fisher information and Taylor cost of every head and neuron.",
    "select": "Choose the layers that get adapters.",
    "train": "Train the chosen layers, and the baselines.",
    "eval": "Loss and accuracy with intervals, on rows nothing was trained on.",
    "report": "The report: one HTML file, pictures and tables beside it.",
    "run": "Everything; stages whose inputs are unchanged are skipped.",
}.items():
    _until = "report" if _name == "run" else _name
    _suffix = "" if _name in ("run", "search") else " Runs the missing stages before it."
    app.command(_name, help=_help + _suffix)(_run_until(_until))


@app.command("audit")
def audit_command(
    config: Config,
    statistics: Annotated[
        str, typer.Option(help="Also measure: cheap, all, none, or policies joined by commas.")
    ] = "cheap",
    rows: Annotated[int, typer.Option(help="Calibration rows to measure them on.")] = 32,
    bootstrap: Annotated[int, typer.Option(help="Draws of the bootstrap over rows.")] = 200,
    override: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """What the chosen layers rest on: policies, rows, budgets. Needs a finished select stage."""
    with _work(config, override, quiet) as (settings, progress):
        from floe.pipeline.audit import audit_run

        result = audit_run(
            settings, statistics=statistics, rows=rows, bootstrap=bootstrap, progress=progress
        )
    print(json.dumps(result.audit.document(), sort_keys=True) if as_json else result.text())


@app.command()
def doctor(
    selftest: Annotated[
        bool, typer.Option(help="Check every op on this machine against float64.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What this machine can do, which path each op takes, and why."""
    from floe.doctor import describe, diagnose

    facts, failed = diagnose(), []
    if selftest:
        from floe import selfcheck

        _say("checking every op against float64 ...")
        results = selfcheck.selftest()
        facts["selftest"] = [result.as_dict() for result in results]
        failed = [result for result in results if not result.passed]
    print(json.dumps(facts, sort_keys=True) if as_json else describe(facts))
    for result in failed:
        _say(f"FAILED {result}")
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def export(
    config: Config,
    output: Annotated[Path, typer.Argument(help="New folder for the LoRA.")],
    rows: Annotated[int, typer.Option(help="Training rows to average the router over.")] = 64,
    override: Overrides = None,
) -> None:
    """Write the run's adapter as one plain LoRA for other servers, with its measured error."""
    from floe.config_file import load_config
    from floe.pipeline.run import export_run

    report = export_run(load_config(config, override), output, rows)
    print(
        f"{report.path}: plain LoRA; worst module is off by {report.worst:.1%} "
        "of the adapter's effect"
    )


@app.command("import-hydralora")
def import_hydralora_command(
    source: Annotated[Path, typer.Argument(help="Folder that HydraLoRA's code saved.")],
    output: Annotated[Path, typer.Argument(help="New folder for the floe adapter.")],
    base: Annotated[
        str | None, typer.Option(help="Base model; default: the one the source names.")
    ] = None,
) -> None:
    """Turn an adapter of HydraLoRA's own code into a floe adapter. Reads no base weights."""
    from floe.adapters.conversion import import_hydralora, named_base
    from floe.pipeline.inputs import calm_libraries, structure

    calm_libraries()
    config = import_hydralora(source, output, structure(base or named_base(source)))
    print(
        f"{output}: {len(config.layers or [])} layers, rank {config.r}, "
        f"{config.num_experts} experts"
    )


@app.command()
def schema() -> None:
    """JSON schema of the configuration, for editors."""
    from floe.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=1, sort_keys=True))


@app.command()
def init(path: Annotated[Path, typer.Argument(help="File to write.")] = Path("floe.yaml")) -> None:
    """Write a commented configuration to start from."""
    from floe.config_file import TEMPLATE
    from floe.errors import FileError

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE.read_text(encoding="utf-8"))
    except FileExistsError:
        raise FileError(path, "exists; not overwritten") from None
    except (OSError, ValueError) as error:
        raise FileError(path, f"cannot be written: {error}") from error
    print(f"{path} written; edit model and data, then: floe run {path}")


if __name__ == "__main__":
    main()
