"""Training the adapters: the Hugging Face Trainer, made resumable, exact and quiet."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback

from floe.artifacts.results import TrainResult
from floe.data.batches import Collator, TokenRow, fingerprint
from floe.training import checkpoints
from floe.training.layer_schedule import LayerSchedule
from floe.training.memory import PeakMemory
from floe.training.schedule import TrainSettings, training_order
from floe.training.trainer import (
    SECONDS,
    VALIDATION,
    AdapterTrainer,
    Progress,
    Watch,
    global_state,
    step_loss,
    training_arguments,
)

__all__ = [
    "PeakMemory",
    "TrainResult",
    "TrainSettings",
    "adapter_parameters",
    "train",
    "training_order",
]


def train(
    model: Any,
    rows: Sequence[TokenRow],
    *,
    settings: TrainSettings | None = None,
    output_dir: str | Path,
    validation: Sequence[TokenRow] | None = None,
    on_progress: Progress | None = None,
    on_validation: Callable[[int, float], None] | None = None,
    layer_schedule: LayerSchedule | None = None,
) -> TrainResult:
    """Train the active adapter of ``model`` in place on the rows' response tokens (AdamW).

    Killed at any instant and called again, it ends with the same adapter, byte for byte, as a run
    that was never stopped (same machine and thread count). Only checkpoints are written to
    ``output_dir``; save the adapter from ``model`` afterwards.

    Args:
        model: a PEFT model of which exactly the active adapter's parameters require grad; it stays
            on its device, base weights in their dtype.
        rows: tokenised rows, each with at least one target token.
        validation: rows for the validation loss.
        on_progress: called after each step with (step, steps, loss, seconds left).
        on_validation: called with (step, loss); may raise to stop the training. After a resume the
            earlier values come again first.
        layer_schedule: trains the adapters of some layers at a time; None = all of them always.

    Raises:
        TypeError, ValueError: for a model without an active adapter, other trainable parameters,
            rows without targets, or a schedule whose learning rate never leaves 0.
        FileError: for checkpoints of another run.
        FloatingPointError: when the loss or a gradient is not finite.
        RuntimeError: if an adapted module did not change.
    """
    settings, folder = settings or TrainSettings(), Path(output_dir)
    parameters = adapter_parameters(model)
    order = check_rows(rows, settings)
    start = {name: _digest(p) for name, p in parameters.items()}
    identity = _identity(settings, rows, parameters)
    if layer_schedule is not None:
        identity["layer_schedule"] = layer_schedule.settings()
    checkpoint = checkpoints.newest(folder, identity)
    device = next(model.parameters()).device
    with global_state(), PeakMemory(device) as memory:
        watch = Watch(model, settings, identity, validation, on_progress, on_validation)
        trainer = AdapterTrainer(
            model=model,
            args=training_arguments(settings, folder, device),
            train_dataset=[rows[i] for i in order],
            data_collator=Collator.for_model(model),
            compute_loss_func=step_loss,
            callbacks=[watch, *([] if layer_schedule is None else [layer_schedule])],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            with layer_schedule or nullcontext():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            error.add_note(_memory_advice(trainer.state.global_step + 1, settings, device))
            raise
    resting = set() if layer_schedule is None else layer_schedule.resting()
    _check_moved(trainer, parameters, start, resting)
    log = trainer.state.log_history
    seconds = [entry[SECONDS] for entry in log if SECONDS in entry]
    return TrainResult(
        steps=trainer.state.global_step,
        trainable_parameters=sum(p.numel() for p in parameters.values()),
        seconds=sum(seconds),
        seconds_per_step=statistics.median(seconds),
        peak_memory_bytes=memory.bytes,
        memory_kind=memory.kind,
        train_loss=[(e["step"], e["loss"]) for e in log if "loss" in e],
        validation_loss=[(e["step"], e[VALIDATION]) for e in log if VALIDATION in e],
        resumed_from=int(checkpoint.name.split("-")[1]) if checkpoint else None,
    )


def adapter_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The active adapter's parameters by name; an error unless exactly they require grad.

    Raises:
        TypeError: if the model is not a PEFT model.
        ValueError: if an adapter parameter is frozen, or anything else is trainable.
    """
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    if not hasattr(model, "peft_config") or not prefix:
        raise TypeError(f"model must be a PEFT model, got {type(model).__name__}")
    active = set(model.active_adapters)
    wanted = {
        name: p
        for name, p in model.named_parameters()
        if any(part.startswith(prefix) for part in name.split("."))
        and active & set(name.split("."))
    }
    if not wanted:
        raise ValueError("model must have an active adapter with parameters, got none")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if trainable != wanted.keys():
        frozen, extra = sorted(wanted.keys() - trainable), sorted(trainable - wanted.keys())
        raise ValueError(
            "exactly the active adapter's parameters must require grad, got "
            f"{len(frozen)} frozen (first: {frozen[:1]}), {len(extra)} others (first: {extra[:1]})"
        )
    return wanted


def _world_size() -> int:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def check_rows(rows: Sequence[TokenRow], settings: TrainSettings) -> list[int]:
    """The order of training; ValueError where :func:`train` would refuse these rows."""
    workers = _world_size()
    order = training_order([len(row) for row in rows], settings, workers)
    if not rows:
        raise ValueError("rows must not be empty")
    for place, row in enumerate(rows):
        if row.targets < 1:
            raise ValueError(f"rows must each have a target token, got none in row {place}")
    steps = math.ceil(len(order) / (settings.batch_size * settings.grad_accum * workers))
    rising = math.ceil(settings.warmup_ratio * steps) if settings.schedule != "constant" else 0
    if steps <= rising and steps == 1:
        raise ValueError(
            "a step must have a learning rate above 0, got 1 step, which warm-up gives 0: "
            "train for more steps (rows, epochs, max_steps, grad_accum) or set warmup_ratio to 0"
        )
    return order


def _identity(
    settings: TrainSettings, rows: Sequence[TokenRow], parameters: dict[str, nn.Parameter]
) -> dict[str, Any]:
    shapes = [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in sorted(parameters.items())]
    adapter = hashlib.sha256("\n".join(shapes).encode()).hexdigest()
    facts = {"rows": fingerprint(rows), "adapter": adapter, "world_size": _world_size()}
    return settings.identity() | facts


def _digest(parameter: Tensor) -> bytes:
    data = parameter.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).digest()


def _check_moved(
    trainer: AdapterTrainer,
    parameters: dict[str, nn.Parameter],
    start: dict[str, bytes],
    resting: set[int],
) -> None:
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    if optimised != {id(p) for p in parameters.values()}:
        raise RuntimeError(
            "the optimizer must hold exactly the adapter's parameters; a parameter was replaced"
        )
    trained, moved = set(), set()
    for name, parameter in parameters.items():
        module = name.split(f".{trainer.model.base_model.prefix}")[0]
        if id(parameter) not in resting:
            trained.add(module)
            moved |= {module} if _digest(parameter) != start[name] else set()
    still = sorted(trained - moved)
    if still:
        raise RuntimeError(
            f"each adapted module must have changed in training, got {still} unchanged"
        )


def _memory_advice(step: int, settings: TrainSettings, device: torch.device) -> str:
    free = ""
    if device.type == "cuda":
        left, total = torch.cuda.mem_get_info(device)
        free = f" ({left / 2**30:.1f} of {total / 2**30:.1f} GiB free)"
    ways = [] if settings.gradient_checkpointing else ["set gradient_checkpointing"]
    size, accum = settings.batch_size, settings.grad_accum
    if size > 1:
        less = max(n for n in range(1, size) if size * accum % n == 0)
        ways.append(
            f"set batch_size to {less} and grad_accum to {size * accum // less} (now {size} and "
            f"{accum})"
        )
    if ways:
        ways = [f"{' or '.join(ways)}, and the training continues from its checkpoints; "]
    return (
        f"out of memory in step {step}{free}: {''.join(ways)}"
        "a lower max_length makes other rows, so the training begins anew"
    )
