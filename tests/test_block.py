import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from floe.selection.block import project, rearrange, rearrange_layers
from floe.selection.masks import determine
from floe.selection.presets import PRESETS, Preset


def loss_of(gradient, mask):
    return float((gradient[:, ~np.asarray(mask, bool)].astype(float).sum(axis=1) ** 2).sum())


def transcribed(gradient, cost, mask, slack=np.inf):
    """The rule in plain numpy: every candidate set summed afresh, no pruning."""
    mask = mask.copy()
    own = (gradient**2).sum(axis=0)
    for entering in sorted(np.flatnonzero(mask), key=lambda i: (own[i], i)):
        best, found = loss_of(gradient, mask), None
        scale = own.max() + np.sqrt(own.max() * best)
        for leaving in np.flatnonzero(~mask):
            trial = mask.copy()
            trial[leaving], trial[entering] = True, False
            rise = cost[leaving] - cost[entering]
            new = loss_of(gradient, trial)
            if rise <= slack and new < best - (1e-12 * scale if found is None else 0):
                best, found = new, leaving
        if found is not None:
            mask[found], mask[entering] = True, False
            slack -= cost[found] - cost[entering]
    return mask


def case(seed, units=12, samples=7, integers=False):
    rng = np.random.default_rng(seed)
    gradient = rng.normal(size=(samples, units)) * rng.lognormal(0, 1, units)
    if integers:
        gradient = rng.integers(-2, 3, (samples, units)).astype(float)
    mask = rng.random(units) < rng.random()
    return gradient, rng.integers(0, 6, units).astype(float), mask


@pytest.mark.parametrize("seed", range(300))
def test_it_is_the_rule_written_out(seed):
    gradient, cost, mask = case(seed, integers=seed % 3 == 0)
    slack = (0.0, 2.0, np.inf)[seed % 3]
    found = rearrange(gradient, cost, mask, slack=slack)
    assert found.mask.tolist() == transcribed(gradient, cost, mask, slack).tolist()
    assert found.loss_before == pytest.approx(loss_of(gradient, mask))
    assert found.loss == pytest.approx(loss_of(gradient, found.mask), abs=1e-9)
    assert found.loss <= found.loss_before
    assert found.mask.sum() == mask.sum()
    assert found.slack == pytest.approx(slack - cost[found.mask].sum() + cost[mask].sum())
    assert found.slack >= 0


def test_the_best_set_of_that_size_is_never_beaten_and_often_found():
    reached = 0
    for seed in range(200):
        gradient, _, mask = case(seed, units=9, samples=4)
        found = rearrange(gradient, np.zeros(9), mask, slack=np.inf)
        sets = itertools.combinations(range(9), int((~mask).sum()))
        best = min(loss_of(gradient, ~np.isin(np.arange(9), chosen)) for chosen in sets)
        assert found.loss >= best - 1e-9
        reached += found.loss <= best + 1e-9
    assert reached > 60  # a heuristic of one pass


def test_swaps_happen_because_units_cancel():
    gradient = np.array([[2.0, 3.0, -3.0, 1.0]])  # 0 alone is least but 1 and 2 cancel
    found = rearrange(gradient, np.zeros(4), [0, 1, 1, 0], slack=0)
    assert found.loss < found.loss_before
    assert found.swaps > 0


def test_orthogonal_gradients_leave_the_least_masked():
    """The diagonal case, ties included: without strict gain nothing moves."""
    for values in (np.arange(1.0, 9), np.ones(8)):
        mask = np.arange(8) >= 3
        found = rearrange(np.diag(values), np.ones(8), mask, slack=np.inf)
        assert found.mask.tolist() == mask.tolist()
        assert found.swaps == 0


def test_equal_gains_go_to_the_lower_index():
    gradient = np.array([[5.0, 5.0, 1.0]])
    found = rearrange(gradient, np.zeros(3), [0, 0, 1], slack=0)
    assert found.mask.tolist() == [True, False, False]


def test_a_swap_that_the_budget_cannot_pay_is_left():
    gradient = np.array([[5.0, 4.0, 1.0]])
    costs = np.array([9.0, 2.0, 1.0])  # retaining 0 for 2 costs 8, retaining 1 for 2 costs 1
    kept = [rearrange(gradient, costs, [0, 0, 1], slack=s).mask.tolist() for s in (0, 1, 7.9, 8)]
    assert kept == [[False, False, True], [False, True, False], [False, True, False],
                    [True, False, False]]  # fmt: skip


def test_nothing_masked_or_nothing_retained():
    gradient = np.ones((3, 4))
    for mask in (np.ones(4), np.zeros(4)):
        assert rearrange(gradient, np.zeros(4), mask).mask.tolist() == (mask != 0).tolist()
    assert rearrange(np.ones((3, 0)), np.zeros(0), np.zeros(0)).mask.size == 0


@pytest.mark.parametrize(("samples", "units"), [(5, 9), (9, 5)])
def test_projection_keeps_inner_products(samples, units):
    gradient = np.random.default_rng(0).normal(size=(samples, units))
    full = project(gradient, 5)
    assert full.shape == (5, units)
    assert full.T @ full == pytest.approx(gradient.T @ gradient)
    spectrum = np.linalg.svd(gradient, compute_uv=False)
    error = gradient.T @ gradient - project(gradient, 2).T @ project(gradient, 2)
    assert np.linalg.norm(error, 2) == pytest.approx(spectrum[2] ** 2)


def test_a_low_rank_gradient_needs_few_rows():
    rng = np.random.default_rng(1)
    gradient = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 12))
    mask = np.arange(12) >= 5
    exact = rearrange(gradient, np.zeros(12), mask, slack=np.inf)
    few = rearrange(gradient, np.zeros(12), mask, slack=np.inf, rows=3)
    assert few.mask.tolist() == exact.mask.tolist()
    assert few.loss == pytest.approx(exact.loss, abs=1e-9)


def test_bad_input():
    good = (np.ones((2, 3)), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match=r"gradient must be \[S, n\]"):
        rearrange(np.ones((3, 2)), *good[1:])
    with pytest.raises(ValueError, match="gradient must be finite, got nan"):
        rearrange(np.full((2, 3), np.nan), *good[1:])
    with pytest.raises(ValueError, match="cost must be finite, got inf"):
        rearrange(good[0], [1, np.inf, 1], good[2])
    with pytest.raises(ValueError, match="slack must be a number >= 0, got -1"):
        rearrange(*good, slack=-1)
    with pytest.raises(TypeError, match="rows must be an integer"):
        rearrange(*good, rows=1.5)


def model_scores(layers=3, heads=4, neurons=30, samples=12, seed=0):
    rng = np.random.default_rng(seed)

    def gradients(units):
        common = rng.normal(size=(samples, layers, 2)) @ rng.normal(size=(layers, 2, units)).mean(0)
        return (common + rng.normal(size=(samples, layers, units))).astype(np.float32)

    head, neuron = gradients(heads), gradients(neurons)
    return SimpleNamespace(
        head_gradient=head,
        neuron_gradient=neuron,
        head_fisher=(head.astype(float) ** 2).sum(0),
        neuron_fisher=(neuron.astype(float) ** 2).sum(0),
        head_taylor=rng.lognormal(1, 0.5, (layers, heads)),
        neuron_taylor=rng.lognormal(0, 0.5, (layers, neurons)),
    )


def test_layers_share_the_slack_in_order():
    scores = model_scores()
    rng = np.random.default_rng(2)
    masks = (rng.random((3, 4)) < 0.6, rng.random((3, 30)) < 0.5)
    costs = (scores.head_taylor, scores.neuron_taylor)
    slack = 3.0
    found = rearrange_layers(
        (scores.head_gradient, scores.neuron_gradient), costs, masks, slack=slack
    )
    before = after = 0.0
    for layer in range(3):
        for name, cost, mask, got in (
            ("head", costs[0], masks[0], found.head_mask),
            ("neuron", costs[1], masks[1], found.neuron_mask),
        ):
            gradient = getattr(scores, f"{name}_gradient")[:, layer].astype(float)
            expected = rearrange(gradient, cost[layer], mask[layer], slack=slack)
            assert got[layer].tolist() == expected.mask.tolist()
            slack = expected.slack
            before, after = before + expected.loss_before, after + expected.loss
    assert (found.loss_before, found.loss) == pytest.approx((before, after))
    assert found.swaps > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("granularity", ["global", "layer"])
def test_the_stage_keeps_the_budget_and_lowers_the_loss(budget, granularity, seed):
    scores = model_scores(seed=seed)
    # What is worth retaining is dear, so that the budget stands in the way of swaps.
    scores.neuron_taylor *= scores.neuron_gradient.astype(float).sum(axis=0) ** 2
    found = determine(scores, Preset("b", refine="block", granularity=granularity), budget)
    certificate = found.certificate
    total = scores.head_taylor.sum() + scores.neuron_taylor.sum()
    cost = scores.head_taylor[found.head_mask].sum() + scores.neuron_taylor[found.neuron_mask].sum()
    assert certificate["cost"] == pytest.approx(cost)
    assert cost <= budget * total * (1 + 1e-12)
    assert certificate["upper_bound"] >= certificate["value"] - 1e-9
    assert certificate["block_loss"] < certificate["block_loss_before"]
    assert found.moves["swaps"] > 0
    masked = (~found.head_mask).sum() + (~found.neuron_mask).sum()
    assert certificate["masked"] == masked > certificate["masked_before_too"] > 0
    losses = [
        loss_of(gradient[:, layer], mask[layer])
        for gradient, mask in (
            (scores.head_gradient, found.head_mask),
            (scores.neuron_gradient, found.neuron_mask),
        )
        for layer in range(3)
    ]
    assert certificate["block_loss"] == pytest.approx(sum(losses))


def test_printed_algorithms_keep_the_masked_cost():
    scores = model_scores(seed=4)
    preset = Preset("b", objective="alg1_literal", refine="block", cost="pooled")
    found = determine(scores, preset, 0.4)
    plain = determine(scores, dataclasses.replace(preset, refine="none"), 0.4)
    masked = scores.head_taylor[~plain.head_mask].sum()
    masked += scores.neuron_taylor[~plain.neuron_mask].sum()
    assert found.certificate["cost"] <= max(masked, found.certificate["budget"]) * (1 + 1e-12)
    assert found.moves["swaps"] > 0
    assert (~found.head_mask).sum(axis=1).tolist() == (~plain.head_mask).sum(axis=1).tolist()


def test_per_sample_gradients_are_needed():
    scores = model_scores()
    scores.neuron_gradient = None
    with pytest.raises(ValueError, match=r"needs scores.neuron_gradient.*keep_samples=True"):
        determine(scores, "block")
    scores.neuron_gradient = np.ones((5, 3, 7), np.float32)
    with pytest.raises(ValueError, match=r"neuron_gradient must be \[S, 3, 30\], got shape"):
        determine(scores, PRESETS["block"])
    with pytest.raises(ValueError, match="block_rows needs refine 'block', got 3 with 'swap'"):
        dataclasses.replace(PRESETS["global"], block_rows=3)


@pytest.mark.parametrize("size", [1e-300, 1e150])
@pytest.mark.parametrize("rows", [0, 2])
def test_gradients_of_any_size_are_rearranged_alike(size, rows):
    rng = np.random.default_rng(6)
    gradient, cost, mask = rng.standard_normal((5, 12)), rng.random(12), np.arange(12) % 2 == 0
    plain = rearrange(gradient, cost, mask, slack=1.0, rows=rows)
    found = rearrange(gradient * size, cost, mask, slack=1.0, rows=rows)
    assert plain.swaps
    assert np.array_equal(found.mask, plain.mask)
    assert found.slack == plain.slack
    assert found.loss == pytest.approx(plain.loss * size * size, rel=1e-9, abs=0)


def test_what_overflows_is_refused():
    mask = np.array([True, False])
    with pytest.raises(ValueError, match=r"gradient must have a finite loss, got .* up to 1e\+200"):
        rearrange([[1e200, 1e200]], [1.0, 1.0], mask)
    with pytest.raises(ValueError, match=r"cost must sum to less than 2\*\*1021 in size"):
        rearrange([[1.0, 1.0]], [1.7e308, -1.7e308], mask, slack=1.0)
    with pytest.raises(TypeError, match="mask must be an array of numbers or booleans"):
        rearrange([[1.0, 1.0]], [1.0, 1.0], ["a", ""])
    with pytest.raises(ValueError, match="mask must be finite, got NaN"):
        rearrange([[1.0, 1.0]], [1.0, 1.0], [1.0, np.nan])


def test_an_infinite_slack_stays_so():
    found = rearrange([[1.0, 3.0, 2.0]], [5.0, 1.0, 2.0], [True, False, True], slack=np.inf)
    assert (found.swaps, found.slack) == (1, np.inf)
