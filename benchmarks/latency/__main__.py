"""The command ``python -m benchmarks.latency``: every table asked for, printed and recorded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from benchmarks import harness, implementations, kernels, models, paper, plot
from benchmarks.harness import Bench, Column, Row
from benchmarks.latency import inference, training
from benchmarks.latency.block_check import WHAT_IS_CHECKED
from benchmarks.latency.options import Options, parse
from floe.pipeline.inputs import calm_libraries

Records = dict[str, list[Row]]


def main(arguments: list[str] | None = None) -> None:
    """Print the tables asked for; write the records and the plot where the options say."""
    options = parse(arguments)
    calm_libraries()
    bench = Bench.begin(options)
    print(f"scale: {options.scale}. {WHAT_IS_CHECKED}")
    records: Records = {"rows": [], "fits": [], "gains": []}
    for table in ("4", "5", "op") if options.table == "all" else (options.table,):
        _measure(bench, options, records, table)
    spent = None
    if options.with_search:
        spent = training.preparation(options.with_search)
        print(_spent(spent))
    if options.json:
        more = {"scale": options.scale, "preparation": spent, "paper": paper.records()}
        harness.save(options.json, **records, **more)
    if options.plot:
        plot.draw(options.json, options.plot)


def _measure(bench: Bench, options: Options, records: Records, table: str) -> None:
    """One model at a time: the next is loaded when the last is done with."""
    if table == "op":
        records["rows"] += _one_linear(bench, options)
        return
    measure, more, columns, more_columns = {
        "4": (inference.measure, "fits", _inference, FITS),
        "5": (training.measure, "gains", _training, GAINS),
    }[table]
    how = {"attention": options.attention, "inputs": options.inputs}
    for name in options.models:
        dtype = getattr(torch, options.dtype)
        subject = models.load(name, device=bench.device, dtype=dtype, **how)
        for adapter in options.adapters((0.0,) if table == "4" else options.dropout):
            rows, others = measure(bench, subject, adapter, options)
            for row in rows + others:
                row["case"]["table"] = table
            records["rows"] += rows
            records[more] += others
            for case in plot.by_case(rows):
                lines = [row for row in others if plot.case_of(row) == plot.case_of(case[0])]
                print(f"\n{harness.title(case[0]['case'], *plot.OWN)}")
                print(harness.show(case, columns(case)))
                if lines:
                    print(f"\n{harness.show(lines, more_columns)}", flush=True)
    print(f"\n{paper.table_4() if table == '4' else paper.table_5()}")


def _one_linear(bench: Bench, options: Options) -> list[Row]:
    """Forward, then forward and backward, of every shape K x N x T, as `benchmarks.kernels`."""
    rows = []
    dtype = getattr(torch, options.dtype)
    for adapter, sizes in itertools.product(options.adapters(options.dropout), options.shapes):
        problem = implementations.Problem.draw(sizes, adapter, dtype, bench.device)
        builders = implementations.registry(problem, options.compile)
        frozen = {"frozen": builders.pop("frozen")}
        case = {**options.case(), **kernels.layer_case(sizes, adapter), "table": "op"}
        case |= {"adapter_dtype": options.adapter_dtype, "scale": options.scale}
        rows += kernels.measure(bench, case, problem, frozen | options.chosen(builders), cold=True)
    return rows


TIMES: list[Column] = [
    ("", "case.implementation:"),
    *harness.spread("ms median", "milliseconds", ".2f"),
    ("x frozen", "ratio.median:.3f"),
    ("p20..p80", lambda row: f"{row['ratio']['p20']:.2f}..{row['ratio']['p80']:.2f}"),
]
FITS: list[Column] = [
    ("fit over the adapted layers", "case.way:"),
    *harness.spread("ms a layer", "milliseconds_per_layer", ".3f"),
]
GAINS: list[Column] = [
    ("selected layers over all layers", "case.way:"),
    *harness.spread("ratio", "selected_over_full", ".3f"),
    ("ms saved a step", "milliseconds_saved:.2f"),
]


def _inference(rows: Sequence[Row]) -> list[Column]:
    return [*TIMES, *_beside(rows), ("peak MiB", harness.mib("peak_bytes")), *_rest(rows)]


def _training(rows: Sequence[Row]) -> list[Column]:
    return [
        *TIMES,
        *_beside(rows),
        *((phase, f"phases_ms.{phase}.median:.2f") for phase in training.PHASES),
        ("tokens/s", "tokens_per_second.median:.0f"),
        ("saved MiB", harness.mib("saved_bytes", ".1f")),
        ("peak MiB", harness.mib("peak_bytes")),
        *_rest(rows),
    ]


def _beside(rows: Sequence[Row]) -> list[Column]:
    """Median ratios to PEFT's LoRA of the same rank and to the loop, on the same layers."""
    peft = f"peft r={rows[0]['case']['rank']}"
    return [(f"x {n.split()[0]}", f"ratio_to_way.{n}.median:.3f") for n in (peft, "hydra")]


def _rest(rows: Sequence[Row]) -> list[Column]:
    kinds = {row["launches_kind"] for row in rows if row["launches"] is not None}
    launches = "kernels" if any("CUDA" in kind for kind in kinds) else "aten ops"
    return [(launches, "launches:"), ("worst error", "relative_error:.1e")]


def _spent(spent: Row) -> str:
    """What `training.preparation` read, as a table."""
    lines = [(stage, f"{seconds:.1f}") for stage, seconds in spent["seconds"].items()]
    lines.append(("before the final training", f"{spent['before_training']:.1f}"))
    kind = f"search of {spent['trials']} trials" if spent["trials"] else "one warm-up, no search"
    header = (f"run {spent['run']!r} ({kind})", "seconds")
    return f"\n{harness.table(header, lines)}\n(measured by that run, on its own machine)"


if __name__ == "__main__":
    main()
