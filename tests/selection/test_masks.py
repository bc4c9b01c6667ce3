import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from floe.selection.masks.determine import PRESETS, Preset, determine
from floe.selection.masks.solvers import (
    Units,
    refine_masks,
    solve_mask,
    solve_two_class,
    solve_two_class_literal,
)

PAIRS = ("same_layer_cross", "same_layer", "all")


def bits(mask):
    return "".join("1" if kept else "0" for kept in np.ravel(mask))


def scores_of(layers=4, heads=3, neurons=20, seed=0):
    rng = np.random.default_rng(seed)

    def draw(units):
        return rng.lognormal(0, 1, (layers, units))

    return SimpleNamespace(
        head_gradient=rng.normal(size=(6, layers, heads)).astype(np.float32),
        neuron_gradient=rng.normal(size=(6, layers, neurons)).astype(np.float32),
        head_fisher=draw(heads),
        neuron_fisher=draw(neurons),
        head_taylor=4 * draw(heads),
        neuron_taylor=draw(neurons),
    )


def taylor_mass(scores):
    return scores.head_taylor.sum() + scores.neuron_taylor.sum()


def test_global_masks_are_the_two_class_solution_refined():
    scores = scores_of()
    found = determine(scores, dataclasses.replace(PRESETS["global"], refine="none"))
    limit = 0.5 * taylor_mass(scores)
    plain = solve_two_class(
        scores.head_fisher.ravel(),
        scores.neuron_fisher.ravel(),
        scores.head_taylor.mean(),
        scores.neuron_taylor.mean(),
        limit,
    )
    assert bits(found.head_mask) == bits(plain.head_mask)
    assert bits(found.neuron_mask) == bits(plain.neuron_mask)
    assert found.certificate["optimal"]
    assert found.certificate["budget"] == pytest.approx(limit)
    refined = determine(scores, "global")
    expected = refine_masks(
        Units(scores.head_fisher, scores.neuron_fisher, scores.head_taylor, scores.neuron_taylor),
        limit,
        found.head_mask,
        found.neuron_mask,
    )
    assert bits(refined.neuron_mask) == bits(expected.neuron_mask)
    assert refined.certificate["cost"] <= limit * (1 + 1e-12)
    assert refined.certificate["upper_bound"] >= refined.certificate["value"]
    assert refined.moves["repairs"] + refined.moves["adds"] + refined.moves["swaps"] > 0


def test_exact_masks_are_the_knapsack_solution():
    scores = scores_of()
    found = determine(scores, "exact", 0.3)
    value = np.concatenate([scores.head_fisher.ravel(), scores.neuron_fisher.ravel()])
    cost = np.concatenate([scores.head_taylor.ravel(), scores.neuron_taylor.ravel()])
    plain = solve_mask(value, cost, 0.3 * cost.sum())
    assert bits(found.head_mask) + bits(found.neuron_mask) == bits(plain.mask)
    certificate = found.certificate
    assert certificate["optimal"]
    assert certificate["gap"] == certificate["upper_bound"] - certificate["value"]
    assert certificate["value"] >= determine(scores, "global", 0.3).certificate["value"]


def test_layers_share_one_absolute_budget():
    scores = scores_of()
    scores.neuron_taylor[0] *= 10  # the first layer can mask fewer of its dear units
    scores.head_taylor[0] *= 10
    found = determine(scores, "paper_layer")
    share = 0.5 * taylor_mass(scores) / 4
    for layer in range(4):
        start = solve_two_class_literal(
            scores.head_fisher[layer],
            scores.neuron_fisher[layer],
            scores.head_taylor[layer].mean(),
            scores.neuron_taylor[layer].mean(),
            share,
        )
        units = Units(
            *(
                getattr(scores, name)[layer : layer + 1]
                for name in ("head_fisher", "neuron_fisher", "head_taylor", "neuron_taylor")
            )
        )
        expected = refine_masks(
            units, 0, start.head_mask[None], start.neuron_mask[None], literal=True
        )
        assert bits(found.neuron_mask[layer]) == bits(expected.neuron_mask)
        assert bits(found.head_mask[layer]) == bits(expected.head_mask)
    masked = (~found.neuron_mask).sum(axis=1)
    assert masked[0] < masked[1:].min()
    assert found.certificate["budget"] == pytest.approx(4 * share)
    masked_cost = scores.head_taylor[~found.head_mask].sum()
    masked_cost += scores.neuron_taylor[~found.neuron_mask].sum()
    assert found.certificate["cost"] == pytest.approx(masked_cost)


def test_printed_algorithm_equals_the_complementary_global_budget():
    scores = scores_of()
    printed = determine(scores, "alg1_literal", 0.25)
    retained = determine(scores, Preset("retain"), 0.75)
    differing = (printed.head_mask != retained.head_mask).sum()
    differing += (printed.neuron_mask != retained.neuron_mask).sum()
    assert differing <= 2  # rounding to whole units on either side
    everything = determine(scores, "alg1_literal", 1.0)
    assert everything.head_mask.any()


def test_whole_budget_retains_everything_and_is_certified():
    for name in ("global", "exact"):
        found = determine(scores_of(), name, 1.0)
        assert found.head_mask.all()
        assert found.neuron_mask.all()
        assert found.certificate["optimal"]


def test_determination_is_repeatable():
    for name in PRESETS:
        one, other = determine(scores_of(), name), determine(scores_of(), name)
        assert bits(one.neuron_mask) == bits(other.neuron_mask)
        assert one.certificate == other.certificate


@pytest.mark.parametrize("budget", [0, -0.5, 1.01, float("nan")])
def test_budget_is_a_fraction(budget):
    with pytest.raises(ValueError, match=r"budget must be a fraction in \(0, 1\], got"):
        determine(scores_of(), "global", budget)


def test_every_combination_of_options_runs():
    scores = scores_of(2, 2, 5)
    for granularity, cost, pairs in itertools.product(
        ("global", "layer"), ("class_mean", "unit"), PAIRS
    ):
        preset = Preset("x", granularity=granularity, cost=cost, refine="swap", pairs=pairs)
        found = determine(scores, preset, 0.4)
        assert found.certificate["cost"] <= found.certificate["budget"] * (1 + 1e-12)


def test_first_order_values_are_the_predicted_loss_of_masking():
    """Twice the second-order prediction, by hand; where masking is predicted to help, 0."""
    scores = scores_of(layers=1, heads=1, neurons=3)
    scores.head_fisher, scores.head_taylor = np.array([[1.0]]), np.array([[1.0]])
    scores.neuron_fisher, scores.neuron_taylor = np.array([[6.0, 4.0, 5.0]]), np.ones((1, 3))
    scores.meta = {"rows": 2}
    scores.head_mean, scores.neuron_mean = np.array([[-1.0]]), np.array([[1.5, 0.25, -0.5]])
    exact = dataclasses.replace(PRESETS["exact"], first_order=True)
    # 1 + 4, 6 - 6, 4 - 1, 5 + 2: the two most valuable of four equal costs stay
    found = determine(scores, exact, budget=0.5)
    assert (bits(found.head_mask), bits(found.neuron_mask)) == ("1", "001")
    assert found.certificate["value"] == 12.0
    assert bits(determine(scores, "exact", budget=0.5).neuron_mask) == "101"
    scores.head_mean = None
    with pytest.raises(ValueError, match=r"first_order needs scores\.head_mean, got None"):
        determine(scores, exact)
