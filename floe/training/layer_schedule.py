"""Which layers' adapters train, interval by interval: the choice is made during the training.

Every layer keeps its adapter in the forward; only those of the active layers require a gradient.
"""

from __future__ import annotations

import abc
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from floe.adapters.targets import adapted_layers
from floe.decoder_blocks import base_of, find_blocks
from floe.errors import require_whole
from floe.importance.block_replay import hidden_of

RECORD = "floe_layer_schedule"


class LayerSchedule(TrainerCallback, abc.ABC):  # type: ignore[misc]
    """A Trainer callback that trains the adapters of ``count`` layers at a time.

    Use it as a context manager around the training; on leaving, the flags and hooks are as before::

        with schedule:
            Trainer(..., callbacks=[schedule]).train()

    Inactive adapters get requires_grad False at the start of a step, after the optimiser was built
    for all of them: they have no gradient, and AdamW leaves both them and their state alone. What a
    resume needs is kept in the Trainer's log history, which its checkpoints carry; a resumed run
    trains what an uninterrupted one does.

    Args:
        model: with floe adapters that require gradients.
        count: how many of the adapted layers train at a time. interval: steps between choices.
        seed: of what is drawn.

    Attributes:
        active: the layers being trained, ascending; empty before the first step.
        trained: layers that were active in any step so far, those before a resume included.

    Raises:
        ValueError: a model without adapters, a count or interval out of range. TypeError: no int.
    """

    def __init__(self, model: nn.Module, count: int, interval: int, seed: int = 41) -> None:
        self.parameters = {
            layer: [
                weight
                for module in modules.values()
                for name in module.active_names()
                for weight in module.weights(name)
            ]
            for layer, modules in sorted(adapted_layers(model).items())
        }
        self.layers = tuple(self.parameters)
        if not self.layers:
            raise ValueError("model must carry floe adapters, got none")
        require_whole("count", count, 1, len(self.layers))
        require_whole("interval", interval, 1)
        require_whole("seed", seed, 0)
        self.model, self.count, self.interval, self.seed = model, count, interval, seed
        self.active: tuple[int, ...] = ()
        self.trained: set[int] = set()
        self._flags: list[tuple[nn.Parameter, bool]] | None = None  # None outside of the context

    @abc.abstractmethod
    def choose(self, interval: int) -> tuple[int, ...]:
        """The layers of interval 0, 1, ..., ascending."""

    def __enter__(self) -> LayerSchedule:
        self._flags = [(p, p.requires_grad) for each in self.parameters.values() for p in each]
        return self

    def __exit__(self, *error: object) -> None:
        for parameter, flag in self._flags or []:
            parameter.requires_grad_(flag)
        self.active, self._flags = (), None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what a checkpoint's log holds.

        Raises:
            RuntimeError: outside of the schedule's context.
            ValueError: several processes, or a checkpoint of another schedule.
        """
        if self._flags is None:
            raise RuntimeError("a layer schedule must be entered: with schedule: trainer.train()")
        if args.world_size != 1:
            raise ValueError(f"a layer schedule needs one process, got {args.world_size}")
        record = next((e[RECORD] for e in state.log_history if RECORD in e), None)
        if state.global_step and (record or {}).get("settings") != self.settings():
            given = None if record is None else record.get("settings")
            raise ValueError(
                f"the checkpoint must be of the layer schedule {self.settings()}, got {given}"
            )
        if record is not None:
            self.restore(record)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose anew where an interval begins."""
        if not self.active or state.global_step % self.interval == 0:
            self.active = self.choose(state.global_step // self.interval)
        self.trained |= set(self.active)
        for layer, parameters in self.parameters.items():
            for parameter in parameters:
                parameter.requires_grad_(layer in self.active)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note for a resume what is active, before a checkpoint is written."""
        record = {"settings": self.settings(), "active": list(self.active)}
        record |= {"trained": sorted(self.trained)} | self.memory()
        entry = next((e for e in state.log_history if RECORD in e), None)
        if entry is None:
            state.log_history.append({"step": state.global_step, RECORD: record})
        else:
            entry |= {"step": state.global_step, RECORD: record}

    def resting(self) -> set[int]:
        """Ids of the adapter parameters that no step has trained."""
        resting = self.parameters.keys() - self.trained
        return {id(parameter) for layer in resting for parameter in self.parameters[layer]}

    def settings(self) -> dict[str, Any]:
        """What must be the same in a resumed run; JSON values."""
        sizes = {"count": self.count, "interval": self.interval, "seed": self.seed}
        return {"kind": type(self).__name__, "layers": list(self.layers)} | sizes

    def memory(self) -> dict[str, Any]:
        """What a later choice depends on beyond step and seed; JSON values."""
        return {}

    def restore(self, record: dict[str, Any]) -> None:
        """Take up what :meth:`on_step_end` noted."""
        self.active, self.trained = tuple(record["active"]), set(record["trained"])

    def draw(self, interval: int) -> tuple[int, ...]:
        """Uniformly random layers that follow from the seed and the interval alone."""
        order = np.random.default_rng([self.seed, interval]).permutation(len(self.layers))
        return tuple(sorted(self.layers[place] for place in order[: self.count].tolist()))


class Lisa(LayerSchedule):
    """Uniformly random layers in every interval, from a generator of its own.

    Source: LISA (arXiv 2403.17919), which trains the full weights of randomly sampled layers and,
    always, the embeddings and the head. Assumed: adapters in place of weights; no layer is always
    trained; the optimiser's state of a resting layer is kept and its moments do not decay.
    """

    def choose(self, interval: int) -> tuple[int, ...]:
        """A draw."""
        return self.draw(interval)


class Alast(LayerSchedule):
    """The layers that change the last token most, by a mean over the interval before.

    The change is the norm of a block's output minus its input at each row's last real token, mean
    over the rows of all training forwards of an interval. The first interval is a random draw, for
    nothing has been seen. Source: ALaST, "Adaptive Layer Selection Fine-Tuning for Vision
    Transformers" (2024, abstract only), where the class token's change sets a layer's compute
    budget. Assumed: the last token stands for the class token, the change is not normalised, layers
    of a large change train, and budgets of tokens are left out.
    """

    def __init__(self, model: nn.Module, count: int, interval: int, seed: int = 41) -> None:
        super().__init__(model, count, interval, seed)
        self.blocks = [block for block in find_blocks(model) if block.index in self.parameters]
        self.sums, self.rows = np.zeros(len(self.layers)), 0
        self._now: dict[int, Tensor] = {}
        self._last = torch.empty(0, dtype=torch.int64)
        self._hooks = ExitStack()

    def choose(self, interval: int) -> tuple[int, ...]:
        """The layers of the largest mean change; ties to the lower index."""
        if not self.rows:
            return self.draw(interval)
        order = np.argsort(-(self.sums / self.rows), kind="stable")[: self.count]
        self.sums, self.rows = np.zeros(len(self.layers)), 0
        return tuple(sorted(self.layers[place] for place in order.tolist()))

    def __enter__(self) -> LayerSchedule:
        base = base_of(self.model)
        handles = [base.register_forward_pre_hook(self._note_tokens, with_kwargs=True)]
        for place, block in enumerate(self.blocks):
            hook = partial(self._measure, place)
            handles.append(block.module.register_forward_hook(hook, with_kwargs=True))
        for handle in handles:
            self._hooks.callback(handle.remove)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.close()
        super().__exit__(*error)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the forward just made; gradient checkpointing measures it twice, it counts once.

        Raises:
            FloatingPointError: a change that is not finite.
        """
        if not self._now:
            return
        sums = torch.stack([self._now[place].sum() for place in range(len(self.blocks))])
        changes = sums.double().cpu().numpy()
        if not np.isfinite(changes).all():
            layer = self.layers[int(np.flatnonzero(~np.isfinite(changes))[0])]
            raise FloatingPointError(f"the last token's change in layer {layer} must be finite")
        self.sums += changes
        self.rows += len(self._last)
        self._now = {}

    on_pre_optimizer_step = on_substep_end  # of a step's last part

    def memory(self) -> dict[str, Any]:
        """The interval's sums so far."""
        return {"sums": self.sums.tolist(), "rows": self.rows}

    def restore(self, record: dict[str, Any]) -> None:
        """Take up the sums, too."""
        super().restore(record)
        self.sums, self.rows = np.array(record["sums"], dtype=np.float64), int(record["rows"])

    def _note_tokens(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        real = torch.ones_like(ids) if mask is None else mask
        places = torch.arange(real.shape[1], device=real.device)
        self._last = torch.where(real.bool(), places, -1).amax(1)

    def _measure(
        self, place: int, _module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        if not base_of(self.model).training:
            return
        before = (args[0] if args else kwargs["hidden_states"]).detach()
        rows = torch.arange(len(before), device=before.device)
        last = self._last.to(before.device)
        change = hidden_of(output).detach()[rows, last].float() - before[rows, last].float()
        self._now[place] = change.norm(dim=-1)


SCHEDULES: dict[str, type[LayerSchedule]] = {"lisa": Lisa, "alast": Alast}
