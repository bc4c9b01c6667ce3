"""The paper's latency tables: inference (4), training (5), and one linear (op).

Every peer runs in this one process, in turn, in a new order every round, after whole blocks of it
were compared with float64. ``--device cpu`` measures at a reduced scale and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import harness, inference, models, op, paper, plot, training
from benchmarks.cases import Bench, Row
from benchmarks.gates import WHAT_IS_GATED
from benchmarks.options import Options, parse
from floe.pipeline.inputs import calm_libraries

MIB = 1 << 20


def main(arguments: list[str] | None = None) -> None:
    """Print the tables asked for; write the records and the plot where the options say."""
    options = parse(arguments, __doc__)
    calm_libraries()
    environment = harness.machine(options.device)
    bench = Bench(options.device, options.clock, environment, options.rounds)
    print(f"{harness.describe(environment)}\nscale: {options.scale}. {WHAT_IS_GATED}")
    records: dict[str, list[Row]] = {"rows": [], "fits": [], "gains": []}
    wanted = ("4", "5", "op") if options.table == "all" else (options.table,)
    for name in wanted:
        _TABLES[name](bench, options, records)
    spent = None
    if options.with_search:
        spent = training.preparation(options.with_search)
        print(_spent(spent))
    if options.json:
        harness.save(
            options.json, scale=options.scale, preparation=spent, paper=paper.records(), **records
        )
    if options.plot:
        plot.draw(options.json or "", options.plot)


def _table_4(bench: Bench, options: Options, records: dict[str, list[Row]]) -> None:
    for subject in _subjects(options):
        for setting in options.settings((0.0,)):
            rows, fits = inference.measure(bench, subject, setting, options)
            records["rows"] += _stamp(rows, "4")
            records["fits"] += _stamp(fits, "4")
            for here in _cases(rows):
                lines = [r for r in fits if _key(r) == _key(here[0])]
                print(f"\n{_title(here[0])}\n{_inference(here, lines)}", flush=True)
    print(f"\n{paper.table_4()}")


def _table_5(bench: Bench, options: Options, records: dict[str, list[Row]]) -> None:
    for subject in _subjects(options):
        for setting in options.settings(options.dropouts):
            rows, gains = training.measure(bench, subject, setting, options)
            records["rows"] += _stamp(rows, "5")
            records["gains"] += _stamp(gains, "5")
            for here in _cases(rows):
                lines = [r for r in gains if _key(r) == _key(here[0])]
                print(f"\n{_title(here[0])}\n{_training(here, lines)}", flush=True)
    print(f"\n{paper.table_5()}")


def _table_op(bench: Bench, options: Options, records: dict[str, list[Row]]) -> None:
    for setting in options.settings(options.dropouts):
        rows = _stamp(op.measure(bench, setting, options), "op")
        records["rows"] += rows
        for here in _cases(rows):
            print(f"\n{_title(here[0])}\n{_op(here)}", flush=True)


_TABLES: dict[str, Callable[[Bench, Options, dict[str, list[Row]]], None]] = {
    "4": _table_4, "5": _table_5, "op": _table_op,
}  # fmt: skip


def _subjects(options: Options) -> Any:
    """One model at a time: the next is loaded when the last is done with."""
    for name in options.models:
        yield models.load(
            name, device=options.device, dtype=options.torch_dtype, attention=options.attention,
            inputs=options.inputs,
        )  # fmt: skip


def _stamp(rows: list[Row], table: str) -> list[Row]:
    for row in rows:
        row["case"]["table"] = table
    return rows


_OWN = ("implementation", "way", "layers", "adapted")  # of a row; the rest is its case's


def _key(row: Row) -> tuple[tuple[str, str], ...]:
    return tuple((k, str(v)) for k, v in sorted(row["case"].items()) if k not in _OWN)


def _cases(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one case together, in order."""
    found: dict[object, list[Row]] = {}
    for row in rows:
        found.setdefault(_key(row), []).append(row)
    return list(found.values())


def _title(row: Row) -> str:
    case = row["case"]
    size = f"T={case['tokens']}"
    if case["model"] is None:
        size = f"{case['columns']} -> {case['features']}, {size}"
    else:
        size = f"{case['model']}, batch {case['batch']}, {size}"
    extra = f", after {case['cache']} cached" if "cache" in case else ""
    extra += ", gradient checkpointing" if case.get("gradient_checkpointing") else ""
    return (
        f"Table {case['table']}, {case['what']}: {size}{extra}, r={case['rank']}, "
        f"M={case['experts']}, dropout {case['dropout']}, {case['dtype']}, adapter "
        f"{case['adapter_dtype']}, {case['device']}, {case['clock']} time, scale: {case['scale']}"
    )


def _inference(rows: Sequence[Row], fits: Sequence[Row]) -> str:
    header = ("", *_TIME, "peak MiB", _launches(rows), "worst error")
    lines = [
        (*_times(row), *_beside(row, rows), f"{row['peak_bytes'] / MIB:.0f}", _count(row),
         f"{row['relative_error']:.1e}")
        for row in rows
    ]  # fmt: skip
    slopes = [
        (fit["case"]["way"], *(f"{fit['milliseconds_per_layer'][k]:.3f}" for k in _SPREAD))
        for fit in fits
    ]
    fitted = harness.table(("fit over the adapted layers", "ms a layer", "p20", "p80"), slopes)
    return f"{harness.table(header, lines)}\n\n{fitted}"


def _training(rows: Sequence[Row], gains: Sequence[Row]) -> str:
    header = ("", *_TIME, *training.PHASES, "tokens/s", "saved MiB", "peak MiB", _launches(rows),
              "worst error")  # fmt: skip
    lines = [
        (*_times(row), *_beside(row, rows),
         *(f"{row['phases_ms'][phase]['median']:.2f}" for phase in training.PHASES),
         f"{row['tokens_per_second']['median']:.0f}", f"{row['saved_bytes'] / MIB:.1f}",
         f"{row['peak_bytes'] / MIB:.0f}", _count(row), f"{row['relative_error']:.1e}")
        for row in rows
    ]  # fmt: skip
    fewer = [
        (gain["case"]["way"], *(f"{gain['selected_over_full'][k]:.3f}" for k in _SPREAD),
         f"{gain['milliseconds_saved']:.2f}")
        for gain in gains
    ]  # fmt: skip
    names = ("selected layers over all layers", "ratio", "p20", "p80", "ms saved a step")
    if not gains:
        return harness.table(header, lines)
    return f"{harness.table(header, lines)}\n\n{harness.table(names, fewer)}"


def _op(rows: Sequence[Row]) -> str:
    header = ("", *_TIME[:5], "saved MiB", "peak MiB", _launches(rows), "worst error")
    lines = [
        (*_times(row), f"{row['saved_bytes'] / MIB:.2f}" if "saved_bytes" in row else "-",
         f"{row['peak_bytes'] / MIB:.1f}", _count(row), f"{row['relative_error']:.1e}")
        for row in rows
    ]  # fmt: skip
    return harness.table(header, lines)


_SPREAD = ("median", "p20", "p80")
_TIME = ("ms median", "p20", "p80", "x frozen", "p20..p80", "x peft", "x hydra")


def _times(row: Row) -> tuple[str, ...]:
    ms, ratio = row["milliseconds"], row["ratio"]
    return (
        row["case"]["implementation"], *(f"{ms[key]:.2f}" for key in _SPREAD),
        f"{ratio['median']:.3f}", f"{ratio['p20']:.2f}..{ratio['p80']:.2f}",
    )  # fmt: skip


def _beside(row: Row, rows: Sequence[Row]) -> tuple[str, str]:
    """Median ratios to PEFT's LoRA of the same rank and to the loop, on the same layers."""
    known = row.get("ratio_to_way", {})
    names = (f"peft r={row['case']['rank']}", "hydra")
    return tuple(f"{known[name]['median']:.3f}" if name in known else "-" for name in names)  # type: ignore[return-value]


def _launches(rows: Sequence[Row]) -> str:
    kinds = {row["launches_kind"] for row in rows if row["launches"] is not None}
    return "kernels" if any("CUDA" in kind for kind in kinds) else "aten ops"


def _count(row: Row) -> str:
    return "-" if row["launches"] is None else str(row["launches"])


def _spent(spent: Row) -> str:
    lines = [(stage, f"{seconds:.1f}") for stage, seconds in spent["seconds"].items()]
    lines.append(("before the final training", f"{spent['before_training']:.1f}"))
    kind = f"search of {spent['trials']} trials" if spent["trials"] else "one warm-up, no search"
    header = (f"run {spent['run']!r} ({kind})", "seconds")
    return f"\n{harness.table(header, lines)}\n(measured by that run, on its own machine)"


if __name__ == "__main__":
    main()
