"""What the FLoE paper (arXiv 2506.00495) prints in its Tables 4, 5 and 8.

Its text says neither on which hardware nor with how many tokens a prompt. Left out is what cannot
be right: Gemma2-2B's row (26 layers under columns that start at 28) and the full time of
Clinic-10K (it repeats Dolly-15K's, and the printed difference does not fit it).
"""

from __future__ import annotations

from typing import Any

from benchmarks.harness import slope, table

NOTE = "the paper's figures, not ours; hardware not stated in the paper"
ITEMS, BATCH = 14042, 16  # of MMLU, one pass
SINGLE = "single head, all 32 layers"
_LAYERS = (SINGLE, "32", "28", "24", "20", "16", "12")
_SECONDS = {  # for one pass; 1A/4B on this many layers
    "Mistral-7B": (1462.27, 4022.30, 2055.37, 1917.85, 1758.16, 1666.58, 1636.02),
    "LLaMA3.1-8B": (1333.49, 1900.04, 1796.27, 1706.96, 1611.51, 1525.08, 1432.32),
}
TABLE_4 = {model: dict(zip(_LAYERS, times, strict=True)) for model, times in _SECONDS.items()}
# full, selected, selection; it prints no unit, seconds as in Table 4 are supposed
TABLE_5: dict[str, tuple[float | None, float, float]] = {
    "Dolly-15K": (20105.08, 16455.04, 122.86),
    "Clinic-10K": (None, 6697.16, 125.45),
    "Lawyer-Instruct": (10137.51, 6895.77, 123.13),
    "CodeAlpaca": (45092.51, 16197.23, 127.39),
}
TABLE_8: dict[str, tuple[int, float]] = {  # trials required, per cent of the grid's
    "grid search": (144, 100.0),
    "random search": (80, 55.0),  # both printed with a "~", as the next
    "Bayesian optimisation": (30, 21.0),
}
NOTE_8 = (
    "the paper's figures, not ours; ranks 4 to 64 by 4 and 2 to 10 experts; it says neither what "
    "was required of a trial, nor the model, the data or how often it was repeated"
)


def records() -> dict[str, Any]:
    """Both tables for the JSON file, labelled."""
    return {"note": NOTE, "items": ITEMS, "batch": BATCH, "table_4": TABLE_4, "table_5": TABLE_5}


def table_4() -> str:
    """Inference: seconds, the ratio to the single head, milliseconds of a batch (computed)."""
    batches = -(-ITEMS // BATCH)
    rows, slopes = [], []
    for model, times in TABLE_4.items():
        several = {int(layers): time for layers, time in times.items() if layers != SINGLE}
        line = slope(list(several), [[time / batches] for time in several.values()])
        slopes.append(f"{model} {line['median']:.0f}")
        for layers, seconds in times.items():
            ratio, ms = seconds / times[SINGLE], 1e3 * seconds / batches
            name = layers if layers == SINGLE else f"4 heads, {layers} layers"
            rows.append((f"{model}, {name}", f"{seconds:.2f}", f"{ratio:.2f}", f"{ms:.0f}"))
    header = ("Table 4 of the paper", "seconds", "x single", "ms a batch, computed")
    return (
        f"{table(header, rows)}\n({NOTE}; {ITEMS} MMLU items, batch {BATCH}; our fit through 12 to "
        f"32 layers, ms a batch and layer: {', '.join(slopes)})"
    )


def table_5() -> str:
    """Training: seconds with all and with selected layers, and of the selection itself."""
    rows = []
    for data, (full, selected, selection) in TABLE_5.items():
        ratio = "-" if full is None else f"{selected / full:.2f}"
        shown = "(unsure)" if full is None else f"{full:.2f}"
        rows.append((data, shown, f"{selected:.2f}", ratio, f"{selection:.2f}"))
    header = ("Table 5 of the paper", "full s", "selected s", "x full", "selection s")
    return (
        f"{table(header, rows)}\n({NOTE}; it prints no unit and does not say how many layers are "
        "selected; the warm-up and the search are in none of the columns)"
    )


def table_8() -> str:
    """Search: trials required by each strategy, and their share of the grid's."""
    rows = [(name, f"{trials}", f"{share:.0f} %") for name, (trials, share) in TABLE_8.items()]
    return f"{table(('Table 8 of the paper', 'trials', 'of the grid'), rows)}\n({NOTE_8})"
