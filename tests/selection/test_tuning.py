import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.importance_models import KINDS, adapted, assert_untouched, batches, plain, snapshot

from floe.decoder_blocks import base_of, find_blocks, linear_at
from floe.selection.masks import tuning
from floe.selection.masks.tuning import (
    NotTunable,
    UnitSystem,
    check_tunable,
    leading_rows,
    solve_ridge,
    tune_masks,
)

UNITS = torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 0], [2, 0, 1]], dtype=torch.float64)
KEPT = [0, 2]  # the second of the three units is masked


def equations(target, columns=KEPT):
    a = UNITS[:, columns]
    return a.T @ a, a.T @ target


def test_worked_example_of_the_solvers():
    gram, rhs = equations(UNITS.sum(1))
    assert gram.tolist() == [[6, 3], [3, 3]]
    assert rhs.tolist() == [10, 7]
    assert solve_ridge(gram, rhs, 0.0).tolist() == pytest.approx([1, 4 / 3])
    assert solve_ridge(gram, rhs, 1.0).tolist() == pytest.approx([1.05263158, 1.21052632])
    assert solve_ridge(gram, -rhs, 0.0).tolist() == pytest.approx(
        [-1, -4 / 3]
    )  # the sign as printed


def test_worked_example_with_a_stream_difference():
    student_minus_teacher = torch.tensor([0.1, -0.2, 0, 0.1], dtype=torch.float64)
    target = UNITS.sum(1) - student_minus_teacher
    # four equations as four tokens with one output channel; a unit's weight is 1
    system = UnitSystem(torch.ones(1, 2, dtype=torch.float64), width=1)
    system.add(UNITS[:, KEPT], target[:, None])
    system.finish()
    scale = system.solve(0.0)
    assert scale.tolist() == pytest.approx([0.9, 1.43333333])
    assert system.residual(torch.ones_like(scale)) == pytest.approx(1.56844, abs=1e-5)
    assert system.residual(scale) == pytest.approx(1.44799, abs=1e-5)


def test_duplicate_units_need_the_ridge():
    a = torch.tensor([[1.0, 1], [2, 2]], dtype=torch.float64)
    gram, rhs = a.T @ a, a.T @ torch.tensor([3.0, 6], dtype=torch.float64)
    kept = gram.clone()
    assert solve_ridge(gram, rhs, 1e-3).tolist() == pytest.approx([1.49995, 1.49995])
    assert torch.equal(gram, kept)
    assert not solve_ridge(gram * 0, rhs, 0.0).isfinite().any()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's peak of the resident set")
def test_the_gram_matrix_is_held_three_times_at_most():
    """So that 14,336 units (1.5 GiB each time) fit 8 GB with all else."""
    code = (
        "import re, torch\n"
        "from floe.selection.masks.tuning import UnitSystem\n"
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status())[1]) * 1024\n"
        "torch.linalg.cholesky_ex(torch.eye(2, dtype=torch.float64))\n"
        "before, weight = peak(), torch.randn(64, 4096) / 8\n"
        "system, inputs = UnitSystem(weight, 1), torch.randn(512, 4096)\n"
        "system.add(inputs, inputs @ weight.T)\n"
        "assert system.finish().solve(1e-3).isfinite().all()\n"
        "print((peak() - before) / (8 * 4096**2))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert float(done.stdout) < 3.7, done.stderr


def test_gram_identity():
    weight = torch.tensor([[1.0, 2], [0, 1]], dtype=torch.float64)
    system = UnitSystem(weight, width=1)
    system.add(
        torch.tensor([[1.0, 3], [2, -1]], dtype=torch.float64),
        torch.tensor([[1.0, 0], [2, 1]], dtype=torch.float64),
    )
    system.finish()
    assert system.gram.tolist() == [[5, 2], [2, 50]]
    assert system.rhs.tolist() == [5, 1]


@pytest.mark.parametrize(("width", "intercept"), [(1, False), (3, False), (3, True)])
def test_equals_dense_least_squares(width, intercept):
    generator = torch.Generator().manual_seed(width)
    units, channels = 4, 5
    weight = torch.randn(channels, units * width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(9, units * width, generator=generator, dtype=torch.float64)
    target = torch.randn(9, channels, generator=generator, dtype=torch.float64) + 0.7
    system = UnitSystem(weight, width, intercept)
    for part in (slice(0, 4), slice(4, 9)):
        system.add(inputs[part], target[part])
    system.finish()
    blocks = [slice(u * width, (u + 1) * width) for u in range(units)]
    a = torch.stack([(inputs[:, b] @ weight[:, b].T).flatten() for b in blocks], dim=1)
    b = target.flatten()
    torch.testing.assert_close(system.gram, a.T @ a)
    torch.testing.assert_close(system.rhs, a.T @ b)
    around = torch.ones(units + intercept, dtype=torch.float64)
    full = torch.cat([a, torch.ones(len(b), 1, dtype=torch.float64)], 1) if intercept else a
    around[units:] = 0  # the intercept is not pulled anywhere
    damp = torch.full((units + intercept,), 0.1 * float((a * a).sum(0).mean()), dtype=torch.float64)
    damp[units:] = 0
    rows, right = torch.cat([full, damp.sqrt().diag()]), torch.cat([b, damp.sqrt() * around])
    expected = torch.linalg.lstsq(rows, right[:, None]).solution[:, 0]
    found = system.solve(0.1)
    torch.testing.assert_close(found, expected[:units])
    assert system.residual(found) == pytest.approx(float((a @ found - b).norm()))


def masks(heads=4, share=0.5, seed=0):
    rng = np.random.default_rng(seed)
    head, neuron = (rng.random((3, heads)) < share) * 1.0, (rng.random((3, 40)) < share) * 1.0
    head[:, 0] = 1
    return head, neuron


def sublayers(model, batch, head=None, neuron=None):
    """Inputs and outputs of every sublayer, masks applied to the frozen weights' inputs."""
    from floe.adapters import separate_base

    seen, hooks = {}, []
    for block in find_blocks(model):
        for name, path, mask in (
            ("attention", block.o_proj, head),
            ("ffn", block.down_proj, neuron),
        ):
            base, outer = linear_at(model, path), base_of(model).get_submodule(path)
            key = (block.index, name)
            if mask is not None:
                wide = torch.tensor(
                    np.repeat(mask[block.index], base.in_features // mask.shape[1])
                ).to(base.weight)
                hooks.append(
                    base.register_forward_pre_hook(
                        lambda _m, a, w=wide, k=key: (seen.update({(*k, "in"): a[0]}), (a[0] * w,))[
                            1
                        ]
                    )
                )
            hooks.append(
                outer.register_forward_hook(lambda _m, _a, y, k=key: seen.update({(*k, "out"): y}))
            )
        hooks.append(
            block.module.register_forward_hook(
                lambda _m, a, y, k=block.index: seen.update({(k, "x"): a[0], (k, "y"): y})
            )
        )
    with torch.no_grad(), separate_base(model):
        model.eval()(**{k: v for k, v in batch.items() if k != "labels"})
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_solves_what_it_says_layer_by_layer(kind):
    """Rebuild one layer's dense system from forwards with the result's masks; solve it again."""
    model = adapted(kind, dtype=torch.float64)
    # Gemma 2's eager attention gives NaN at padding in float64: rows of one length there
    (batch,) = batches(((9, 4),) * 5) if kind == "gemma2" else batches()
    head, neuron = masks()
    result = tune_masks(model, [batch], head, neuron, ridge=1e-2)
    assert all(r["accepted"] for r in result.records)
    real = batch["attention_mask"].bool()
    teacher = sublayers(model, batch)
    layer = 1
    before = np.where(np.arange(3)[:, None] < layer, result.neuron_mask, neuron)
    student = sublayers(model, batch, result.head_mask, before)
    block = find_blocks(model)[layer]
    normed = kind.startswith("gemma")
    kept = np.flatnonzero(neuron[layer])
    down = linear_at(model, block.down_proj)
    a = student[layer, "ffn", "in"][real]
    units = a[:, kept, None] * down.weight.T[kept]  # [n, U, d]
    masked_out = (a * torch.as_tensor(neuron[layer])) @ down.weight.T
    untouched = student[layer, "ffn", "out"][real] - masked_out  # the adapter's part
    if normed:
        target = teacher[layer, "ffn", "out"][real] - untouched
    else:
        middle = student[layer, "x"] + student[layer, "attention", "out"]
        target = teacher[layer, "y"][real] - middle[real] - untouched
    design = units.transpose(1, 2).reshape(-1, len(kept)).detach()
    gram = design.T @ design
    scale = solve_ridge(gram, design.T @ target.flatten(), 1e-2 * float(gram.diagonal().mean()))
    assert np.allclose(result.neuron_mask[layer][kept], scale.numpy(), rtol=1e-4, atol=1e-5)
    norm = float(teacher[layer, "ffn", "out"][real].norm())
    record = next(r for r in result.records if (r["layer"], r["component"]) == (layer, "ffn"))
    ones = torch.ones(len(kept), dtype=torch.float64)
    assert record["residual_before"] == pytest.approx(
        float((design @ ones - target.flatten()).norm()) / norm, rel=1e-4
    )
    assert record["residual_after"] == pytest.approx(
        float((design @ scale - target.flatten()).norm()) / norm, rel=1e-4
    )
    assert record["residual_after"] < record["residual_before"]


def test_attention_is_fitted_with_an_intercept():
    model = adapted(dtype=torch.float64, targets=["o_proj", "down_proj"])
    (batch,) = batches()
    head, neuron = masks()
    result = tune_masks(model, [batch], head, neuron, ridge=0.0)
    real = batch["attention_mask"].bool()
    teacher = sublayers(model, batch)
    head_before = np.where(np.arange(3)[:, None] < 2, result.head_mask, head)
    student = sublayers(
        model, batch, head_before, np.where(np.arange(3)[:, None] < 2, result.neuron_mask, neuron)
    )
    o_proj = linear_at(model, find_blocks(model)[2].o_proj)
    o = student[2, "attention", "in"][real]
    kept = np.flatnonzero(head[2])
    design = torch.stack(
        [(o[:, u * 8 : u * 8 + 8] @ o_proj.weight[:, u * 8 : u * 8 + 8].T).flatten() for u in kept],
        1,
    )
    masked = (o * torch.as_tensor(np.repeat(head[2], 8))) @ o_proj.weight.T
    untouched = student[2, "attention", "out"][real] - masked
    target = (teacher[2, "x"] + teacher[2, "attention", "out"] - student[2, "x"])[real] - untouched
    design = torch.cat([design, torch.ones(len(design), 1)], 1).detach()
    expected = torch.linalg.lstsq(design, target.flatten()[:, None].detach()).solution[
        : len(kept), 0
    ]
    assert np.allclose(result.head_mask[2][kept], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_full_masks_stay_ones_and_zeros_stay_zero():
    model = adapted()
    ones = np.ones((3, 4)), np.ones((3, 40))
    result = tune_masks(model, batches(), *ones)
    assert abs(result.head_mask - 1).max() < 1e-3
    assert abs(result.neuron_mask - 1).max() < 1e-3
    head, neuron = masks()
    result = tune_masks(model, batches(), head, neuron)
    assert ((result.head_mask == 0) == (head == 0)).all()
    assert ((result.neuron_mask == 0) == (neuron == 0)).all()
    assert result.neuron_mask[neuron == 1].std() > 0.01


def test_tuned_masks_bring_the_model_back():
    """With tuned masks the last hidden state is nearer to the unmasked model's."""
    model = adapted()
    (batch,) = batches()
    head, neuron = masks(share=0.7)
    result = tune_masks(model, [batch], head, neuron)
    real = batch["attention_mask"].bool()
    goal = sublayers(model, batch)[2, "y"][real]
    binary = sublayers(model, batch, head, neuron)[2, "y"][real]
    tuned = sublayers(model, batch, result.head_mask, result.neuron_mask)[2, "y"][real]
    assert (tuned - goal).norm() < 0.95 * (binary - goal).norm()


def test_padding_batches_and_logits_to_keep_change_nothing():
    model = adapted()
    expected = tune_masks(model, batches(), *masks())
    for other in (batches(side="right"), batches(size=1), batches(size=2, keep=True)):
        found = tune_masks(model, other, *masks())
        assert np.allclose(found.head_mask, expected.head_mask, atol=2e-3)
        assert np.allclose(found.neuron_mask, expected.neuron_mask, atol=2e-3)


def test_inputs_and_model_are_left_alone():
    model = adapted()
    before, (head, neuron) = snapshot(model), masks()
    tune_masks(model, batches(), head, neuron)
    assert_untouched(model, before)
    assert all(np.array_equal(a, b) for a, b in zip((head, neuron), masks(), strict=True))


def test_kv_groups_and_an_empty_layer():
    model = adapted("qwen2")
    head, neuron = masks(heads=2)
    head[1], neuron[1] = 0, 0
    result = tune_masks(model, batches(), head, neuron)
    assert result.head_mask.shape == (3, 2)
    assert not result.head_mask[1].any()
    assert not result.neuron_mask[1].any()
    records = [r for r in result.records if r["layer"] == 1]
    assert [r["residual_before"] == r["residual_after"] > 0 for r in records] == [True, True]


def test_rejected_masks_stay_binary():
    head, neuron = masks()
    result = tune_masks(adapted(), batches(), head, neuron, bound=1e-9)
    assert np.array_equal(result.head_mask, head)
    assert np.array_equal(result.neuron_mask, neuron)
    assert len(result.records) == 6
    assert not any(r["accepted"] for r in result.records)


def test_one_rejection_leaves_the_others_tuned(monkeypatch):
    solve = UnitSystem.solve
    calls = []

    def fail_once(self, *args):
        calls.append(1)
        scale = solve(self, *args)
        return scale * float("nan") if len(calls) == 2 else scale

    monkeypatch.setattr(tuning.UnitSystem, "solve", fail_once)
    head, neuron = masks()
    result = tune_masks(adapted(), batches(), head, neuron)
    assert [r["accepted"] for r in result.records] == [True, False, True, True, True, True]
    assert np.array_equal(result.neuron_mask[0], neuron[0])
    assert not np.array_equal(result.neuron_mask[1], neuron[1])


def test_leading_rows_are_whole_and_within_the_cap():
    def lengths(cap):
        parts = leading_rows(batches(size=2), cap)
        return [n for part in parts for n in part["attention_mask"].sum(1).tolist()]

    assert lengths(100) == [9, 5, 7, 3, 8]
    assert lengths(21) == [9, 5, 7]
    assert lengths(20) == [9, 5]
    assert lengths(1) == [9]
    assert leading_rows(batches(size=2, keep=True), 21)[1]["logits_to_keep"].shape == (4,)


def test_bfloat16_model():
    head, neuron = masks()
    result = tune_masks(adapted(dtype=torch.bfloat16), batches(), head, neuron)
    assert np.isfinite(result.neuron_mask).all()
    assert result.neuron_mask[neuron == 1].std() > 0.01


def test_a_block_that_does_not_add_up_is_refused():
    model = plain()
    find_blocks(model)[1].module.register_forward_hook(lambda _m, _a, y: y * 1.5)
    for attempt in (
        lambda: tune_masks(model, batches(), *masks()),
        lambda: check_tunable(model, batches()),
    ):
        with pytest.raises(NotTunable, match=r"block model\.layers\.1 must output its input plus"):
            attempt()


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_shows_whether_masks_can_be_tuned(kind):
    model = adapted(kind)
    before = snapshot(model)
    check_tunable(model, batches())
    assert_untouched(model, before)


def test_quantised_weights_are_refused(monkeypatch):
    monkeypatch.setattr(tuning, "is_quantised", lambda _m: True)
    with pytest.raises(ValueError, match="model must have floating-point weights to tune masks"):
        tune_masks(plain(), batches(), *masks())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ridge": -1}, ValueError, "ridge must be a number >= 0, got -1"),
        ({"ridge": float("nan")}, ValueError, "ridge must be a number >= 0, got nan"),
        ({"bound": 0}, ValueError, "bound must be > 0, got 0"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be >= 1, got 0"),
        ({"head_mask": [[1.0]]}, TypeError, "head_mask must be a numpy array, got list"),
        ({"head_mask": np.ones((3, 5))}, ValueError, r"head_mask must be \[3, \[2, 4\]\], got"),
        ({"neuron_mask": np.full((3, 40), np.nan)}, ValueError, "neuron_mask must be finite"),
        ({"batches": []}, ValueError, "at least one row"),
    ],
)
def test_refusals(options, error, message):
    head, neuron = masks()
    arguments = {"batches": batches(), "head_mask": head, "neuron_mask": neuron} | options
    with pytest.raises(error, match=message):
        tune_masks(plain(), **arguments)
