"""How many layers, by what the validation rows say: one arm a number, trained and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from floe.decoder_blocks import find_blocks
from floe.evaluation.evaluate import evaluate_rows
from floe.pipeline.inputs import Workspace, plain
from floe.selection.layer_count import CountChoice, choose_count
from floe.storage import read_json, write_json

LOSSES = "losses.json"


def swept_counts(work: Workspace) -> list[int]:
    """The numbers of layers to try, ascending; none unless ``select.layers`` is a sweep."""
    layers: Any = work.config.select.layers
    if not (isinstance(layers, dict) and "sweep" in layers):
        return []
    counts = sorted(set(layers["sweep"]))
    total = len(find_blocks(work.base_model))
    if counts[-1] > total:
        raise ValueError(f"select.layers.sweep must be at most {total} layers, got {counts[-1]}")
    return counts


def validate(work: Workspace, folder: Path) -> None:
    """Write the validation loss of every row under the adapter in ``folder``, nats per token."""
    with work.adapted(folder / "adapter") as model:
        losses = evaluate_rows(
            model, work.validation_rows, work.config.eval.batch_size,
            work.tokenizer.pad_token_id or 0,
        )  # fmt: skip
    write_json(folder / LOSSES, {"rows": (losses.nll / losses.tokens).tolist()})


def swept_choice(run: Path, counts: list[int]) -> CountChoice:
    """The smallest number whose loss is within a standard error of the best."""
    return choose_count(
        {count: read_json(run / f"sweep/{count}" / LOSSES)["rows"] for count in counts}
    )


def describe(choice: CountChoice) -> dict[str, Any]:
    """The choice as plain values, for ``select/sweep.json``."""
    return {
        name: value.tolist() if hasattr(value, "tolist") else plain(value)
        for name, value in vars(choice).items()
    }
