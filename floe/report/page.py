"""Puts a run's artifacts together: report.html, every picture as PNG, its numbers as CSV."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from floe.errors import FileError
from floe.report import audit as auditing
from floe.report.arms import curves, outcomes, tasks
from floe.report.cost import cost
from floe.report.facts import arm_rows, arm_table, facts, training_seeds, verdicts
from floe.report.maps import adapted, saliency, units
from floe.report.placements import placements
from floe.report.provenance import certificate_rows, environment_rows, stage_table
from floe.report.ranks import rankings, tuning
from floe.report.router import router
from floe.report.run import Run, read_run
from floe.report.searching import search_history
from floe.report.tables import Picture, duration, plain, significant
from floe.report.theme import DARK, LIGHT, render_both, render_svg
from floe.storage import write_bytes

_SHOWN_ROWS = 40
# Every picture and table there can be: what an earlier report left goes, and nobody else's file.
_NAMES = frozenset({
    "arms", "audit_agreement", "audit_bootstrap", "audit_budgets", "audit_halves",
    "audit_rows", "audit_stability", "cost", "curves", "layers", "outcomes", "overlap",
    "placements", "rankings", "router", "saliency", "search", "stages", "tasks", "tuning", "units",
    "units_heads", "units_neurons",
})  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A heading with its pictures; ``missing`` says what was not run where there are none.

    ``verdicts`` are sentences, each with its kind; ``lacking`` pairs of a name and what it needs.
    """

    key: str
    title: str
    lead: str
    pictures: tuple[Picture, ...]
    missing: str = ""
    verdicts: tuple[tuple[str, str], ...] = ()
    lacking: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Shown:
    """A picture as the template sees it."""

    picture: Picture
    number: int
    light: str
    dark: str
    width: int
    height: int


def build_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and ``report/*.png, *.csv`` from a run folder's artifacts.

    Equal artifacts in a folder of equal name give equal bytes. Everything is rendered before the
    first file is written; each file is then replaced as a whole, ``report.html`` last.

    Args:
        run_dir: a run's folder. Required in it: config.yaml, env.json, score/scores.npz and
            select/selection.json. The section of any other missing artifact shrinks to one line.
    Returns:
        The path of ``report.html``, one file that needs nothing beside it.
    Raises:
        FileError: a required artifact is missing or any artifact is damaged; names its path.
    """
    folder = Path(run_dir)
    run = read_run(folder)
    parts = sections(run)
    files: dict[str, bytes] = {"arms.csv": arm_table(run).csv().encode("utf-8", "replace")}
    files["stages.csv"] = stage_table(run).csv().encode("utf-8", "replace")
    shown: dict[str, Shown] = {}
    for picture in (picture for part in parts for picture in part.pictures):
        shown[picture.key], files[f"{picture.key}.png"] = _show(picture, number=len(shown) + 1)
        for table in picture.tables:
            files[f"{table.name}.csv"] = table.csv().encode("utf-8", "replace")
    page = _page(run, parts, shown)
    beside = folder / "report"
    try:
        beside.mkdir(exist_ok=True)
        _drop_stale(beside, set(files))
        for name, content in sorted(files.items()):
            write_bytes(beside / name, content)
        write_bytes(folder / "report.html", page.encode("utf-8", "replace"))
    except OSError as error:
        raise FileError(error.filename or beside, f"cannot be written: {error.strerror}") from error
    return folder / "report.html"


def sections(run: Run) -> tuple[Section, ...]:
    """The page's sections in order."""
    return (
        _scores(run),
        _ranking(run),
        _audit(run),
        _search(run),
        _training(run),
        _evaluation(run),
        _cost(run),
        _router(run),
    )


def _scores(run: Run) -> Section:
    lead = (
        "Scores measured on the calibration rows, before the final training: what the selection "
        "saw. Filled dots mark the layers that were adapted, open diamonds the ones the FLoE "
        "paper's masks would adapt."
    )
    return Section("scores", "Scores", lead, (saliency(run), units(run)))


def _ranking(run: Run) -> Section:
    lead = (
        "Two rules for the same question. In floe's own experiments with a small model, layers "
        "chosen by adapter Fisher ended ahead of random ones on one data set and level with them "
        "on two; the paper's masks were no better than random layers."
    )
    pictures: tuple[Picture, ...] = (tuning(run),) if run.choice.tuning else ()
    absent = []
    if run.is_paper:
        absent.append(
            "The chosen policy is the paper's masks: there is no second ranking to compare."
        )
    else:
        pictures = (rankings(run), *pictures)
    if not run.choice.tuning:
        why = f" ({run.choice.untuned})" if run.choice.untuned else ""
        absent.append(f"Mask tuning was not run{why}: the paper's masks are scored as binary ones.")
    return Section("ranking", "Ranking", lead, pictures, " ".join(absent))


def _audit(run: Run) -> Section:
    if run.audit is None:
        return Section("audit", "Audit", "", (), "The choice was not audited: floe audit CONFIG.")
    if run.audit.selection != run.selection:
        old = "The audit is of an earlier selection; make a new one: floe audit CONFIG."
        return Section("audit", "Audit", "", (), old)
    lead = (
        "What the choice rests on: whether other rules agree, whether other rows or budgets would "
        "have given the same layers."
    )
    verdicts = tuple(run.audit.sentences)
    absent = (run.audit.lacking, run.audit.not_resampled)
    lacking = tuple(pair for needs in absent for pair in sorted(needs.items()))
    return Section("audit", "Audit", lead, auditing.pictures(run.audit), "", verdicts, lacking)


def _search(run: Run) -> Section:
    if run.search is None or not run.search.trials:
        return Section(
            "search",
            "Search",
            "",
            (),
            "The search was not run: rank and experts come from the settings.",
        )
    lead = (
        "Rank and number of experts, tried with adapters on every layer; the best trial is the "
        "model that is scored."
    )
    return Section("search", "Search", lead, (search_history(run, run.search),))


def _training(run: Run) -> Section:
    if not run.training:
        return Section("training", "Training", "", (), "No training was run.")
    placed = placements(run)
    lead = (
        "Every arm starts from the same base model with fresh adapters; arms differ in which "
        "layers carry them."
    )
    alone = (
        "No baseline was trained: nothing here says whether other layers would have done as well."
    )
    return Section(
        "training",
        "Training",
        lead,
        (adapted(run), *((placed,) if placed else ()), curves(run)),
        alone if set(run.training) == {"main"} else "",
    )


def _evaluation(run: Run) -> Section:
    if run.evaluation is None:
        return Section("results", "Results", "", (), "The evaluation was not run.")
    by_task = tasks(run, run.evaluation)
    pictures = (outcomes(run, run.evaluation), *((by_task,) if by_task else ()))
    lead = "Held-out rows, each arm with its 95 % interval."
    return Section("results", "Results", lead, pictures)


def _cost(run: Run) -> Section:
    picture = cost(run)
    if picture is None:
        return Section("cost", "Cost", "", (), "Neither the cost profile nor any training was run.")
    missing = (
        ""
        if run.profile
        else "The cost profile was not run: the marks are the arms' own training runs."
    )
    return Section("cost", "Cost", "Time and memory of a training step.", (picture,), missing)


def _router(run: Run) -> Section:
    picture = router(run)
    if picture is None:
        return Section("router", "Routers", "", (), "Router statistics were not collected.")
    return Section(
        "router", "Routers", "Do the experts share the work, and does the token matter?", (picture,)
    )


def _show(picture: Picture, number: int) -> tuple[Shown, bytes]:
    light, png = render_both(picture.draw, LIGHT)
    dark = render_svg(picture.draw, DARK)
    width, height = _pixels(light)
    return Shown(picture, number, _data_uri(light), _data_uri(dark), width, height), png


def _pixels(svg: str) -> tuple[int, int]:
    """Width and height in CSS pixels from the root's points."""
    head = svg[: svg.index(">")]
    sizes = (float(head.split(f' {name}="')[1].split("pt")[0]) for name in ("width", "height"))
    width, height = (round(points * 96 / 72) for points in sizes)
    return width, height


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8", "replace")).decode(
        "ascii"
    )


def _page(run: Run, parts: tuple[Section, ...], shown: dict[str, Shown]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("floe.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., object]] = {
        "duration": duration,
        "significant": significant,
        "plain": plain,
    }
    environment.filters.update(filters)
    rows = arm_rows(run) if run.training or run.evaluation else []
    return environment.get_template("template.html.j2").render(
        run=run,
        facts=facts(run),
        arms=rows,
        verdicts=verdicts(run),
        paired=any(row.gap for row in rows),
        seeds=training_seeds(run),
        sections=parts,
        shown=shown,
        environment=environment_rows(run),
        certificate=certificate_rows(run),
        longest=max((stage.seconds or 0.0 for stage in run.stages.values()), default=0.0),
        is_small=lambda table: len(table.rows) <= _SHOWN_ROWS,
        cell=_cell,
        light=LIGHT,
        dark=DARK,
        csp=Markup(
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
            "form-action 'none'"
        ),
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return significant(value, 4)
    return "–" if value is None else str(value)


def _drop_stale(folder: Path, keep: set[str]) -> None:
    """Remove an earlier report's pictures and tables that this one no longer has."""
    for path in folder.iterdir():
        own = path.stem in _NAMES and path.suffix in (".png", ".csv")
        if own and path.name not in keep:
            path.unlink()
