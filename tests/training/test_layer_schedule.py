import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_model, tiny_rows
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from floe.adapters import FloeConfig, adapted_layers, get_model
from floe.data.batches import Collator
from floe.decoder_blocks import find_blocks, linear_at
from floe.training.layer_schedule import SCHEDULES, Alast, LayerSchedule, Lisa
from floe.training.schedule import TrainSettings
from floe.training.train import AdapterTrainer, global_state, step_loss, training_arguments

SETTINGS = TrainSettings(
    learning_rate=1e-2,
    warmup_ratio=0.0,
    batch_size=2,
    grad_accum=2,
    weight_decay=0.1,
    save_steps=None,
    save_total_limit=20,
)


def model_of(layers=None, dropout=0.25, depth=4):
    config = FloeConfig(r=2, num_experts=2, dropout=dropout, layers=layers)
    return get_model(tiny_model(layers=depth), config, seed=1)


def values(model):
    """{layer: every adapter value of the layer}."""
    return {
        layer: torch.cat([p.detach().flatten() for m in ms.values() for p in parameters(m)])
        for layer, ms in adapted_layers(model).items()
    }


def parameters(module):
    return [module.floe_shrink["default"].weight, module.floe_expand["default"].weight]


class Steps(TrainerCallback):
    """Values and active layers after every step; fails if asked."""

    def __init__(self, model, schedule, stop_after=None):
        self.model, self.schedule, self.stop_after = model, schedule, stop_after
        self.values, self.active, self.gradients, self.memory = [], [], [], []

    def on_pre_optimizer_step(self, *args, **kwargs):
        of = adapted_layers(self.model)
        found = {
            k: [p.grad is not None for m in v.values() for p in parameters(m)]
            for k, v in of.items()
        }
        self.gradients.append(found)

    def on_step_end(self, args, state, control, **kwargs):
        self.values.append(values(self.model))
        self.active.append(self.schedule.active)
        self.memory.append(self.schedule.memory())
        if state.global_step == self.stop_after:
            raise KeyboardInterrupt


def run(model, schedule, folder, *watchers, resume=None, **changes):
    """A Trainer run as floe sets it up, with the schedule beside; 6 steps."""
    settings = TrainSettings(**{**vars(SETTINGS), **changes})
    with global_state(), schedule:
        trainer = AdapterTrainer(
            model=model,
            args=training_arguments(settings, folder, torch.device("cpu")),
            train_dataset=tiny_rows(24),
            data_collator=Collator.for_model(model),
            compute_loss_func=step_loss,
            callbacks=[schedule, *watchers],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_only_the_active_layers_change(kind, tmp_path):
    model = model_of()
    schedule = SCHEDULES[kind](model, count=2, interval=2, seed=5)
    before = values(model)
    run(model, schedule, tmp_path, steps := Steps(model, schedule))
    for step, (after, active) in enumerate(zip(steps.values, steps.active, strict=True)):
        assert len(active) == 2
        assert active == tuple(sorted(active))
        for layer, value in after.items():
            assert torch.equal(value, before[layer]) == (layer not in active), (step, layer)
            assert all(steps.gradients[step][layer]) == (layer in active)
            assert any(steps.gradients[step][layer]) == (layer in active)
        before = after
    assert len(steps.active) == 6
    for start in range(0, 6, 2):
        assert len(set(steps.active[start : start + 2])) == 1  # one choice an interval
    assert schedule.trained == set(itertools.chain(*steps.active))
    assert all(
        p.requires_grad
        for m in adapted_layers(model).values()
        for n in m.values()
        for p in parameters(n)
    )
    assert schedule.active == ()


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_a_resumed_run_ends_bit_by_bit_like_an_uninterrupted_one(kind, tmp_path):
    def resumed(checkpoint, interval=2):
        model = model_of()
        schedule = SCHEDULES[kind](model, count=2, interval=interval, seed=9)
        steps = Steps(model, schedule)
        resume = tmp_path / f"checkpoint-{checkpoint}" if checkpoint else None
        run(model, schedule, tmp_path, steps, resume=resume, save_steps=None if resume else 1)
        return steps, schedule.trained

    expected, trained = resumed(None)
    assert len(set(expected.active)) > 1
    for checkpoint in (3, 4):  # within an interval, at its end
        found, again = resumed(checkpoint)
        assert found.active == expected.active[checkpoint:]
        assert found.memory == expected.memory[checkpoint:]
        for after, own in zip(found.values, expected.values[checkpoint:], strict=True):
            assert all(torch.equal(value, own[layer]) for layer, value in after.items())
        assert again == trained == set(itertools.chain(*expected.active))
    with pytest.raises(ValueError, match=r"checkpoint must be of the layer schedule .*'interval'"):
        resumed(4, interval=3)


def test_the_optimiser_keeps_what_it_knew_of_a_resting_layer(tmp_path):
    model = model_of()
    schedule = Lisa(model, count=1, interval=1, seed=0)
    kept = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            known = {
                k: optimizer.state.get(parameters(next(iter(v.values())))[0], {})
                for k, v in adapted_layers(model).items()
            }
            kept.append(
                {
                    k: (float(s["step"]), float(s["exp_avg"].sum())) if s else None
                    for k, s in known.items()
                }
            )

    run(model, schedule, tmp_path, Watch())
    active = [schedule.draw(step)[0] for step in range(6)]
    for step in range(1, 6):
        for layer in range(4):
            count = active[: step + 1].count(layer)
            assert (kept[step][layer] or (0,))[0] == count
            if layer != active[step]:
                assert kept[step][layer] == kept[step - 1][layer]


def test_lisa_draws_every_layer_equally_often():
    schedule = Lisa(model_of(layers=[0, 2, 3]), count=2, interval=5, seed=3)
    draws = [schedule.choose(interval) for interval in range(3000)]
    assert set(draws) == {(0, 2), (0, 3), (2, 3)}
    for pair in set(draws):
        assert abs(draws.count(pair) / 3000 - 1 / 3) < 5 * math.sqrt(2 / 9 / 3000)
    again = Lisa(model_of(layers=[0, 2, 3]), count=2, interval=5, seed=3)
    assert [again.choose(interval) for interval in range(20)] == draws[:20]
    other = Lisa(model_of(layers=[0, 2, 3]), count=2, interval=5, seed=4)
    assert [other.choose(interval) for interval in range(20)] != draws[:20]


class Changes(TrainerCallback):
    """The last token's change through every block in every training forward, from plain hooks."""

    def __init__(self, model):
        self.found = []
        self.rows = 0
        for block in find_blocks(model):
            block.module.register_forward_hook(self.hook(block.index))

    def hook(self, layer):
        def measure(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            # rows are padded on the left: the last token is the last place
            change = (hidden - args[0])[:, -1].detach().double().norm(dim=-1)
            self.found.append((layer, change))

        return measure


@pytest.mark.parametrize("checkpointing", [False, True])
def test_alast_takes_the_layers_of_the_largest_mean_change(checkpointing, tmp_path):
    model = model_of(dropout=0.0, layers=[0, 1, 3])
    for block, factor in zip(find_blocks(model), (3.0, 1.0, 9.0, 5.0), strict=True):
        linear_at(model, block.down_proj).weight.data.mul_(factor)  # layers that differ clearly
    schedule = Alast(model, count=2, interval=2, seed=1)
    seen = Changes(model)
    marks = []

    class Marks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            marks.append(len(seen.found))

    steps = Steps(model, schedule)
    run(model, schedule, tmp_path, steps, Marks(), gradient_checkpointing=checkpointing)
    assert steps.active[0] == schedule.draw(0)
    assert [m["rows"] for m in steps.memory] == [4, 8, 4, 8, 4, 8]  # each interval anew
    for interval in (1, 2):
        first = marks[2 * (interval - 1) - 1] if interval > 1 else 0
        part = seen.found[first : marks[2 * interval - 1]]
        mean = {
            k: float(torch.cat([c for layer, c in part if layer == k]).mean()) for k in (0, 1, 3)
        }
        expected = tuple(sorted(sorted(mean, key=lambda k: -mean[k])[:2]))
        assert steps.active[2 * interval] == expected, mean


def test_alast_counts_real_last_tokens_in_training_alone():
    model = model_of(dropout=0.0).train()
    schedule = Alast(model, count=1, interval=1)
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    rows = [ids[:1, :3], ids[1:]]
    with schedule, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        schedule.on_pre_optimizer_step(None, None, None)
        padded, count = schedule.sums.copy(), schedule.rows
        for row in rows:
            model(input_ids=row)
            schedule.on_substep_end(None, None, None)
        np.testing.assert_allclose(schedule.sums, 2 * padded, rtol=1e-5)
        assert (count, schedule.rows) == (2, 4)
        model.eval()
        model(input_ids=ids)
        schedule.on_substep_end(None, None, None)
        assert schedule.rows == 4
        model.train()
        find_blocks(model)[2].module.mlp.down_proj.base_layer.weight.data[0] = np.nan
        model(input_ids=rows[1])
        with pytest.raises(FloatingPointError, match="change in layer 2 must be finite"):
            schedule.on_substep_end(None, None, None)
    assert not any(m._forward_hooks for m in model.modules() if "Decoder" in type(m).__name__)


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_flags_and_hooks_come_back_after_an_error(kind, tmp_path):
    model = model_of()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    schedule = SCHEDULES[kind](model, count=1, interval=2)
    with pytest.raises(KeyboardInterrupt):
        run(model, schedule, tmp_path, Steps(model, schedule, stop_after=3))
    assert all(p.requires_grad for n, p in model.named_parameters() if "floe_" in n)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_what_is_refused():
    model = model_of(layers=[0, 2])
    for arguments, error, rule in (
        ((0, 1), ValueError, r"count must be in \[1, 2\], got 0"),
        ((3, 1), ValueError, r"count must be in \[1, 2\], got 3"),
        ((1, 0), ValueError, "interval must be at least 1, got 0"),
        ((1, 1, -1), ValueError, "seed must be at least 0, got -1"),
        ((1.0, 1), TypeError, "count must be an int, got float"),
        ((1, True), TypeError, "interval must be an int, got bool"),
    ):
        with pytest.raises(error, match=rule):
            Lisa(model, *arguments)
    with pytest.raises(TypeError, match="abstract"):
        LayerSchedule(model, 1, 1)
    with pytest.raises(ValueError, match="model must carry floe adapters, got none"):
        Lisa(tiny_model(), 1, 1)
    state = SimpleNamespace(global_step=0, log_history=[])
    with pytest.raises(RuntimeError, match="must be entered"):
        Lisa(model, 1, 1).on_train_begin(SimpleNamespace(world_size=1), state, None)
    with pytest.raises(ValueError, match="needs one process, got 2"), Lisa(model, 1, 1) as schedule:
        schedule.on_train_begin(SimpleNamespace(world_size=2), state, None)
    state = SimpleNamespace(global_step=3, log_history=[{"step": 3, "loss": 1.0}])
    with pytest.raises(ValueError, match="got None"), Lisa(model, 1, 1) as schedule:
        schedule.on_train_begin(SimpleNamespace(world_size=1), state, None)
