"""The table a run ends with."""

from __future__ import annotations

from typing import Any


def arms_table(evaluation: dict[str, Any], training: dict[str, dict[str, Any]]) -> str:
    """One line an arm; intervals are 95 %."""
    head = (
        "arm",
        "layers",
        "loss",
        "[95 %]",
        "accuracy",
        "[95 %]",
        "trainable",
        "s/step",
        "peak memory",
    )
    lines = [head]
    order = sorted(evaluation["arms"], key=lambda arm: (arm != "base", arm != "main", arm))
    for arm in order:
        results, metrics = evaluation["arms"][arm], training.get(arm)
        loss, accuracy = results["loss"], results.get("accuracy")
        lines.append(
            (
                _label(arm, metrics),
                str(len(metrics["layers"])) if metrics else "-",
                f"{loss['value']:.4f}",
                f"{loss['low']:.3f}-{loss['high']:.3f}",
                f"{accuracy['value']:.1%}" if accuracy else "-",
                f"{accuracy['low']:.1%}-{accuracy['high']:.1%}" if accuracy else "-",
                f"{metrics['trainable_parameters']:,}" if metrics else "0",
                f"{metrics['seconds_per_step']:.2f}" if metrics else "-",
                f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB" if metrics else "-",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rows = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    rows.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(rows)


def _label(arm: str, metrics: dict[str, Any] | None) -> str:
    return f"{arm} ({metrics['policy']})" if metrics and metrics["policy"] != arm else arm
