"""The tables of results in README.md and docs/METHOD.md, from the rows in ``benchmarks/results``.

``make tables`` writes them into the documents, each between ``<!-- rows: NAME -->`` and
``<!-- end -->``. A file of rows also says what was measured, by which command, where and when. Its
rows are those that the command records, of which only the printed digits may be left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "METHOD.md")
MARKED = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Row = dict[str, Any]


def main() -> None:
    """Write every table of every document."""
    for document in DOCUMENTS:
        document.write_text(written(document.read_text(encoding="utf-8")), encoding="utf-8")


def written(text: str) -> str:
    """A document with the tables that its markers name."""
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", text)


def table(name: str) -> str:
    """The lines of one table."""
    rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    header, alignment, lines = TABLES[name]
    cells = [header.split(" | "), *lines(rows)]
    text = [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in cells]
    return "".join(f"{line}\n" for line in (text[0], alignment, *text[1:]))


def _demo(rows: list[Row]) -> Iterator[list[str]]:
    """One arm a line."""
    for row in rows:
        name = f"**{row['arm']}**" if row["arm"] == "main" else row["arm"]
        chosen = ", ".join(f"`{row[key]}`" for key in ("policy", "preset") if key in row)
        seconds, memory = row["seconds_per_step"], row["peak_gib"]
        yield [
            f"{name} ({chosen})" if chosen else name,
            str(row["layers"]),
            _interval(row["loss"], ".3f"),
            _interval(row["minus_main"], "+.3f").replace("-", "−"),
            _interval(row["accuracy"], ".1f", " %"),
            f"{row['trainable']:,}",
            "–" if seconds is None else f"{seconds:.2f}",
            "–" if memory is None else f"{memory:.2f} GiB",
        ]


def _adapted_layer(rows: list[Row]) -> Iterator[list[str]]:
    """One implementation a line: forward, then forward and backward, by dropout."""
    named = {
        ("floe", 4): "floe, 4 experts",
        ("floe", 10): "floe, 10 experts",
        ("peft r=8", 4): "PEFT LoRA, r = 8",
        ("peft r=80", 10): "PEFT LoRA, r = 80, the parameters of 10 experts",
    }
    for (implementation, experts), name in named.items():
        cases = [
            {"implementation": implementation, "experts": experts, "dropout": p, "what": what}
            for p in (0.0, 0.05)
            for what in ("forward", "forward+backward")
        ]
        yield [name, *(_ratio(rows, case) for case in cases)]


def _training_step(rows: list[Row]) -> Iterator[list[str]]:
    """One model a line."""
    named = {"smollm2": "SmolLM2-135M", "llama-2048": "random Llama blocks, d = 2048"}
    for model, name in named.items():
        rounds = next(row["ratio"]["n"] for row in rows if row["case"]["model"] == model)
        ways = ("floe", "peft r=8", "hydra")
        yield [
            f"{name}, {rounds} rounds",
            *(_ratio(rows, {"model": model, "way": way}) for way in ways),
        ]


def _policies(rows: list[Row]) -> Iterator[list[str]]:
    """One arm and number of steps a line, both mixes in it."""
    named = {
        "random": "`random`, {pairs} draws",
        "even": "`even`",
        "probe": "`probe`",
        "masks/global": "`masks`, the paper's, preset `global`",
        "gate_fisher": "layers coupled by gates, since deleted",
        "forward_selection": "`forward_selection` (16 rows)",
        "adapter_fisher@modules": "its parameters on single projections (`choose: modules`)",
        "adapter_fisher@sizes": "its parameters on ranks (`choose: sizes`, r0 = 16 declared)",
    }
    known = {(row["arm"], row["steps"], row["mix"]): row for row in rows}
    for arm, name in named.items():
        for steps in sorted({row["steps"] for row in rows if row["arm"] == arm}):
            mixes = [known[arm, steps, mix] for mix in ("commonsense", "knowledge")]
            gaps = [
                mix[f"default_minus_this{when}"]
                for when in ("", "_at_equal_seconds")
                for mix in mixes
            ]
            yield [name.format(**gaps[0]), str(steps), *map(_gap, gaps)]


def _interval(value: Row | None, form: str, unit: str = "") -> str:
    if value is None:
        return ""
    low, high = (format(value[key], form) for key in ("low", "high"))
    return f"{value['value']:{form}}{unit} [{low}, {high}]"


def _gap(gap: Row) -> str:
    """Bold where 0 is outside."""
    text, outside = _interval(gap, "+.3f"), gap["low"] > 0 or gap["high"] < 0
    return f"{f'**{text}**' if outside else text}, {gap['lower']} of {gap['pairs']}"


def _ratio(rows: list[Row], case: Row) -> str:
    (row,) = (row for row in rows if case.items() <= row["case"].items())
    return f"{row['ratio']['median']:.2f}"


# of each: header, alignment, and what makes the lines' cells
TABLES: dict[str, tuple[str, str, Callable[[list[Row]], Iterator[list[str]]]]] = {
    "demo": (
        "arm | layers | loss, nats per token [95 %] | minus main, paired [95 %] | accuracy [95 %] "
        "| trainable | s/step | peak memory",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        _demo,
    ),
    "adapted_layer": (
        " | forward | forward + backward | forward, dropout 0.05 "
        "| forward + backward, dropout 0.05",
        "|---|--:|--:|--:|--:|",
        _adapted_layer,
    ),
    "training_step": (
        "x frozen model | floe, 4 experts | PEFT LoRA, r = 8 | HydraLoRA's loop, 4 experts",
        "|---|--:|--:|--:|",
        _training_step,
    ),
    "policies": (
        "against the default (minus: the default is better) | steps | commonsense | knowledge "
        "| commonsense, equal seconds | knowledge, equal seconds",
        "|---|---|---|---|---|---|",
        _policies,
    ),
}


if __name__ == "__main__":
    main()
