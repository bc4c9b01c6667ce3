"""Puts a run's artifacts together: report.html, every picture as PNG, its numbers as CSV."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from floe.errors import FileError
from floe.report.arms import results_section, training_section
from floe.report.audit import audit_section
from floe.report.experts import cost_section, router_section, search_section
from floe.report.run import Run, read_run
from floe.report.scores import ranking_section, scores_section
from floe.report.summary import (
    arm_rows,
    arm_table,
    certificate_rows,
    environment_rows,
    facts,
    stage_table,
    training_seeds,
    verdicts,
)
from floe.report.tables import Picture, Section, duration, or_dash, plain, significant
from floe.report.theme import DARK, LIGHT, render_both, render_svg
from floe.storage import write_bytes

_SHOWN_ROWS = 40
_SECURITY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)
# Every picture and table there can be: what an earlier report left goes, and nobody else's file.
_NAMES = (
    "arms audit_agreement audit_bootstrap audit_budgets audit_halves audit_rows audit_stability "
    "cost curves layers outcomes overlap placements rankings router saliency search stages tasks "
    "tuning units units_heads units_neurons"
)


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
    pictures = [picture for part in parts for picture in part.pictures]
    tables = [arm_table(run), stage_table(run), *(t for p in pictures for t in p.tables)]
    files = {f"{table.name}.csv": table.csv().encode("utf-8", "replace") for table in tables}
    shown: dict[str, dict[str, object]] = {}
    for number, picture in enumerate(pictures, start=1):
        drawn, files[f"{picture.key}.png"] = _show(picture)
        shown[picture.key] = drawn | {"number": number}
    page = _page(run, parts, shown)
    beside = folder / "report"
    try:
        beside.mkdir(exist_ok=True)
        for path in beside.iterdir():
            ours = path.stem in _NAMES.split() and path.suffix in (".png", ".csv")
            if ours and path.name not in files:
                path.unlink()
        for name, content in sorted(files.items()):
            write_bytes(beside / name, content)
        write_bytes(folder / "report.html", page.encode("utf-8", "replace"))
    except OSError as error:
        raise FileError(error.filename or beside, f"cannot be written: {error.strerror}") from error
    return folder / "report.html"


def sections(run: Run) -> tuple[Section, ...]:
    """The page's sections in order."""
    return (
        scores_section(run),
        ranking_section(run),
        audit_section(run),
        search_section(run),
        training_section(run),
        results_section(run),
        cost_section(run),
        router_section(run),
    )


def _show(picture: Picture) -> tuple[dict[str, object], bytes]:
    """What the template says of a picture, with its size in CSS pixels; and the PNG."""
    light, png = render_both(picture.draw, LIGHT)
    dark = render_svg(picture.draw, DARK)
    drawn: dict[str, object] = {"light": _data_uri(light), "dark": _data_uri(dark)}
    for name in ("width", "height"):
        points = re.search(rf' {name}="([\d.]+)pt"', light)
        drawn[name] = round(float(points[1]) * 96 / 72) if points else None
    return drawn, png


def _data_uri(svg: str) -> str:
    content = base64.b64encode(svg.encode("utf-8", "replace")).decode("ascii")
    return f"data:image/svg+xml;base64,{content}"


def _page(run: Run, parts: tuple[Section, ...], shown: dict[str, dict[str, object]]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("floe.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    rows = arm_rows(run) if run.training or run.evaluation else []
    return environment.get_template("template.html.j2").render(
        run=run,
        facts=facts(run),
        arms=rows,
        verdicts=verdicts(run),
        paired=any(row["gap"] for row in rows),
        seeds=training_seeds(run),
        sections=parts,
        shown=shown,
        environment=environment_rows(run),
        certificate=certificate_rows(run),
        longest=max((stage.seconds or 0.0 for stage in run.stages.values()), default=0.0),
        small=_SHOWN_ROWS,
        cell=_cell,
        took=lambda seconds: or_dash(duration, seconds),
        light=LIGHT,
        dark=DARK,
        csp=Markup(_SECURITY),
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return significant(value, 4)
    return "–" if value is None else str(value)
