"""Write the tables of docs/POLICIES.md: ``python -m floe.selection.policies docs/POLICIES.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from floe.selection.policies import POLICIES
from floe.selection.policies.registry import known_statistics


def with_tables(text: str) -> str:
    """The document with what stands between ``<!-- NAME -->`` and ``<!-- end -->`` made anew."""
    baselines, scores, statistics = [], [], []
    for name, p in POLICIES.items():
        about, measured = (f"`{name}`", p.source, p.score, p.assumed), p.measured or "no"
        if p.measure is not None:
            statistics.append((*about, p.cost, measured))
        elif p.reads:
            scores.append((*about, measured))
        else:
            baselines.append((f"`{name}`", p.score, measured))
    columns = ("policy", "source", "score, highest first", "assumed")
    tables = {
        "baselines": _table(("policy", "score, highest first", "measured"), baselines),
        "scores": _table((*columns, "measured"), scores),
        "statistics": _table((*columns, "needs", "measured"), statistics),
        "values": _table(
            ("statistic", "range", "what"),
            [(f"`{name}` [{s.shape}]", s.rule, s.about) for name, s in known_statistics().items()],
        ),
    }
    for name, table in tables.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}<!-- {name} -->\n{table}{end}{after}"
    return text


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    escaped = [[cell.replace("|", r"\|").replace(r"\\|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in escaped)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {(__doc__ or '').split('``')[1]}")
    file = Path(sys.argv[1])
    file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
