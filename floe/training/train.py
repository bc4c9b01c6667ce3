"""Training the adapters: the Hugging Face Trainer, made resumable, exact and quiet."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from floe.artifacts.results import TrainResult
from floe.data.batches import Collator, TokenRow, fingerprint, make_batches
from floe.data.loss import row_losses
from floe.evaluation import validation_loss
from floe.training import checkpoints
from floe.training.layer_schedule import LayerSchedule
from floe.training.memory import PeakMemory
from floe.training.schedule import TrainSettings, training_order

OnProgress = Callable[[int, int, float, float], None]
OnValidation = Callable[[int, float], None]
# Entries of the Trainer's log history, which its checkpoints carry.
SECONDS, VALIDATION = "floe_seconds", "floe_validation_loss"


def train(
    model: Any,
    rows: Sequence[TokenRow],
    *,
    settings: TrainSettings | None = None,
    output_dir: str | Path,
    validation: Sequence[TokenRow] | None = None,
    on_progress: OnProgress | None = None,
    on_validation: OnValidation | None = None,
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
    ordered = [rows[i] for i in check_rows(rows, settings)]
    start = {name: _digest(p) for name, p in parameters.items()}
    identity = _identity(settings, rows, parameters, layer_schedule)
    checkpoint = checkpoints.newest(folder, identity)
    device = next(model.parameters()).device
    with global_state(), PeakMemory(device) as memory:
        watch = Watch(model, settings, identity, validation, on_progress, on_validation)
        callbacks = [watch] if layer_schedule is None else [watch, layer_schedule]
        arguments = training_arguments(settings, folder, device)
        trainer = _trainer(model, ordered, arguments, callbacks)
        try:
            with layer_schedule or nullcontext():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError as error:
            error.add_note(_memory_advice(trainer.state.global_step + 1, settings, device))
            raise
    _check_moved(trainer, parameters, start, layer_schedule)
    return _result(trainer.state, parameters, memory, checkpoint)


def _result(
    state: Any, parameters: dict[str, nn.Parameter], memory: PeakMemory, checkpoint: Path | None
) -> TrainResult:
    log = state.log_history
    seconds = [entry[SECONDS] for entry in log if SECONDS in entry]
    return TrainResult(
        steps=state.global_step,
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
    active, wanted = set(model.active_adapters), {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if active & set(parts) and any(part.startswith(prefix) for part in parts):
            wanted[name] = parameter
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


def _world_size() -> int:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def _identity(
    settings: TrainSettings,
    rows: Sequence[TokenRow],
    parameters: dict[str, nn.Parameter],
    layer_schedule: LayerSchedule | None,
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be this run's."""
    shapes = [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in sorted(parameters.items())]
    adapter = hashlib.sha256("\n".join(shapes).encode()).hexdigest()
    facts = {"rows": fingerprint(rows), "adapter": adapter, "world_size": _world_size()}
    scheduled = {} if layer_schedule is None else {"layer_schedule": layer_schedule.settings()}
    return settings.identity() | facts | scheduled


def _digest(parameter: Tensor) -> bytes:
    data = parameter.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).digest()


def _check_moved(
    trainer: AdapterTrainer,
    parameters: dict[str, nn.Parameter],
    start: dict[str, bytes],
    layer_schedule: LayerSchedule | None,
) -> None:
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    if optimised != {id(p) for p in parameters.values()}:
        raise RuntimeError(
            "the optimizer must hold exactly the adapter's parameters; a parameter was replaced"
        )
    resting = set() if layer_schedule is None else layer_schedule.resting()
    moved: dict[str, bool] = {}  # by module
    for name, parameter in parameters.items():
        if id(parameter) not in resting:
            module = name.split(f".{trainer.model.base_model.prefix}")[0]
            moved[module] = moved.get(module, False) or _digest(parameter) != start[name]
    still = sorted(module for module, did in moved.items() if not did)
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
        accums = f"grad_accum to {size * accum // less} (now {size} and {accum})"
        ways.append(f"set batch_size to {less} and {accums}")
    go_on = f"{' or '.join(ways)}, and the training continues from its checkpoints; "
    return (
        f"out of memory in step {step}{free}: {go_on if ways else ''}"
        "a lower max_length makes other rows, so the training begins anew"
    )


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """The Trainer with our order of rows, and nothing written but the adapter."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter alone."""
        if self.args.should_save:
            # "auto" would ask the hub for the base model's configuration at every save
            self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward; a loss that is not finite stops the run."""
        loss: Tensor = super().training_step(*args, **kwargs)
        _check_finite("loss", loss, self.state)
        return loss


def step_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Summed loss of a part of a step over the target tokens of the whole step."""
    nll, _ = row_losses(outputs.logits, labels)
    loss: Tensor = nll.sum() / num_items_in_batch
    return loss


def _check_finite(what: str, value: Tensor, state: Any) -> None:
    if not torch.isfinite(value):
        raise FloatingPointError(
            f"the {what} must be finite, got {float(value)} in step {state.global_step + 1} of "
            f"{state.max_steps}; training stopped (a lower learning_rate or more warm-up may help)"
        )


class Watch(TrainerCallback):  # type: ignore[misc]
    """Times steps, checks gradients, measures validation loss, seals checkpoints, reports progress.

    What must survive a resume goes into the Trainer's log history, which its checkpoints carry.
    """

    def __init__(
        self,
        model: Any,
        settings: TrainSettings,
        identity: dict[str, Any],
        validation: Sequence[TokenRow] | None,
        on_progress: OnProgress | None,
        on_validation: OnValidation | None,
    ) -> None:
        self.model, self.settings, self.identity = model, settings, identity
        self.on_progress, self.on_validation = on_progress, on_validation
        rows, collator = validation or [], Collator.for_model(model)
        self.batches = make_batches(rows, settings.eval_batch_size, collator) if rows else []
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what a checkpoint's log holds; loss before the first step if asked."""
        points = self.settings.validation_points
        self.steps_to_validate = {round(p * state.max_steps) for p in points}
        for entry in state.log_history:
            if VALIDATION in entry and self.on_validation:
                self.on_validation(entry["step"], entry[VALIDATION])
        self.seconds = [e[SECONDS] for e in state.log_history if SECONDS in e]
        if state.global_step == 0:
            self._validate(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the step's clock."""
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A gradient that is not finite stops the run before it reaches the adapter."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        _check_finite("gradient norm", torch.nn.utils.get_total_norm(gradients), state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step's time; validation loss if it is due."""
        self.seconds.append(time.perf_counter() - self.started)
        state.log_history.append({"step": state.global_step, SECONDS: self.seconds[-1]})
        self._validate(state)

    def _validate(self, state: Any) -> None:
        if self.batches and state.global_step in self.steps_to_validate:
            loss = validation_loss(self.model, self.batches)
            state.log_history.append({"step": state.global_step, VALIDATION: loss})
            if self.on_validation:
                self.on_validation(state.global_step, loss)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Report progress."""
        if self.on_progress and logs and "loss" in logs:
            left = (state.max_steps - state.global_step) * statistics.median(self.seconds)
            self.on_progress(state.global_step, state.max_steps, logs["loss"], left)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint the Trainer has just written; then the oldest may go."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            checkpoints.seal(folder / f"checkpoint-{state.global_step}", self.identity)
            checkpoints.rotate(folder, self.settings.save_total_limit)


def training_arguments(
    settings: TrainSettings, output_dir: Path, device: torch.device
) -> TrainingArguments:
    """The Trainer's arguments for these settings: no reports, no progress bars, no workers."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    renamed: dict[str, Any] = {}
    if settings.gradient_checkpointing:  # transformers renamed it in 5.2x
        name = "activation" if "activation_checkpointing" in known else "gradient"
        renamed = {f"{name}_checkpointing": True}
        renamed[f"{name}_checkpointing_kwargs"] = {"use_reentrant": False}
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        num_train_epochs=1,  # the rows given to the Trainer are all epochs in a row
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share of the steps
        optim="adamw_torch",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=1,
        logging_nan_inf_filter=False,
        log_level="error",
        disable_tqdm=True,
        report_to="none",
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=None,  # it would go by file times; ours go by step, see Watch.on_save
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=device.type == "cpu",
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        **renamed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # never torch's DataParallel over all visible GPUs
    return arguments


def _trainer(
    model: Any, rows: list[TokenRow], arguments: TrainingArguments, callbacks: list[Any]
) -> AdapterTrainer:
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=Collator.for_model(model),
        compute_loss_func=step_loss,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def global_state() -> Iterator[None]:
    """The Trainer seeds the process's generators and sets a verbosity: put both back."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    verbosity = transformers_logging.get_verbosity()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        transformers_logging.set_verbosity(verbosity)
