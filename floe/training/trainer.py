"""The Hugging Face Trainer as :mod:`floe.training.train` uses it.

Own order and loss, sealed checkpoints.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from floe.data.batches import Collator, TokenRow, make_batches
from floe.data.loss import row_losses
from floe.evaluation import validation_loss
from floe.training import checkpoints
from floe.training.schedule import TrainSettings

Progress = Callable[[int, int, float, float], None]
SECONDS = "floe_seconds"


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
        if not torch.isfinite(loss):
            raise _not_finite("loss", float(loss), self.state)
        return loss


def step_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Summed loss of a part of a step over the target tokens of the whole step."""
    nll, _ = row_losses(outputs.logits, labels)
    loss: Tensor = nll.sum() / num_items_in_batch
    return loss


VALIDATION = "floe_validation_loss"


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
        on_progress: Progress | None,
        on_validation: Callable[[int, float], None] | None,
    ) -> None:
        self.model, self.settings, self.identity = model, settings, identity
        self.on_progress, self.on_validation = on_progress, on_validation
        collator = Collator.for_model(model)
        self.batches = (
            make_batches(validation, settings.eval_batch_size, True, collator) if validation else []
        )
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what a checkpoint's log holds; loss before the first step if asked."""
        self.steps_to_validate = {
            round(p * state.max_steps) for p in self.settings.validation_points
        }
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
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise _not_finite("gradient norm", float(norm), state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step's time; validation loss if it is due."""
        self.seconds.append(time.perf_counter() - self.started)
        state.log_history.append({"step": state.global_step, SECONDS: self.seconds[-1]})
        self._validate(state)

    def _validate(self, state: Any) -> None:
        if not self.batches or state.global_step not in self.steps_to_validate:
            return
        loss = validation_loss(self.model, self.batches)
        state.log_history.append({"step": state.global_step, VALIDATION: loss})
        if self.on_validation:
            self.on_validation(state.global_step, loss)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
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


def _not_finite(what: str, value: float, state: Any) -> FloatingPointError:
    return FloatingPointError(
        f"the {what} must be finite, got {value} in step {state.global_step + 1} "
        f"of {state.max_steps}; training stopped (a lower learning_rate or more warm-up may help)"
    )
