import dataclasses
import os
import random
import sys
import time

import numpy as np
import pytest
import torch
import transformers
from helpers import killing
from helpers.tiny import tiny_model, tiny_rows
from helpers.workers import TRAINING, training

from floe.adapters import FloeConfig, adapted_modules, get_model, separate_base
from floe.data.batches import TokenRow
from floe.data.loss import row_losses
from floe.errors import FileError
from floe.evaluation import evaluate_rows, summarise_loss
from floe.training import checkpoints
from floe.training.memory import PeakMemory
from floe.training.schedule import TrainSettings, training_order
from floe.training.train import adapter_parameters, train

FAST = TrainSettings(learning_rate=1e-2, warmup_ratio=0.0, save_steps=None, validation_points=())


def settings(**changes):
    return TrainSettings(**{**vars(FAST), **changes})


def model_of(seed=1, layers=None, dropout=0.0, **config):
    kind = FloeConfig(r=2, num_experts=2, dropout=dropout, layers=layers, **config)
    return get_model(tiny_model(), kind, seed=seed)


def state_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(a, b):
    a, b = state_of(a), state_of(b)
    gap = max(float((a[n] - b[n]).abs().max()) for n in a)
    return gap / max(float(b[n].abs().max()) for n in b if "floe_" in n)


def test_only_the_selected_adapters_move_and_the_loss_falls(tmp_path):
    model, rows = model_of(layers=[1]), tiny_rows(48)
    before = state_of(model)
    result = train(
        model,
        rows,
        settings=settings(epochs=3),
        output_dir=tmp_path,
        validation=rows[:12],
    )
    after = state_of(model)
    for name, value in before.items():
        assert torch.equal(value, after[name]) == ("floe_" not in name), name
    assert all(".layers.1." in path for path in adapted_modules(model))
    assert result.steps == 18
    assert result.trainable_parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert [step for step, _ in result.train_loss] == list(range(1, 19))
    assert np.mean([loss for _, loss in result.train_loss[-3:]]) < result.train_loss[0][1] - 0.15
    assert result.seconds == pytest.approx(18 * result.seconds_per_step, rel=2)
    assert result.peak_memory_bytes > 50 << 20
    assert result.memory_kind in ("resident set", "resident set since process start")
    assert result.resumed_from is None
    for module in adapted_modules(model).values():  # A, B and the router each
        rank = module.settings["default"].rank
        old = before[
            next(
                n for n, p in model.named_parameters() if p is module.floe_shrink["default"].weight
            )
        ]
        new = module.floe_shrink["default"].weight
        assert not torch.equal(old[:rank], new[:rank])
        assert not torch.equal(old[rank:], new[rank:])


def test_equals_adamw_by_hand(tmp_path):
    """The Trainer against a plain loop: token mean over the step, clipping, cosine schedule."""
    rows = tiny_rows(24)
    model, plain = model_of(), model_of()
    used = settings(batch_size=2, grad_accum=4, max_grad_norm=0.5)
    train(model, rows, settings=used, output_dir=tmp_path)
    order = training_order([len(r) for r in rows], used)
    optimizer = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    plain.train()
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + np.cos(np.pi * step / 3))
        chosen = [rows[i] for i in order[8 * step : 8 * step + 8]]
        losses = [
            row_losses(
                plain(torch.tensor([r.prompt + r.response])).logits, torch.tensor([r.labels])
            )[0]
            for r in chosen
        ]
        (torch.cat(losses).sum() / sum(r.targets for r in chosen)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert distance(model, plain) < 1e-4


@pytest.mark.parametrize(("batch", "accum"), [(2, 4), (8, 1), (3, 3)])
def test_accumulation_does_not_change_the_result(tmp_path, batch, accum):
    """Rows have 2 to 4 targets; 3 x 3 differs in its blocks and must NOT agree."""
    rows, low = tiny_rows(40), {"learning_rate": 1e-3}
    reference, model = model_of(), model_of()
    one, other = settings(**low), settings(**low, batch_size=batch, grad_accum=accum)
    train(reference, rows, settings=one, output_dir=tmp_path)
    train(model, rows, settings=other, output_dir=tmp_path)
    if batch * accum == 8:
        assert distance(model, reference) < 1e-5
    else:
        assert distance(model, reference) > 1e-3


@pytest.mark.parametrize("epochs", [0.5, 1.0, 2.3])
def test_every_row_is_seen_once_an_epoch(epochs):
    order = training_order([5] * 40, settings(epochs=epochs))
    assert len(order) == 40 * epochs
    counts = np.bincount(order, minlength=40)
    assert counts.max() - counts.min() <= 1
    assert order == training_order([5] * 40, settings(epochs=epochs))
    assert order != training_order([5] * 40, settings(epochs=epochs, seed=7))
    if epochs > 2:
        assert order[:40] != order[40:80]


def test_max_steps_replaces_epochs_and_grouping_keeps_lengths_together():
    lengths = np.random.default_rng(0).integers(5, 100, 1000).tolist()
    plain = training_order(lengths, settings(max_steps=300))
    assert len(plain) == 2400
    grouped = training_order(lengths, settings(group_by_length=True))
    assert sorted(grouped) == list(range(1000))

    def waste(order):
        blocks = [[lengths[i] for i in order[s : s + 8]] for s in range(0, len(order), 8)]
        return sum(max(b) * len(b) - sum(b) for b in blocks)

    assert waste(grouped) < 0.2 * waste(plain[:1000])
    firsts = [lengths[i] for i in grouped[::8]][:50]
    assert firsts != sorted(firsts, reverse=True)  # not all long rows first


def test_validation_points_and_callbacks(tmp_path):
    rows, seen, progress = tiny_rows(32), [], []
    model = model_of()
    used = settings(validation_points=(0.0, 0.5, 1.0))
    result = train(
        model,
        rows,
        settings=used,
        output_dir=tmp_path,
        validation=rows[:9],
        on_validation=lambda step, loss: seen.append((step, loss)),
        on_progress=lambda *values: progress.append(values),
    )
    assert [step for step, _ in seen] == [0, 2, 4]
    assert result.validation_loss == seen
    assert seen[-1][1] == pytest.approx(
        summarise_loss(evaluate_rows(model, rows[:9])).value, abs=1e-6
    )
    assert [p[:2] for p in progress] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [p[2] for p in progress] == [loss for _, loss in result.train_loss]
    assert progress[-1][3] == 0
    assert progress[0][3] > 0


def test_nothing_of_the_process_is_left_changed(tmp_path, capfd):
    from transformers.utils import logging

    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    verbosity = logging.get_verbosity()
    before = random.random(), np.random.rand(), torch.rand(2)  # noqa: NPY002
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    train(model_of(dropout=0.25), tiny_rows(16), settings=FAST, output_dir=tmp_path)
    after = random.random(), np.random.rand(), torch.rand(2)  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert logging.get_verbosity() == verbosity
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_gradient_checkpointing_gives_the_same_adapter(tmp_path):
    rows = tiny_rows(16)
    a, b = model_of(), model_of()
    train(a, rows, settings=FAST, output_dir=tmp_path)
    train(b, rows, settings=settings(gradient_checkpointing=True), output_dir=tmp_path)
    assert distance(a, b) < 1e-5


def test_bfloat16_base_and_float32_adapter(tmp_path):
    model = get_model(tiny_model().bfloat16(), FloeConfig(r=2, num_experts=2, dropout=0.0), seed=1)
    result = train(model, tiny_rows(24), settings=settings(epochs=3), output_dir=tmp_path)
    dtypes = {p.dtype for p in adapter_parameters(model).values()}
    assert dtypes == {torch.float32}
    assert result.train_loss[-1][1] < result.train_loss[0][1]


class Poisoned(torch.nn.Module):
    """A frozen head that turns to NaN at its n-th call."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.left = inner, calls

    def forward(self, x):
        self.left -= 1
        return self.inner(x) * (float("nan") if self.left < 0 else 1.0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = model_of()
    base = model.get_base_model()
    base.lm_head = Poisoned(base.lm_head, 17)
    with pytest.raises(
        FloatingPointError, match=r"the loss must be finite, got nan in step 3 of 6"
    ):
        train(model, tiny_rows(48), settings=settings(save_steps=2), output_dir=tmp_path)
    assert [step for step, _ in checkpoints.checkpoints(tmp_path)] == [2]
    assert all(p.isfinite().all() for p in adapter_parameters(model).values())


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    model = model_of()
    parameter = next(iter(adapter_parameters(model).values()))
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        FloatingPointError, match=r"the gradient norm must be finite, got .* in step 1 of 6"
    ):
        train(model, tiny_rows(48), settings=FAST, output_dir=tmp_path)
    assert all(p.isfinite().all() for p in adapter_parameters(model).values())


def test_out_of_memory_says_what_to_change(tmp_path, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(transformers.Trainer, "compute_loss", exhausted)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(model_of(), tiny_rows(16), settings=FAST, output_dir=tmp_path)
    assert caught.value.__notes__ == [
        "out of memory in step 1: set gradient_checkpointing, and the training continues from its "
        "checkpoints; a lower max_length makes other rows, so the training begins anew"
    ]
    large = settings(batch_size=6, grad_accum=1, gradient_checkpointing=True)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(model_of(), tiny_rows(16), settings=large, output_dir=tmp_path)
    advice = "set batch_size to 3 and grad_accum to 2 (now 6 and 1), and the training continues"
    assert advice in caught.value.__notes__[0]


def test_an_adapter_that_does_not_move_is_an_error(tmp_path):
    model = model_of()
    dead = adapted_modules(model)["model.layers.1.mlp.down_proj"]
    for parameter in dead.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    with pytest.raises(
        RuntimeError, match=r"each adapted module .*layers\.1\.mlp\.down_proj'\] unchanged"
    ):
        train(model, tiny_rows(16), settings=FAST, output_dir=tmp_path)


def test_models_that_are_refused(tmp_path):
    def run(model):
        train(model, tiny_rows(8), settings=FAST, output_dir=tmp_path)

    with pytest.raises(TypeError, match="model must be a PEFT model, got LlamaForCausalLM"):
        run(tiny_model())
    model = model_of()
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"0 frozen \(first: \[\]\), 1 others .*lm_head"):
        run(model)
    model = model_of()
    next(iter(adapter_parameters(model).values())).requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 frozen \(first: \['base_model"):
        run(model)


def test_rows_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rows must not be empty"):
        train(model_of(), [], settings=FAST, output_dir=tmp_path)
    with pytest.raises(ValueError, match="got none in row 1"):
        train(
            model_of(),
            [TokenRow((1,), (2,)), TokenRow((), (2,))],
            settings=FAST,
            output_dir=tmp_path,
        )
    with pytest.raises(ValueError, match="got 1 step, which warm-up gives 0"):
        train(model_of(), tiny_rows(8), settings=settings(warmup_ratio=0.1), output_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be a number > 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number > 0, got nan"),
        ({"epochs": float("inf")}, "epochs must be a number > 0, got inf"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"save_total_limit": 1}, "save_total_limit must be at least 2, got 1"),
        ({"max_grad_norm": -1}, "max_grad_norm must be a number >= 0, got -1"),
        ({"warmup_ratio": 1}, r"warmup_ratio must be in \[0, 1\), got 1"),
        ({"schedule": "step"}, "schedule must be one of cosine, .*, got 'step'"),
        ({"validation_points": (2,)}, r"validation_points must be in \[0, 1\], got \(2,\)"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_settings_of_wrong_type():
    with pytest.raises(TypeError, match="grad_accum must be an int, got float"):
        settings(grad_accum=2.0)


def test_defaults_are_table_6():
    defaults = TrainSettings()
    assert (defaults.learning_rate, defaults.batch_size, defaults.grad_accum) == (2e-4, 1, 8)
    assert (defaults.epochs, defaults.warmup_ratio, defaults.schedule) == (1, 0.03, "cosine")
    assert (defaults.weight_decay, defaults.seed) == (0, 41)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's peak of the resident set")
def test_what_was_freed_before_counts_for_no_later_block():
    with PeakMemory() as before:
        pass
    blocks = [torch.ones(20_000 + n) for n in range(6000)]  # 550 MB, each too small for a map
    last = torch.ones(20_000)  # above them on the heap, so that nothing is given back by itself
    del blocks
    with PeakMemory() as after:
        pass
    assert last.sum() == 20_000
    assert after.bytes < before.bytes + (100 << 20)


def test_peak_memory_sees_an_allocation_that_is_gone():
    with PeakMemory() as small:
        pass
    with PeakMemory() as large:
        torch.ones(1 << 26)  # 256 MiB
    if small.kind == "resident set":
        assert large.bytes - small.bytes > 200 << 20
    assert large.kind == small.kind


# Kill and resume


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    killing.run("training", folder)
    return torch.load(folder / "out.pt")


def kill_and_resume(folder, unbroken, seed, kills):
    """SIGKILL at random instants after random steps, then to the end; a new process each time."""
    rng = random.Random(seed)
    progress = folder / "progress"
    for _ in range(kills):
        process = killing.start("training", folder)
        assert killing.kill_after(process, progress, rng.randrange(1, 4), rng.random() * 0.06)
    before = killing.lines(progress)
    killing.run("training", folder)
    assert killing.lines(progress) - before < 14  # it went on from a checkpoint
    values, losses, validation = torch.load(folder / "out.pt")
    assert all(torch.equal(a, b) for a, b in zip(values, unbroken[0], strict=True))
    assert losses == unbroken[1]
    assert validation == unbroken[2]


def test_killed_at_random_instants_it_ends_with_the_same_adapter(tmp_path, unbroken):
    kill_and_resume(tmp_path, unbroken, seed=0, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 13))
def test_killed_many_times_it_ends_with_the_same_adapter(tmp_path, unbroken, seed):
    kill_and_resume(tmp_path, unbroken, seed, kills=4)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "floe_done.json", "trainer_state.json"]
)
def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path, unbroken, name):
    folder = tmp_path / "run"
    training(str(tmp_path))
    newest = folder / "checkpoint-14"
    data = (newest / name).read_bytes()
    (newest / name).write_bytes(data[: len(data) // 2])
    result = training(str(tmp_path))
    assert result.resumed_from == 13
    assert (folder / "broken" / "checkpoint-14").is_dir()
    values, losses, _ = torch.load(tmp_path / "out.pt")
    assert all(torch.equal(a, b) for a, b in zip(values, unbroken[0], strict=True))
    assert losses == unbroken[1]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, unbroken):
    real = checkpoints.seal

    def full(folder, identity):
        if folder.name == "checkpoint-5":
            raise OSError(28, "No space left on device", str(folder))
        real(folder, identity)

    monkeypatch.setattr(checkpoints, "seal", full)
    with pytest.raises(OSError, match="No space left"):
        training(str(tmp_path))
    monkeypatch.undo()
    assert training(str(tmp_path)).resumed_from == 4
    values, *_ = torch.load(tmp_path / "out.pt")
    assert all(torch.equal(a, b) for a, b in zip(values, unbroken[0], strict=True))


def test_checkpoints_of_another_run_are_refused(tmp_path):
    training(str(tmp_path))
    rows, folder = tiny_rows(20), tmp_path / "run"
    other = dataclasses.replace(TRAINING, learning_rate=1e-3)
    with pytest.raises(
        FileError, match=r"checkpoint-14: is a checkpoint .* with other learning_rate;"
    ):
        train(model_of(dropout=0.25), rows, settings=other, output_dir=folder)
    with pytest.raises(FileError, match=r"with other rows;"):
        train(model_of(dropout=0.25), rows[1:], settings=TRAINING, output_dir=folder)
    with pytest.raises(FileError, match=r"with other adapter;"):
        train(model_of(layers=[0]), rows, settings=TRAINING, output_dir=folder)
    checkpoints.remove_checkpoints(folder)
    assert not folder.exists()


def stop_at(step):
    def progress(done, *_):
        if done == step:
            raise KeyboardInterrupt

    return progress


def stopped(folder, step, rows=20):
    with pytest.raises(KeyboardInterrupt):
        train(
            model_of(dropout=0.25),
            tiny_rows(rows),
            settings=TRAINING,
            output_dir=folder,
            on_progress=stop_at(step),
        )


@pytest.mark.parametrize("hours", [1, -1])
def test_checkpoints_from_another_time_are_gone_on_from(tmp_path, hours):
    """The clock was set back, or the folder comes from another machine."""
    stopped(tmp_path, 6)
    other = time.time() + hours * 3600
    for folder in tmp_path.glob("checkpoint-*"):
        os.utime(folder, (other, other))
    (tmp_path / "checkpoint-notes").mkdir()
    result = train(model_of(dropout=0.25), tiny_rows(20), settings=TRAINING, output_dir=tmp_path)
    assert (result.resumed_from, result.steps) == (5, 14)
    names = ["checkpoint-13", "checkpoint-14", "checkpoint-notes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize(
    "advice",
    [
        {"gradient_checkpointing": True},
        {"batch_size": 1, "grad_accum": 4},
        {"save_steps": 3},
        {"validation_points": ()},
        {"eval_batch_size": 1},
    ],
)
def test_what_out_of_memory_advises_goes_on_from_the_checkpoints(tmp_path, advice):
    rows, plain = tiny_rows(40), settings(batch_size=2, grad_accum=2, max_steps=8, save_steps=1)
    unbroken, model = model_of(), model_of()
    train(unbroken, rows, settings=plain, output_dir=tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        train(model, rows, settings=plain, output_dir=tmp_path / "run", on_progress=stop_at(5))
    model = model_of()
    changed = dataclasses.replace(plain, **advice)
    result = train(model, rows, settings=changed, output_dir=tmp_path / "run")
    assert (result.resumed_from, result.steps) == (4, 8)
    assert distance(model, unbroken) < 1e-3


def test_the_identity_is_what_decides_the_adapter():
    same = {
        "batch_size": 4,
        "grad_accum": 2,
        "gradient_checkpointing": True,
        "save_steps": 3,
        "save_total_limit": 7,
        "validation_points": (),
        "eval_batch_size": 3,
    }
    other = {
        "learning_rate": 1.0,
        "batch_size": 2,
        "grad_accum": 3,
        "epochs": 2.0,
        "max_steps": 3,
        "warmup_ratio": 0.5,
        "schedule": "linear",
        "weight_decay": 1.0,
        "max_grad_norm": 9.0,
        "group_by_length": True,
        "seed": 1,
    }
    assert same.keys() | other.keys() == vars(FAST).keys()
    assert settings(**same).identity() == FAST.identity()
    for name, value in other.items():
        assert settings(**{name: value}).identity() != FAST.identity(), name
    steps = {"max_steps": 5}
    assert settings(**steps, epochs=2.0).identity() == settings(**steps).identity()


def test_works_while_the_base_is_called_separately(tmp_path):
    rows = tiny_rows(16)
    a, b = model_of(), model_of()
    train(a, rows, settings=FAST, output_dir=tmp_path)
    with separate_base(b):
        train(b, rows, settings=FAST, output_dir=tmp_path)
    assert distance(a, b) < 1e-4
